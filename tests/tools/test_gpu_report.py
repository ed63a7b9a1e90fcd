"""tools/gpu_report.sh where there is no GPU, and the tables that are made of its results."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_tables
import pytest
from gpu_targets import NOT_MEASURED, targets_of

from ttt_megatron.bench.results import Report, Result, read_report

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
ABOUT = {
    "device": "a GPU",
    "date": "2026-01-01",
    "torch": "2",
    "python": "3",
    "packages": {},
    "commit": None,
    "command": "ttt-megatron bench",
    "backend": "triton",
    "ceilings": {"flops": {"bf16": 1e14}, "bytes_per_second": 1e12, "source": "a test"},
}


def report_script(*arguments, timeout=60):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "tools" / "gpu_report.sh", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def result(operation, name, seconds, shape="125m, 8,192 tokens", precision="bf16", **settings):
    section = "kernels" if operation == "attention" else "meta"
    common = {"section": section, "way": "ttt_kernels", "status": "measured"}
    place = {"operation": operation, "shape": shape, "precision": precision}
    return Result(name=name, seconds=[seconds], **{**common, **place, **settings})


RESULTS = [
    result("attention", "forward", 1.0, "1,024 tokens behind 8,191 cached keys", floor=0.65),
    result("attention", "forward", 1.0, "8,192 tokens", floor=0.55),
    result("attention", "forward", 0.5, "8,192 tokens", floor=0.6, way="SDPA flash"),
    result("step", "TTT-E2E", 1.9, ratio=1.9),
    result("step", "TTT-E2E, CUDA graphs", 1.7, ratio=1.7),
    result("step", "TTT-E2E", 1.9, "760m, 8,192 tokens", ratio=1.9),
    result("prefix", "fp8", 0.8, precision="bf16 fp8", ratio=0.8),
    result("step", "TTT-E2E", 1.0, "125m, 131,072 tokens"),
    result("step", "full attention", 3.0, "125m, 131,072 tokens"),
    result("step", "full attention, SDPA", 1.5, "125m, 131,072 tokens"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch finds no CUDA device here"),
        (["--cpu"], "--cpu: the options are"),
        (["--seconds", "0"], "--seconds '0': give a whole number above 0"),
        (["--work"], "--work names no folder"),
    ],
)
def test_what_cannot_begin_is_said_in_a_sentence(arguments, message):
    before = DOCUMENT.read_bytes()
    done = report_script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert DOCUMENT.read_bytes() == before


@pytest.mark.slow
def test_parts_that_run_out_of_time_leave_a_report(tmp_path):
    done = report_script("--rehearse", "--seconds", "6", "--work", tmp_path)
    assert done.returncode == 1
    assert "6 of the parts did not pass" in done.stdout
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert text.count("| out of time |") == 6
    assert NOT_MEASURED in text


@pytest.mark.slow
def test_the_rehearsal_fills_in_every_table(tmp_path):
    before = DOCUMENT.read_bytes()
    done = report_script("--rehearse", "--seconds", "1200", "--work", tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert text.count("| passed |") == 6
    for part, title in gpu_tables.PARTS.items():
        assert f"### {title}" in text
        folder = tmp_path / "docs" / "benchmarks" / "rehearsal"
        assert read_report(folder / f"{part}.json").results
        assert (folder / f"{part}.png").exists()
    assert DOCUMENT.read_bytes() == before


def test_targets_are_held_against_what_was_measured():
    found = {(one.what, one.measured): one.verdict for one in targets_of(RESULTS)}
    assert found["attention, forward, bf16: 1,024 tokens behind 8,191 cached keys", "65%"] == "yes"
    assert found["attention, forward, bf16: 8,192 tokens", "55%"] == "no"
    steps = "meta step over plain step, {} at 8K, {}"
    assert found[steps.format("125m", "bf16"), "1.70 (TTT-E2E, CUDA graphs)"] == "yes"
    assert found[steps.format("760m", "bf16"), "1.90 (TTT-E2E)"] == "no"
    assert found["prefix, fp8 over bf16, 125m at 8K", "1.25"] == "yes"
    over_full = [pair for pair in found.items() if "full attention" in pair[0][0]]
    assert [(what[1], verdict) for what, verdict in over_full] == [("1.50", "no")]
    left = [what for what, measured in found if measured == NOT_MEASURED]
    assert len(left) == len(found) - 6


def test_a_document_gets_the_tables_and_keeps_the_rest(tmp_path, capsys, monkeypatch):
    document, folder = tmp_path / "docs.md", tmp_path / "results"
    document.write_text(f"before\n{gpu_tables.BEGIN}\nold\n{gpu_tables.END}\nafter\n")
    folder.mkdir()
    (folder / "steps.json").write_text(Report(about=ABOUT, results=RESULTS[3:]).to_json())
    (folder / "checks.tsv").write_text("tests\tfailed\t12\t1 failed\n")
    monkeypatch.setattr(sys, "argv", ["", str(document), "--results", str(folder)])
    assert gpu_tables.main() == 0
    text = document.read_text()
    assert text.startswith(f"before\n{gpu_tables.BEGIN}\n")
    assert text.endswith(f"\n{gpu_tables.END}\nafter\n")
    assert "old" not in text
    assert "| tests | failed | 12 | 1 failed |" in text
    assert "| prefix, fp8 over bf16, 125m at 8K | ≥ 1.2 times as fast | 1.25 | yes |" in text
    assert "![Meta steps](results/steps.png)" in text
    assert "4 of 11 targets measured" in capsys.readouterr().out
    assert gpu_tables.main() == 0
    assert document.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.md"], "none.md does not exist"),
        (["plain.md"], "plain.md has no line <!-- gpu:begin --> before"),
        (["plain.md", "--results", "none"], "--results none: there is no such folder"),
    ],
)
def test_other_documents_are_refused(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain.md").write_text(f"{gpu_tables.END} {gpu_tables.BEGIN}")
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    assert gpu_tables.main() == 2
    assert message in capsys.readouterr().err


def test_every_target_stands_in_the_document():
    text = DOCUMENT.read_text()
    for target in targets_of([]):
        assert target.what in text
