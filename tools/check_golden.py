"""Compare the engine and the oracle with golden files, in float64 and float32.

    python tools/check_golden.py tests/golden/*.npz

Prints the worst error of every quantity, relative to the largest entry of its array; exits with
status 1 if one is beyond its bound (1e-10 in float64, 1e-5 in float32).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from golden import Golden, build_learner, fast_to_golden, read_golden, to_ours
from torch import Tensor

from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.oracle import oracle

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
Figures = dict[str, Tensor]


def engine_figures(golden: Golden, learner: Learner) -> tuple[Figures, Figures]:
    """Loss quantities and meta-gradients of the engine."""
    batch = golden.batch()
    output = learner(*batch, golden.inner_lr)
    output.loss.backward()
    gradients = {n: p.grad for n, p in learner.model.named_parameters() if p.grad is not None}
    last = golden.arrays["chunk_loss"].shape[1] - 1
    with torch.no_grad():
        ends = learner(*batch, golden.inner_lr, final_step=True, logits_of=(0, last))
        x = learner.model.embed(batch[0], learner.compute_dtype)
        rotation = learner.model.rotations(0, batch[0].shape[1], x)
        prefix_out = learner.model.prefix_blocks(x, rotation)
    figures = {
        "loss": output.loss.detach(),
        "seq_loss": output.chunk_losses.mean(1),
        "chunk_loss": output.chunk_losses,
        "token_nll": output.token_nll,
        "eval_loss": ends.loss,
        "logits_first_chunk": ends.logits[0],
        "logits_last_chunk": ends.logits[last],
    }
    if golden.is_meta:
        figures |= {"prefix_out": prefix_out, "inner_gnorm": ends.inner_grad_norms}
        figures |= {f"fast/{k}": v for k, v in fast_to_golden(ends.fast_weights).items()}
    return figures, gradients


def oracle_figures(golden: Golden, learner: Learner) -> tuple[Figures, Figures]:
    """The same of the oracle."""
    batch = golden.batch()
    result = oracle(learner.model, *batch, learner.settings(golden.inner_lr, batch[0].shape[1]))
    result.loss.backward()
    gradients = {n: p.grad for n, p in learner.model.named_parameters() if p.grad is not None}
    figures = {
        "loss": result.loss,
        "seq_loss": result.chunk_losses.mean(1),
        "chunk_loss": result.chunk_losses,
        "token_nll": result.token_nll,
        "logits_first_chunk": result.logits[0],
        "logits_last_chunk": result.logits[-1],
        "prefix_out": result.prefix_output,
        "inner_gnorm": result.gradient_norms,
    }
    figures |= {f"fast/{k}": v for k, v in fast_to_golden(result.fast).items()}
    return {k: v.detach() for k, v in figures.items()}, gradients


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-300))


def expected_figure(golden: Golden, name: str, actual: Tensor) -> Tensor:
    """The golden array a figure is held against."""
    expected = golden.tensor("loss" if name == "eval_loss" else name)
    if name.startswith("logits") and actual.shape != expected.shape:
        rows = expected.shape[1]
        raise UserError(f"{golden.name}: {name} has {rows} tokens where {actual.shape[1]} came out")
    return expected


def compare(
    golden: Golden, figures: Figures, gradients: Figures, learner: Learner
) -> Iterator[tuple[str, float]]:
    """(quantity, error) of everything the file holds."""
    for name, actual in figures.items():
        if name.startswith("logits") and not golden.is_meta:
            rows = golden.arrays[name].shape[1]
            actual = actual[:, :rows] if "first" in name else actual[:, -rows:]
        yield name, relative_error(actual, expected_figure(golden, name, actual))
    theirs = {k[2:]: golden.tensor(k) for k in golden.arrays if k.startswith("g/")}
    ours = to_ours(theirs, learner)
    missing = ours.keys() - gradients.keys()
    if missing:
        yield f"g/{min(missing)} (none)", float("inf")
    for name in ours.keys() & gradients.keys():
        yield f"g/{name}", relative_error(gradients[name], ours[name])


def outer_errors(golden: Golden, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Three AdamW steps of the trainer's own optimizer, where the file holds them."""
    from outer_steps import run_outer_steps

    yield from run_outer_steps(golden, build_learner(golden, dtype))


def check_file(golden: Golden, dtype: torch.dtype) -> Iterator[tuple[str, str, float]]:
    """(computed by, quantity, error) of one file in one precision."""
    ways: list[tuple[str, Callable[[Golden, Learner], tuple[Figures, Figures]], dict]] = [
        ("engine", engine_figures, {})
    ]
    if golden.is_meta:
        variants: list[dict] = [
            {"memory_policy": "save_activations"},
            {"memory_policy": "save_all"},
            {"two_level": True},
        ]
        ways += [("engine/" + "".join(map(str, v.values())), engine_figures, v) for v in variants]
        ways.append(("oracle", oracle_figures, {}))
    for way, function, inner in ways:
        learner = build_learner(golden, dtype, **inner)
        for quantity, error in compare(golden, *function(golden, learner), learner):
            yield way, quantity, error
    if "outer/loss_0" in golden.arrays:
        for quantity, error in outer_errors(golden, dtype):
            yield "trainer", quantity, error


def summarise(rows: list[tuple[str, str, float]]) -> Iterator[tuple[str, str, str, float]]:
    """Worst error by way and group of quantities, with the quantity it was found in."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for way, quantity, error in rows:
        group = quantity.split("/")[0] if quantity[:2] in ("g/", "ou") else quantity
        key = (way, {"g": "meta-gradients"}.get(group, group))
        if key not in worst or not error <= worst[key][0]:
            worst[key] = (error, quantity)
    for (way, group), (error, quantity) in worst.items():
        yield way, group, quantity if quantity != group else "", error


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="golden .npz files")
    failures = 0
    try:
        for path in parser.parse_args().files:
            golden = read_golden(path)
            for dtype, bound in BOUNDS.items():
                rows = list(check_file(golden, dtype))
                print(f"\n{golden.name}  {str(dtype)[6:]}  (bound {bound:g})")
                for way, group, quantity, error in summarise(rows):
                    ok = error <= bound
                    failures += not ok
                    mark = "" if ok else "   BEYOND THE BOUND"
                    print(f"  {way:24s} {group:20s} {error:9.1e}  {quantity}{mark}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{'all within bounds' if not failures else f'{failures} beyond bounds'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
