"""The command that holds a layout to one process, and its exit status."""

from pathlib import Path

import numpy as np
import pytest
from check_parallel import BOUND, check, main, parser
from parallel_layouts import all_layouts

from ttt_megatron.config.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden" / "A.npz"


def test_a_layout_agrees_with_one_process(capsys):
    assert main(["--data", "2"]) == 0
    printed = capsys.readouterr().out
    for quantity in ("losses of tokens", "fast weights", "outer gradients", "Adam's moments"):
        assert quantity in printed
    assert printed.endswith("all within the bound\n")


def test_a_difference_to_the_golden_file_is_told(tmp_path, capsys):
    """A change of one part in ten million, in one array."""
    with np.load(GOLDEN, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    arrays["fast/w2"] = arrays["fast/w2"] * (1 + 1e-7)
    changed = tmp_path / "changed.npz"
    np.savez(changed, **arrays)
    assert main(["--golden", str(changed)]) == 1
    alone, golden = capsys.readouterr().out.split(f"against {changed}")
    assert "BEYOND" not in alone
    assert [row.split("  ")[1] for row in golden.splitlines() if "BEYOND" in row] == [
        "fast weights"
    ]
    assert "linear_fc2" in golden.split("fast weights")[1].splitlines()[0]
    for quantity in ("losses of the steps", "outer gradients", "parameters"):
        assert quantity in golden


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--context", "2", "--pipeline", "2", "--schedule", "zigzag"], "takes whole models"),
        (["--schedule", "interleaved"], "needs pipeline-parallel processes"),
        (["--pipeline", "2", "--schedule", "interleaved", "--micro-batches", "3"], "in groups of"),
        (["--tensor", "3", "--golden", str(GOLDEN)], "does not divide model.num_heads = 4"),
        (["--tensor", "2", "--golden", str(GOLDEN.with_stem("B"))], "model.vocab_size = 97"),
        (["--data", "0"], "must be greater than 0"),
        (["--golden", "nowhere.npz"], "not a golden file"),
    ],
)
def test_an_impossible_layout_is_refused_in_a_sentence(arguments, reason, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert reason in printed.err
    assert printed.err.count("\n") == 1


def test_help_has_examples():
    shown = parser().format_help()
    assert "--context 2 --schedule zigzag --golden" in shown


def test_every_layout_of_the_list_is_one_a_recipe_can_have():
    for name, kind in all_layouts().items():
        validate(kind.config, name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_products_agree_with_one_process_and_the_golden_file(size):
    kinds = {n: k for n, k in all_layouts().items() if k.parallel.world_size == size}
    assert len(kinds) > 1
    for one in check(kinds, GOLDEN):
        assert one.golden is not None
        for errors in (one.alone, one.golden):
            name, error = max(errors.items(), key=lambda item: item[1])
            assert error < BOUND, (one.name, name, error)
