"""A trained model's meta-gradient in float8 beside float64's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import ttt_kernels
from ttt_kernels import CurrentScaling, DelayedScaling
from ttt_megatron.config import RunConfig
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.validation import validation_sequences
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.float8 import Float8Product, float8_layers
from ttt_megatron.training.checkpoint_folder import read_config, resolve_checkpoint
from ttt_megatron.training.weights import read_weights

GROUPS = {
    "prime MLP": ("prime_mlp.",),
    "attention": ("self_attention.linear",),
    "MLP": (".mlp.linear",),
    "embedding, head": ("embedding", "output_layer"),
    "norms": ("norm",),
}
"""Kinds of parameters by what their names hold."""
BOUND = 0.99
"""Least cosine of the whole meta-gradient to float64's."""

Gradients = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor]


class OneScale(Float8Product):
    """Value and tangent with one scale, as twice the tokens of one tensor: what is not done."""

    def pair(
        self,
        pair: Tensor,
        weight: Tensor,
        primal: Tensor | None = None,
        dot_adjoint: Tensor | None = None,
    ) -> Tensor:
        """As the base class."""
        return ttt_kernels.fp8_linear(pair, weight, self.scaling, self.rounded(weight))


def _current(layer: nn.Module) -> nn.Module:
    return Float8Product(CurrentScaling())


def _row(layer: nn.Module) -> nn.Module:
    return Float8Product(CurrentScaling(rowwise=True))


def _delayed(layer: nn.Module) -> nn.Module:
    return Float8Product(DelayedScaling(steps=16))


def _shared(layer: nn.Module) -> nn.Module:
    return OneScale(CurrentScaling())


Make = Callable[[nn.Module], nn.Module] | None
SMALL = 2.0**-12
"""As if the loss were a mean over as many more chunks and micro-batches: tangents are smaller."""
WAYS: dict[str, tuple[torch.dtype, Make, float]] = {
    "fp32": (torch.float32, None, 1.0),
    "bf16": (torch.bfloat16, None, 1.0),
    "tensor-current": (torch.float32, _current, 1.0),
    "tensor-delayed": (torch.float32, _delayed, 1.0),
    "row-current": (torch.float32, _row, 1.0),
    "tensor-current-bf16": (torch.bfloat16, _current, 1.0),
    "tensor-delayed-bf16": (torch.bfloat16, _delayed, 1.0),
    "row-current-bf16": (torch.bfloat16, _row, 1.0),
    "one-scale": (torch.float32, _shared, 1.0),
    "tensor-current-small": (torch.float32, _current, SMALL),
    "one-scale-small": (torch.float32, _shared, SMALL),
}
"""Dtype of the rest, products, and what the loss is multiplied by."""
COMPARED = ("one-scale", "one-scale-small")
"""Ways that the bound is not for."""


def cosine(found: Gradients, expected: Gradients) -> float:
    """Of all entries together."""
    a, b = (torch.cat([g[name].double().flatten() for name in expected]) for g in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))


def _gradients(learner: Learner, batch: Batch, scale: float = 1.0) -> Gradients:
    (learner(*batch).loss * scale).backward()
    found = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad()
    return found


def _learner(config: RunConfig, weights: Gradients, compute: torch.dtype, make: Make) -> Learner:
    dtype = torch.float64 if compute == torch.float64 else torch.float32
    learner = Learner(config.model, config.inner, dtype=dtype, compute_dtype=compute, float8=make)
    learner.load_state_dict(weights)
    return learner


def print_cosines(run: Path, data: Path, sequences: int) -> int:
    """The table, way by way; 1 if the whole gradient of a float8 way is below the bound.

    Delayed scales come from one step on as many other held-out sequences.
    """
    checkpoint = resolve_checkpoint(run)
    config, weights = read_config(checkpoint), read_weights(checkpoint)
    # Inner steps as at the end of training: fully warmed.
    config = replace(config, inner=replace(config.inner, lr_start=config.inner.lr))
    rows = validation_sequences(
        open_dataset(str(data), "validation"), config.data.sequence_length, 2 * sequences
    )
    batches = [rows.batch(first, sequences) for first in (0, sequences)]
    batch, before = ((one.tokens, one.targets, one.mask) for one in batches)
    expected = _gradients(_learner(config, weights, torch.float64, None), batch)
    groups = {
        group: [name for name in expected if any(part in name for part in parts)]
        for group, parts in GROUPS.items()
    }
    print(f"{'way':20} {'all':>9} " + " ".join(f"{group:>15}" for group in groups))
    missed = []
    for way, (compute, make, scale) in WAYS.items():
        learner = _learner(config, weights, compute, make)
        if make is _delayed:
            _gradients(learner, before)
            for layer in float8_layers(learner.model).values():
                layer.float8.scaling.advance()
        found = _gradients(learner, batch, scale)
        whole = cosine(found, expected)
        cells = [
            cosine({n: found[n] for n in names}, {n: expected[n] for n in names})
            for names in groups.values()
        ]
        print(f"{way:20} {whole:9.6f} " + " ".join(f"{cell:15.6f}" for cell in cells), flush=True)
        if way not in COMPARED and whole < BOUND:
            missed.append(way)
    for way in missed:
        print(f"{way}: below the bound of {BOUND}")
    return int(bool(missed))
