"""Compare the engine, the oracle and the trainer with golden files, in float64 and float32.

    python tools/check_golden.py tests/golden/*.npz
    python tools/check_golden.py --device cuda tests/golden/*.npz

Prints the worst error of every quantity, relative to the largest entry of its array; exits with
status 1 if one is beyond its bound (1e-10 in float64, 1e-5 in float32; on CUDA, whose exponentials
are rougher, 5e-5). The trainer is checked on the CPU, where megatron-core is installed.
"""

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from golden import Golden, build_learner, read_golden, to_ours
from golden_figures import Figures, engine_figures, oracle_figures, trainer_figures
from torch import Tensor

from ttt_megatron.errors import UserError

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
CUDA_BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-5}
VARIANTS: dict[str, dict[str, object]] = {
    "recompute": {},
    "save_act": {"memory_policy": "save_activations"},
    "save_all": {"memory_policy": "save_all"},
    "two_level": {"two_level": True},
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-300))


def expected_figures(golden: Golden, computed: Figures, own_names: Figures) -> Figures:
    """The file's arrays in the layout of what was computed; absent quantities are missing."""
    expected = dict(own_names)
    for name in computed:
        stored = "loss" if name == "eval_loss" else name
        if not name.startswith("g/") and stored in golden.arrays:
            expected[name] = golden.tensor(stored)
    return expected


def errors(computed: Figures, expected: Figures) -> Iterator[tuple[str, float]]:
    """(quantity, error) of everything expected; infinite for what was not computed."""
    for name, value in expected.items():
        actual = computed.get(name)
        if actual is not None and name.startswith("logits") and actual.shape != value.shape:
            rows = value.shape[1]
            actual = actual[:, :rows] if "first" in name else actual[:, -rows:]
        yield name, float("inf") if actual is None else relative_error(actual, value)


def check_file(
    golden: Golden, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, str, float]]:
    """(computed by, quantity, error) of one file in one precision."""
    gradients = {k[2:]: golden.tensor(k) for k in golden.arrays if k.startswith("g/")}
    ways = VARIANTS if golden.is_meta else {"engine": {}}
    for way, inner in [*ways.items(), ("oracle", {})]:
        learner = build_learner(golden, dtype, **inner).to(device)
        own_names = {f"g/{k}": v for k, v in to_ours(gradients, learner).items()}
        compute = oracle_figures if way == "oracle" else engine_figures
        computed = {name: value.cpu() for name, value in compute(golden, learner).items()}
        for quantity, error in errors(computed, expected_figures(golden, computed, own_names)):
            yield way, quantity, error
    if "outer/loss_0" in golden.arrays and device == "cpu" and find_spec("megatron"):
        for quantity, error in errors(*trainer_figures(golden, dtype)):
            yield "trainer", quantity, error


def group_of(quantity: str) -> str:
    """The row a quantity is printed in."""
    if quantity.startswith("g/"):
        return "meta-gradients"
    parts = quantity.split("/")
    return "/".join(parts[:2]) if parts[0] in ("outer", "fast") else parts[0]


def print_table(rows: list[tuple[str, str, float]], bound: float) -> int:
    """Worst error by quantity (down) and way (across); returns the number beyond the bound."""
    ways = list(dict.fromkeys(way for way, _, _ in rows))
    worst: dict[tuple[str, str], float] = {}
    failures = 0
    for way, quantity, error in rows:
        key = (group_of(quantity), way)
        worst[key] = max(worst.get(key, 0.0), error)
        if not error <= bound:
            failures += 1
            print(f"  BEYOND THE BOUND: {way} {quantity} {error:.1e}")
    print(f"  {'':24s}" + "".join(f"{way:>11s}" for way in ways))
    for group in dict.fromkeys(group for group, _ in worst):
        cells = (worst.get((group, way)) for way in ways)
        print(f"  {group:24s}" + "".join(" " * 11 if c is None else f"{c:11.1e}" for c in cells))
    return failures


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="golden .npz files")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    arguments = parser.parse_args()
    failures = 0
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
        for path in arguments.files:
            golden = read_golden(path)
            bounds = CUDA_BOUNDS if arguments.device == "cuda" else BOUNDS
            for dtype, bound in bounds.items():
                print(f"\n{golden.name}  {str(dtype)[6:]}  (bound {bound:g})")
                rows = list(check_file(golden, dtype, arguments.device))
                failures += print_table(rows, bound)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{'all within bounds' if not failures else f'{failures} beyond bounds'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
