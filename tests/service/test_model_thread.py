"""Rows that are answered together get what each would get alone, and leave sessions in order."""

import random
import time

import pytest
import torch
from model_thread import Asked, started, state_of

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.footprint import row_bytes
from ttt_megatron.service.jobs import Text
from ttt_megatron.serving.sampling import SamplingSettings

WORDS = ("sea", "whale", "ship", "harpoon", "night", "Übermut", "鯨")


def _text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def _turns(number: int) -> list[dict]:
    """Requests of one session: greedy, drawn, and for one session some that read more."""
    draws = SamplingSettings(temperature=0.9, top_k=40, top_p=0.95)
    return [
        {"prompt": _text(number, 1 + 3 * number), "max_tokens": 3 + number},
        {"prompt": _text(9 + number, 2), "max_tokens": 12, "sampling": draws, "seed": number},
        {"prompt": _text(99 + number, 40 if number == 2 else 1), "max_tokens": 4},
    ]


def _ask(service, name: str, turn: dict) -> Asked:
    turn = dict(turn)
    return Asked(service, turn.pop("prompt"), session=name, **turn)


def _close(mine, theirs, tolerance: float) -> None:
    assert mine.position == theirs.position
    assert mine.steps == theirs.steps
    assert torch.equal(mine.pending_tokens, theirs.pending_tokens)
    pairs = [*zip(mine.fast, theirs.fast, strict=True), (mine.last_hidden, theirs.last_hidden)]
    for a, b in zip(mine.kv, theirs.kv, strict=True):
        pairs += [(a[0], b[0]), (a[1], b[1])]
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# Not in bfloat16, where rounding decides between tokens that are nearly as likely.
@pytest.mark.parametrize("any_served", ["float64", "full attention", "plain"], indirect=True)
def test_sessions_together_are_as_alone(any_served):
    # Rounding grows with the inner steps, here up to 40.
    tolerance = 1e-9 if any_served.model.dtype == torch.float64 else 1e-3
    alone, states = {}, {}
    service = started(any_served)
    for number in range(3):
        name = f"s{number}"
        alone[name] = [_ask(service, name, turn).result() for turn in _turns(number)]
        states[name] = state_of(service, name)
    service.close()
    service = started(any_served, max_batch=2)
    asked = {
        f"s{number}": [_ask(service, f"s{number}", turn) for turn in _turns(number)]
        for number in range(3)
    }
    together = {name: [one.result() for one in turns] for name, turns in asked.items()}
    for name, turns in together.items():
        for (text, end), (text_alone, end_alone) in zip(turns, alone[name], strict=True):
            assert text == text_alone
            assert end.prompt_tokens == end_alone.prompt_tokens
        _close(state_of(service, name), states[name], tolerance)
    assert service.metrics.batch._sum.get() > service.metrics.token_seconds._sum.get()
    service.close()


def test_the_session_has_read_its_answers(served):
    service = started(served)
    text, end = Asked(service, "one two three", session="s", max_tokens=21).result()
    state = state_of(service, "s")
    assert end.session["position"] == state.position == 1 + 13 + 21
    assert end.completion_tokens == 21
    cache = served.new_cache()
    ids = [served.bos_id, *served.encode("one two three")]
    with torch.no_grad():
        out = served.model(torch.tensor([ids]), cache=cache, use_cache=True)
        for _ in range(21):
            ids.append(int(out.logits[0, -1, : served.vocab_size].argmax()))
            out = served.model(torch.tensor([ids[-1:]]), cache=cache, use_cache=True)
    assert text == served.decode(ids[14:])
    _close(state, cache.state(0, served.initial), 1e-5)
    service.close()


def test_an_empty_prompt_goes_on_and_no_tokens_only_read(served):
    service = started(served)
    whole, _ = Asked(service, "abc", session="a", max_tokens=12).result()
    first, _ = Asked(service, "abc", session="b", max_tokens=0).result()
    second, _ = Asked(service, "", session="b", max_tokens=5).result()
    third, end = Asked(service, "", session="b", max_tokens=7).result()
    assert first == ""
    assert second + third == whole
    assert end.session["position"] == 4 + 12
    with pytest.raises(RequestError, match="nothing to go on from"):
        Asked(service, [], session="c").result()
    service.close()


def test_a_restart_goes_on_bit_for_bit(any_served, tmp_path):
    turns = _turns(1)
    service = started(any_served)
    whole = [_ask(service, "s", turn).result()[0] for turn in turns]
    state = state_of(service, "s")
    service.close()
    parts = []
    for turn in turns:
        service = started(any_served, tmp_path)
        parts.append(_ask(service, "s", turn).result()[0])
        again = state_of(service, "s")
        assert service.close() == []
    assert parts == whole
    assert (again.position, again.steps) == (state.position, state.steps)
    for mine, theirs in zip(again.fast, state.fast, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(again.kv, state.kv, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert torch.equal(again.pending_entered, state.pending_entered)


def test_sessions_leave_memory_and_come_back(served, tmp_path):
    turns = {f"s{number}": _turns(number) for number in range(3)}
    roomy = started(served)
    wanted = {n: [_ask(roomy, n, turn).result()[0] for turn in t] for n, t in turns.items()}
    roomy.close()
    need = row_bytes(served.model.config, served.model.dtype)
    service = started(served, tmp_path, memory=2 * need)
    texts = {name: [] for name in turns}
    for turn in range(3):
        for name in turns:
            texts[name].append(_ask(service, name, turns[name][turn]).result()[0])
            held = sum(session.memory_bytes for session in service.pool.all())
            assert held <= 2 * need
    assert texts == wanted
    assert service.metrics.moved.labels("eviction")._value.get() >= 6
    assert service.metrics.moved.labels("load")._value.get() >= 4
    service.close()


def test_too_little_memory_is_told_and_the_service_goes_on(served, tmp_path):
    need = row_bytes(served.model.config, served.model.dtype)
    service = started(served, tmp_path, memory=need - 1, max_wait=100)
    with pytest.raises(RequestError, match="no room") as short:
        Asked(service, "a", session="alone").result()
    assert (short.value.status, short.value.retry_after) == (503, 5)
    service.close()
    service = started(served, tmp_path, memory=need, max_wait=0)
    first = Asked(service, "a", session="first", max_tokens=100)
    first.wait_for_text()
    with pytest.raises(RequestError, match="no room"):
        Asked(service, "b", session="second", max_tokens=2).result()
    first.result()
    Asked(service, "b", session="second", max_tokens=2).result()
    service.close()


def test_without_a_folder_sessions_are_never_dropped(served):
    need = row_bytes(served.model.config, served.model.dtype)
    service = started(served, memory=need + need // 2)
    Asked(service, "a" * 60, session="first", max_tokens=2).result()
    with pytest.raises(RequestError, match="no room"):
        Asked(service, "b" * 60, session="second", max_tokens=2).result()
    assert [session.name for session in service.pool.all()] == ["first"]
    service.close()


def test_cancelling_ends_within_a_token(served):
    service = started(served)
    asked = Asked(service, "abc", session="s", max_tokens=4000)
    asked.wait_for_text()
    asked.job.cancel()
    count = service.metrics.tokens_written._value.get()
    _, end = asked.result()
    assert end.reason == "cancelled"
    assert service.metrics.tokens_written._value.get() <= count + 1
    assert end.session["position"] == 4 + end.completion_tokens < 1000
    again = Asked(service, "abc", session="t", max_tokens=end.completion_tokens)
    assert again.result()[1].session["position"] == end.session["position"]
    _close(state_of(service, "s"), state_of(service, "t"), 1e-6)
    service.close()


def test_a_long_prompt_does_not_hold_up_others(served):
    service = started(served)
    long = Asked(service, "a" * 2_000, session="long", max_tokens=1)
    while service.pool.find("long") is None or service.pool.existing("long").position == 0:
        time.sleep(0.01)
    Asked(service, "b", max_tokens=5).result()
    assert service.pool.existing("long").position < 2_000
    long.job.cancel()
    _, end = long.result()
    assert 0 < end.session["position"] < 2_000
    assert end.session["position"] == state_of(service, "long").position
    service.close()


def test_a_failure_is_one_requests_alone(served):
    """The model raises where a row reads "!", in whatever company."""

    def refuse(module, arguments):
        if (arguments[0] == ord("!")).any():
            raise RuntimeError("a kernel failed")

    service = started(served)
    calm = [Asked(service, f"{i}abc", session=f"s{i}", max_tokens=16).result()[0] for i in range(3)]
    service.close()
    handle = served.model.register_forward_pre_hook(refuse)
    service = started(served)
    asked = [Asked(service, f"{i}abc", session=f"s{i}", max_tokens=16) for i in range(3)]
    for one in asked:
        one.wait_for_text()
    broken = Asked(service, "wait!", session="broken")
    with pytest.raises(RequestError, match="a kernel failed") as failure:
        broken.result()
    assert failure.value.status == 500
    handle.remove()
    ends = [one.result()[1] for one in asked]
    assert [end.completion_tokens for end in ends] == [16] * 3
    assert service.pool.find("broken") is None
    texts = [
        Asked(service, f"{i}abc", session=f"t{i}", max_tokens=16).result()[0] for i in range(3)
    ]
    assert texts == calm
    service.close()


def test_logits_that_are_no_numbers_end_the_session_and_keep_its_file(served, tmp_path):
    service = started(served, tmp_path, save_every_request=True)
    Asked(service, "abc", session="s").result()
    norm = served.model.model.final_norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
    with pytest.raises(RequestError, match="not finite"):
        Asked(service, "def", session="s").result()
    with torch.no_grad():
        norm.copy_(kept)
    with pytest.raises(RequestError, match="DELETE it, or start the service again") as refused:
        Asked(service, "def", session="s").result()
    assert refused.value.status == 409
    Asked(service, "def").result()
    service.close()
    service = started(served, tmp_path)
    assert service.pool.existing("s").position == 4 + 8
    Asked(service, "def", session="s").result()
    service.close()


def test_too_many_requests_are_refused(served):
    service = started(served, max_batch=1, max_queue=1)
    first, second = Asked(service, "a", max_tokens=40), Asked(service, "b", max_tokens=1)
    with pytest.raises(RequestError) as busy:
        Asked(service, "c")
    assert busy.value.status == 429
    assert first.result()[1].completion_tokens <= 40
    second.result()
    service.close()


def test_closing_ends_answers_and_keeps_sessions(served, tmp_path):
    service = started(served, tmp_path, max_batch=1)
    running = Asked(service, "abc", session="s", max_tokens=5000)
    waiting = Asked(service, "abc", session="t")
    running.wait_for_text()
    assert service.close() == []
    end = running.result()[1]
    with pytest.raises(RequestError, match="stopping"):
        waiting.result()
    service = started(served, tmp_path)
    assert service.pool.existing("s").position == 4 + end.completion_tokens
    service.close()


def test_stop_strings_are_read_and_not_sent(served):
    service = started(served)
    text, _ = Asked(service, "abc", max_tokens=30).result()
    stop = text[6:9]
    asked = Asked(service, "abc", session="s", max_tokens=30, stops=(stop,))
    events = []
    while not events or isinstance(events[-1], Text) or len(events) == 1:
        events.append(asked.next())
    cut = "".join(event.text for event in events if isinstance(event, Text))
    end = events[-1]
    assert (cut, end.reason) == (text[: text.find(stop)], "stop")
    assert end.session["position"] == 4 + end.completion_tokens
    service.close()
