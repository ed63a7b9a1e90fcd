"""Results written, read, put into tables, compared and drawn."""

import json

import pytest

from ttt_megatron.bench.cells import duration
from ttt_megatron.bench.comparison import compare
from ttt_megatron.bench.plot import draw
from ttt_megatron.bench.results import Report, Result, read_report
from ttt_megatron.bench.tables import as_markdown, mean_token, tables_of
from ttt_megatron.errors import UserError


def result(name, seconds, section="kernels", **settings):
    place = {"operation": "attention", "shape": "tiny, 64 tokens", "precision": "bf16"}
    common = {"way": "ttt_kernels", "status": "measured" if seconds else "skipped"}
    return Result(name=name, section=section, seconds=seconds, **{**place, **common, **settings})


def report(device="a GPU", scale=1.0):
    about = {
        "device": device,
        "date": "2026-01-01",
        "torch": "2",
        "python": "3",
        "packages": {"triton": "3"},
        "commit": None,
        "command": "ttt-megatron bench",
        "backend": "triton",
        "ceilings": {"flops": {"bf16": 1e14}, "bytes_per_second": 1e12, "source": "a test"},
    }
    latency = {"section": "latency", "shape": "tiny, context 64", "way": "SWA", "tokens": 64}
    step = {"section": "meta", "operation": "step", "tokens": 64}
    rows = [
        result("forward", [1e-3, 2e-3, 4e-3], flops=4e9, bytes=1.0, floor=1e-3),
        result("forward", [3e-3 * scale] * 3, way="SDPA", ratio=1.5),
        result("backward", [], reason="there is no room"),
        result("inner step", [2e-3] * 3, "inner", tokens=64, ratio=2.0),
        result("TTT-E2E", [2e-3] * 3, **step, ratio=1.6, mfu=0.4, peak_bytes=2**30),
        result("same model, no inner steps", [1e-3] * 3, **step, ratio=1.0, mfu=0.5),
        result("fp8", [1e-3] * 3, "meta", operation="prefix", tokens=64, ratio=0.8),
        result("prefill", [0.5] * 3, **latency),
        result("decode a token", [2e-3] * 3, extra={"chunk": 8.0}, **latency),
    ]
    return Report(about=about, results=rows)


def test_a_report_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(report().to_json())
    assert read_report(path).results == report().results
    raw = json.loads(path.read_text())["results"][0]
    assert raw["median"] == 2e-3
    assert raw["seconds"] == [1e-3, 2e-3, 4e-3]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0, "about": {}, "results": []}', "null"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bench\.json"):
        read_report(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_tables_say_what_was_found_and_what_was_not():
    text = as_markdown(report())
    assert "| forward | ttt_kernels | 2 ms | ±38% | 2 TFLOP/s | 50% | - |" in text
    assert "| backward | ttt_kernels | skipped |" in text
    assert "there is no room" in text
    assert "| TTT-E2E | 2 ms | ±0.0% | 1.60 | 32,000 | 40% | - | 1 GiB |" in text
    assert "| SWA | 500 ms | 128 | 2 ms | ±0.0% | - | 2 ms | - |" in text
    assert "| fp8 | 1 ms | ±0.0% | 0.80 | 64,000 | - | - |" in text
    titles = [table.title.partition(",")[0] for table in tables_of(report())]
    assert titles == [
        "attention",
        "Inner step",
        "Meta step",
        "Prefix",
        "Latency of a streaming session",
    ]


def test_a_mean_token_has_its_share_of_the_step():
    decode = result("decode a token", [1e-3], extra={"chunk": 10.0})
    assert mean_token(decode, result("with a step", [6e-3])) == pytest.approx(1.5e-3)
    assert mean_token(decode, None) == 1e-3


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (12.34, "12.3 s"), (0.1234, "123 ms"), (5e-6, "5 µs")]
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text


def test_comparisons_mark_other_devices():
    same = compare(report(scale=2.0), report())
    assert same.rows[1][3:] == ("6 ms", "2.00")
    assert not same.note
    assert len(same.rows) == 8
    assert "DIFFERENT DEVICES" in compare(report(device="another"), report()).note
    assert "no case" in compare(report(), Report(about=report().about)).note


def test_a_picture_is_drawn_of_what_there_is(tmp_path):
    picture = tmp_path / "bench.png"
    assert draw(report(), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not draw(Report(about=report().about), picture)
