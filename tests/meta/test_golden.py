"""Every figure of the golden files, by engine, oracle and trainer, in both precisions."""

from pathlib import Path

import pytest
import torch
from check_golden import BOUNDS, check_file
from golden import read_golden

from ttt_megatron.errors import UserError

FOLDER = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["A", "B", "C", "F", "G1", "G2", "H"])
def test_within_bounds(name, dtype):
    golden = read_golden(FOLDER / f"{name}.npz")
    rows = list(check_file(golden, dtype))
    assert len(rows) > 20
    beyond = [row for row in rows if not row[2] <= BOUNDS[dtype]]
    assert not beyond


def test_a_wrong_gradient_is_noticed():
    golden = read_golden(FOLDER / "A.npz")
    golden.arrays["g/blocks.wq"] = golden.arrays["g/blocks.wq"] * (1 + 1e-8)
    beyond = [row for row in check_file(golden, torch.float64) if not row[2] <= 1e-10]
    assert {quantity for _, quantity, _ in beyond} == {
        f"g/layers.{i}.self_attention.linear_qkv.weight" for i in range(4)
    }


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.npz"
    path.write_text("no archive")
    with pytest.raises(UserError, match=r"other\.npz: not a golden file"):
        read_golden(path)
