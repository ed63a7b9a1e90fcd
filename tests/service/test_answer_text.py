"""Text leaves as soon as it is known not to begin a stop string, in whole characters."""

import pytest

from ttt_megatron.data.tokenizer import ByteTokenizer
from ttt_megatron.service.answer_text import AnswerText


def _pushed(text: str, stops: tuple[str, ...]) -> tuple[list[str], bool]:
    answer = AnswerText(ByteTokenizer().decode, stops)
    parts = []
    for byte in text.encode():
        parts.append(answer.push(byte))
        if answer.stopped:
            return parts, True
    return [*parts, answer.finish()], False


@pytest.mark.parametrize(
    ("text", "stops", "wanted", "stopped"),
    [
        ("plain", (), "plain", False),
        ("one\n\ntwo", ("\n\n",), "one", True),
        ("aab", ("ab",), "a", True),
        ("aaab", ("aab", "x"), "a", True),
        ("abcd", ("bcd", "cd"), "a", True),
        ("ends with a", ("ab",), "ends with a", False),
        ("größer 鯨!", ("鯨",), "größer ", True),
        ("stop", ("stop",), "", True),
    ],
)
def test_text_ends_before_the_first_stop(text, stops, wanted, stopped):
    parts, ended = _pushed(text, stops)
    assert ("".join(parts), ended) == (wanted, stopped)


def test_characters_are_whole_and_nothing_waits_longer_than_it_must():
    assert _pushed("é!", ())[0] == ["", "é", "!", ""]
    assert _pushed("xab", ("abc",))[0] == ["x", "", "", "ab"]


def test_an_incomplete_character_comes_out_in_the_end():
    answer = AnswerText(ByteTokenizer().decode)
    assert answer.push("é".encode()[0]) == ""
    assert answer.finish() == "\N{REPLACEMENT CHARACTER}"
