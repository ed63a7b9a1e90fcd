"""`ttt-megatron bench`."""

import json

import pytest

from ttt_megatron.cli.main import main

RECIPE = """
name: mini
model: {vocab_size: 40, num_layers: 2, num_suffix_layers: 1, hidden_size: 16, num_heads: 2,
  ffn_hidden_size: 24, window_size: 16}
inner: {chunk_size: 8}
data: {sequence_length: 16}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_a_report_is_printed_and_written(recipe, tmp_path, capsys):
    output = tmp_path / "results"
    arguments = ["bench", "--device", "cpu", "--recipe", recipe, "--lengths", "16"]
    arguments += ["--repeats", "1", "--step-repeats", "1", "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    for words in (
        "pair backward",
        "Inner step",
        "Meta step",
        "Latency",
        "mini, 16 tokens",
        "cases: ",
    ):
        assert words in printed.out
    assert "s left)" in printed.err
    written = json.loads((output / "bench.json").read_text())
    assert {row["section"] for row in written["results"]} == {"kernels", "inner", "meta", "latency"}
    assert not [row for row in written["results"] if row["status"] == "failed"]
    assert written["about"]["ceilings"]["flops"]["fp32"] > 1e8
    assert "Meta step" in (output / "bench.md").read_text()
    assert sorted(p.name for p in output.iterdir()) == ["bench.json", "bench.md", "bench.png"]

    again = ["bench", "--device", "cpu", "--recipe", recipe, "--only", "inner"]
    again += ["--step-repeats", "1", "--compare", str(output / "bench.json")]
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert "now / then" in printed
    assert "Meta step" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kernels,speed"], "--only speed: the sections are kernels, inner"),
        (["--only", ","], "--only names nothing"),
        (["--sizes", "7b"], "--sizes 7b: the sizes are 125m"),
        (["--lengths", "1000"], "no multiple of the 1024 tokens of a chunk of 125m"),
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device"),
        (["--repeats", "0"], "--repeats 0"),
        (["--budget", "-1"], "--budget -1"),
        (["--small", "--sizes", "125m"], "give one of them"),
        (["--precision", "int4"], "--precision int4: the precisions are"),
        (["--recipe", "none.yaml"], "none.yaml: there is no such recipe"),
        (["--compare", "none.json"], "none.json cannot be read"),
        (["--output", __file__], "that is a file"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_gpu_without_float8_is_refused_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "an older GPU")
    assert main(["bench", "--device", "cuda", "--small", "--precision", "bf16", "fp8"]) == 2
    error = capsys.readouterr().err
    assert "fp8" in error
    assert len(error.strip().splitlines()) == 1
