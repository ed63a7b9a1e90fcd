"""Needle prompts: exact lengths, places between sentences, and the same ones again."""

import random

import numpy as np
import pytest

from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.data.tokenizer import ByteTokenizer, load_tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.evaluation import needle_text
from ttt_megatron.evaluation.haystack import EssayHaystacks, noise_haystack
from ttt_megatron.evaluation.needle_prompt import NEAR, REMOVED, PromptBuilder
from ttt_megatron.evaluation.needle_text import KINDS

SENTENCES = ("Rain fell on the quay.", "Nobody spoke!", "Was it over?", "The lamps went out.")


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def held_out(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("essays")
    texts = root / "text"
    texts.mkdir()
    generator = random.Random(5)
    for number in range(4):
        chosen = generator.choices(SENTENCES, k=60)
        (texts / f"{number}.txt").write_text(" ".join(chosen))
    data = root / "data"
    options = {"inputs": (str(texts),), "output": str(data), "tokenizer": request.param}
    prepare(PrepareOptions(**options, validation=0.5, workers=1))
    return open_dataset(data, "validation"), load_tokenizer(data)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0, NEAR, REMOVED])
def test_prompts_have_the_length_and_the_needle_where_it_belongs(held_out, kind, place):
    dataset, tokenizer = held_out
    builder = PromptBuilder(tokenizer, dataset, answers=4)
    for length in (500, 501, 777):
        prompt = builder.build(kind, length, place, sample=3)
        assert prompt.tokens.shape == (length,)
        assert prompt.tokens[0] == tokenizer.bos_id
        assert (prompt.tokens[1:] != tokenizer.bos_id).all()
        text = tokenizer.decode(prompt.tokens)
        assert text.startswith(needle_text.introduction(kind))
        assert text.count(prompt.value) == (place != REMOVED)
        assert len({prompt.value, *prompt.distractors}) == 4
        assert not any(value in text for value in prompt.distractors)
        if place == REMOVED:
            assert prompt.start is None
            continue
        behind = tokenizer.decode(prompt.tokens[prompt.start :])
        assert behind.startswith(f" The secret {kind.thing} of ")
        assert prompt.distance == length - prompt.start
        if place in (1.0, NEAR):
            assert behind.index("\nWhat") == behind.index(".") + 1
        elif place == 0.5:
            before = tokenizer.decode(prompt.tokens[: prompt.start])
            assert before.rstrip(" ").endswith((".", "!", "?", "\n"))
            assert abs(prompt.start / length - 0.5) < 0.25


def test_a_sample_is_the_same_wherever_its_needle_lies(held_out):
    dataset, tokenizer = held_out
    builder = PromptBuilder(tokenizer, dataset, answers=3)
    first, again = (builder.build(KINDS[2], 600, 0.5, 1) for _ in range(2))
    assert np.array_equal(first.tokens, again.tokens)
    deeper, other = builder.build(KINDS[2], 600, 1.0, 1), builder.build(KINDS[2], 600, 0.5, 2)
    assert (deeper.value, deeper.distractors) == (first.value, first.distractors)
    assert sorted(deeper.tokens) == sorted(first.tokens)
    assert other.value != first.value
    seeded = PromptBuilder(tokenizer, dataset, answers=3, seed=1).build(KINDS[2], 600, 0.5, 1)
    assert seeded.value != first.value


def test_prompts_that_cannot_be_made_are_refused(held_out):
    dataset, tokenizer = held_out
    builder = PromptBuilder(tokenizer, dataset, answers=2)
    with pytest.raises(UserError, match="--lengths 20: introduction, needle and question"):
        builder.build(KINDS[1], 20, 0.0, 0)
    with pytest.raises(UserError, match="in all; give shorter --lengths"):
        builder.build(KINDS[3], 100_000, 0.0, 0)


def test_a_long_haystack_goes_on_into_further_documents(held_out):
    dataset, tokenizer = held_out
    longest = int(dataset.lengths.max())
    drawn = EssayHaystacks(dataset, tokenizer).draw(longest + 40, random.Random(0))
    assert len(drawn.tokens) == len(drawn.ends) == longest + 40
    assert dataset.bos_id not in drawn.tokens
    assert drawn.ends.any()


def test_noise_is_cut_between_sentences():
    tokenizer = ByteTokenizer()
    haystack = noise_haystack(tokenizer, SENTENCES, 400)
    assert len(haystack.tokens) >= 400
    before, behind = haystack.split(400, 0.3)
    assert len(before) + len(behind) == 400
    text = tokenizer.decode(before)
    assert text.endswith((".", "!", "?"))
    assert abs(len(text) - 120) <= 12
    assert [len(part) for part in haystack.split(400, 0.0)] == [0, 400]
    assert [len(part) for part in haystack.split(400, 1.0)] == [400, 0]


def test_words_of_keys_have_one_length_and_values_their_form():
    words = [*needle_text.ADJECTIVES.split(), *needle_text.NOUNS.split()]
    assert {len(word) for word in words} == {5}
    generator = random.Random(0)
    assert 1_000_000 <= int(KINDS[1].draw_value(generator)) <= 9_999_999
    parts = KINDS[3].draw_value(generator).split("-")
    assert [len(part) for part in parts] == [8, 4, 4, 4, 12]


@pytest.mark.parametrize(
    ("continuation", "found"),
    [(" 1234567.", True), ("It is 1234567", True), (" 123456 7", False), ("", False)],
)
def test_the_value_must_be_in_the_continuation(continuation, found):
    assert needle_text.is_found("1234567", continuation) is found


def test_letters_of_a_uuid_count_in_either_case():
    assert needle_text.is_found("0ab1-f", "it is 0AB1-F")
