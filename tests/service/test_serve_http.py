"""The service as clients meet it, over HTTP and with OpenAI's client."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from model_thread import Asked, started
from serving_process import Serving

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache


@pytest.fixture(scope="module")
def states(served, tmp_path_factory):
    """A folder of adapted states, `book.safetensors` in it."""
    folder = tmp_path_factory.mktemp("states")
    service = started(served)
    Asked(service, "a whole book", session="book", max_tokens=0).result()
    cache: TTTE2ECache = service.pool.existing("book").cache
    cache.save(folder / "book.safetensors", served.model)
    service.close()
    (folder.parent / "outside.safetensors").write_bytes(b"secret")
    (folder / "text.safetensors").write_text("no state")
    return folder


@pytest.fixture(scope="module")
def server(export, states, tmp_path_factory):
    """One service for all tests of this file."""
    folder = tmp_path_factory.mktemp("http")
    options = ("--session-dir", str(folder / "sessions"), "--states-dir", str(states))
    limits = ("--max-prompt-tokens", "3000", "--max-body", "64KiB", "--max-batch", "8")
    serving = Serving(folder / "log", export, *options, *limits)
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def alone(served):
    """What the model answers without HTTP, greedily."""
    service = started(served)
    yield lambda prompt, tokens=8: Asked(service, prompt, max_tokens=tokens).result()[0]
    service.close()


def test_a_completion_is_what_the_model_says(server, alone):
    answer = server.complete("a whale", max_tokens=12)
    assert answer.choices[0].text == alone("a whale", 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 1 + 7
    assert answer.usage.completion_tokens == 12
    ids = [256, *b"a whale"]
    assert server.complete(ids, max_tokens=12).choices[0].text == answer.choices[0].text
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.http.get("/health").json() == {"status": "ok"}


def test_streams_hold_the_same_text_in_whole_characters(server, alone):
    chunks = list(
        server.complete("鯨", max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].text for c in chunks if c.choices)
    assert text == alone("鯨", 40)
    assert len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 40
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    json.loads(lines[0].removeprefix("data: "))


def test_a_text_that_spells_bos_opens_no_document(server):
    assert server.complete("<|bos|>", max_tokens=1).usage.prompt_tokens == 1 + 7


def test_hardly_any_temperature_is_none(server, alone):
    answer = server.complete("a whale", temperature=1e-300)
    assert answer.choices[0].text == alone("a whale")


def test_seeds_repeat_draws(server):
    draws = [
        server.complete("a", temperature=1.0, top_p=0.9, seed=seed, max_tokens=20).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_stop_strings_end_answers(server, alone):
    text = alone("stop", 30)
    stop = text[4:7]
    answer = server.complete("stop", max_tokens=30, stop=["never seen", stop])
    assert answer.choices[0].text == text[: text.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_sessions_go_on_side_by_side(server):
    texts: dict[str, list[str]] = {"ann": [], "bob": []}

    def talk(name: str) -> None:
        for part in ("one ", "two ", "three "):
            chunks = server.complete(part + name, name, max_tokens=9, stream=True)
            texts[name].append("".join(chunk.choices[0].text for chunk in chunks))

    threads = [threading.Thread(target=talk, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in texts:
        again = [
            server.complete(part + name, f"{name}-again", max_tokens=9).choices[0].text
            for part in ("one ", "two ", "three ")
        ]
        assert again == texts[name]
        told = server.http.get(f"/v1/sessions/{name}").json()
        read = sum(len(part + name) for part in ("one ", "two ", "three "))
        assert told["position"] == 1 + read + 27
        assert told["steps"] == (told["position"] - 1) // 8
        assert told["drift"] > 0
        assert told["where"] == "memory"
    answer = server.http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Session": "ann"})
    assert answer.json()["session"]["name"] == "ann"
    assert answer.json()["session"]["position"] > told["position"] - 10


def test_sessions_are_cloned_and_removed(server):
    server.complete("a tale", "tale")
    made = server.http.post("/v1/sessions/tale/clone", json={"to": "other"})
    assert made.status_code == 201
    texts = [server.complete("go on", name).choices[0].text for name in ("tale", "other")]
    assert texts[0] == texts[1]
    assert server.http.post("/v1/sessions/tale/clone", json={"to": "other"}).status_code == 409
    assert server.http.delete("/v1/sessions/other").json()["deleted"] is True
    assert server.http.delete("/v1/sessions/other").status_code == 404
    assert server.http.get("/v1/sessions/other").status_code == 404
    assert "tale" in server.sessions()


def test_sessions_begin_with_an_adapted_state(server):
    body = {"name": "reader", "state": "book.safetensors"}
    made = server.http.post("/v1/sessions", json=body)
    assert made.status_code == 201, made.text
    assert made.json()["position"] == 13
    server.complete("a whole book", "by-hand", max_tokens=0)
    texts = [server.complete(" and", name).choices[0].text for name in ("reader", "by-hand")]
    assert texts[0] == texts[1]
    refused = {
        "../outside.safetensors": 403,
        "/etc/passwd": 403,
        "nothing": 404,
        "text.safetensors": 409,
        "a\0b": 400,
    }
    for state, status in refused.items():
        answer = server.http.post("/v1/sessions", json={"name": "n", "state": state})
        assert answer.status_code == status, answer.text
    assert server.http.post("/v1/sessions", json=body).status_code == 409


BAD = {
    "max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "temperature": ({"temperature": "NaN"}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "unknown": ({"colour": "red"}, "colour is no field"),
    "echo": ({"echo": True}, "echo is not supported"),
    "logprobs": ({"logprobs": 2}, "logprobs is not supported"),
    "n": ({"n": 2}, "n is not supported"),
    "prompts": ({"prompt": ["a", "b"]}, "prompt holds 2 texts"),
    "token": ({"prompt": [1, 257]}, "token 257"),
    "negative": ({"prompt": [-1]}, "token -1"),
    "no ids": ({"prompt": []}, "prompt is empty"),
    "kind": ({"prompt": {"a": 1}}, "prompt"),
    "long": ({"prompt": "a" * 3001}, "--max-prompt-tokens is 3,000"),
    "surrogate": ({"prompt": "\ud800"}, "surrogate"),
    "stop": ({"stop": ""}, "stop holds"),
    "top_k": ({"top_k": 10**30}, "top_k"),
    "name": ({"session": "../up"}, "session '../up'"),
    "dots": ({"session": ".hidden"}, "session '.hidden'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_named(server, case):
    changes, told = BAD[case]
    content = json.dumps({"prompt": "a"} | changes)
    answer = server.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["error"]["message"]


def test_bad_requests_are_told(server):
    def post(content: bytes | str) -> httpx.Response:
        kind = {"Content-Type": "application/json"}
        return server.http.post("/v1/completions", content=content, headers=kind)

    assert "not JSON" in post('{"prompt": ').json()["error"]["message"]
    assert post("[" * 20_000).status_code == 400
    assert post(b"\xff\xfe").status_code == 400
    assert post('{"prompt": "a", "temperature": NaN}').status_code == 400
    assert "prompt" in post("{}").json()["error"]["message"]
    assert post('{"prompt": "' + "a" * 70_000 + '"}').status_code == 413
    stream = (b"a" * 10_000 for _ in range(10))
    assert server.http.post("/v1/completions", content=stream).status_code == 413
    assert server.http.get("/v1/nothing").status_code == 404
    assert server.http.get("/v1/completions").status_code == 405
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        server.complete("a", model="gpt")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}]
        )
    assert server.http.get("/health").status_code == 200


def test_forty_at_once_and_none_is_lost(server, alone):
    prompts = [f"request {number}" for number in range(40)]
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=6), prompts))
    for prompt, answer in list(zip(prompts, answers, strict=True))[::5]:
        assert answer.choices[0].text == alone(prompt, 6)
    assert all(answer.usage.completion_tokens <= 6 for answer in answers)
    assert server.metric('ttt_batch_size_bucket{le="4.0"}') < server.metric("ttt_batch_size_count")


def test_who_hangs_up_ends_the_answer(server):
    for stream in (True, False):
        name = f"gone-{stream}".lower()
        body = {"prompt": "a", "max_tokens": 50_000, "stream": stream, "session": name}
        # Without a stream nothing comes before the end: the client gives up.
        patience = httpx.Timeout(60, read=60 if stream else 0.3)
        try:
            with server.http.stream("POST", "/v1/completions", json=body, timeout=patience) as raw:
                next(raw.iter_lines())
        except httpx.ReadTimeout:
            assert not stream
        deadline = time.monotonic() + 30
        while server.sessions()[name]["where"] == "in use":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        told = server.sessions()[name]
        assert 2 < told["position"] < 50_000
        assert server.complete("go on", name).usage.prompt_tokens == 5


def test_removing_a_session_ends_its_answer(server):
    body = {"prompt": "a", "max_tokens": 50_000, "stream": True, "session": "doomed"}
    with server.http.stream("POST", "/v1/completions", json=body) as raw:
        lines = raw.iter_lines()
        next(lines)
        gone = httpx.delete(f"{server.url}/v1/sessions/doomed", timeout=60)
        assert gone.status_code == 200
        rest = [line for line in lines if line]
    assert "was deleted" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
    assert "doomed" not in server.sessions()


def test_metrics_count(server):
    before = server.metric("ttt_tokens_written_total")
    written = server.complete("count", max_tokens=5).usage.completion_tokens
    assert server.metric("ttt_tokens_written_total") == before + written
    assert server.metric('ttt_requests_total{status="200"}') > 10
    assert server.metric('ttt_sessions{where="memory"}') == len(server.sessions())
    assert server.metric('ttt_session_bytes{where="memory"}') > 1000
    assert server.metric("ttt_first_token_seconds_count") > 10
