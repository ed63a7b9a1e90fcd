"""The output head and its cross-entropy, on tensors and on pairs; logits are never all stored.

On a pair, with per-token weights A of the loss and B of its directional derivative, z = hMᵀ,
ż = ḣMᵀ, p = softmax(z):

    S = Σ A·nll + B·(⟨p, ż⟩ − ż_t)
    z̄ = A (p − 1_t) + B p∘(ż − ⟨p, ż⟩)          ż̄ = B (p − 1_t)

On CUDA, but in float64, tiles of the vocabulary run through matrix products with Triton kernels
between them (`triton_path`), elsewhere tiles of tokens through PyTorch (`torch_path`).
"""

from types import ModuleType

import torch
from torch import Tensor

from ttt_kernels.arguments import (
    check_axes,
    check_device,
    check_floats,
    check_pair,
    check_shape,
)
from ttt_kernels.deferred import receiver
from ttt_kernels.linear_cross_entropy import torch_path
from ttt_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from ttt_kernels.linear_cross_entropy.shard import WHOLE, VocabularyShard
from ttt_kernels.mode import uses_plain_definitions
from ttt_kernels.triton_launch import suits_triton


def _path(hidden: Tensor, weight: Tensor) -> ModuleType:
    if not suits_triton(hidden, weight):
        return torch_path
    # Importing it takes Triton, which need not be installed where no kernel runs.
    from ttt_kernels.linear_cross_entropy import triton_path

    return triton_path


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: dict[str, Tensor], whole: bool
) -> None:
    """hidden [..., H] is one tensor, no pair; `whole` says that weight is all of the vocabulary."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[-1]}] for hidden states of width"
            f" {hidden.shape[-1]}, and its shape is {list(weight.shape)}."
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, and are {targets.dtype}.")
    check_device("hidden", hidden, "targets", targets)
    for name, x in {"targets": targets, **weights}.items():
        check_shape(name, x, hidden.shape[:-1])
    # On a GPU looking would make the host wait; there the loss is NaN.
    if whole and targets.numel() and targets.device.type == "cpu":
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= len(weight):
            wrong = low if low < 0 else high
            raise ValueError(f"Target {wrong} is outside the vocabulary of {len(weight)}.")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    shard: VocabularyShard = WHOLE,
) -> tuple[Tensor, Tensor]:
    """(Σ_t token_weights_t · nll_t, nll) of the logits hidden @ weightᵀ.

    Shapes: hidden [..., H], weight [V, H], targets [...] int64, token_weights [...]; a scalar,
    differentiable in hidden and weight, and nll [...] for reports. Both float32, or float64 for
    float64 input; products are formed in hidden's dtype. Backward may run once. With a shard,
    weight is its part of the vocabulary, which may be empty, loss and nll are whole, and hidden's
    gradient is the shard's share.

    A target that no shard has is refused where weight is the whole vocabulary and on the CPU;
    elsewhere its nll is NaN. Raises ValueError or TypeError if the arguments do not fit together.
    """
    check_floats(hidden=hidden, weight=weight, token_weights=token_weights)
    check_axes("hidden", hidden, "[..., tokens, H]", 2)
    _check(hidden, weight, targets, {"token_weights": token_weights}, shard.largest is None)
    if uses_plain_definitions():
        return linear_cross_entropy_reference(hidden, weight, targets, token_weights)
    put_off = receiver(hidden, weight)
    loss, nll = _path(hidden, weight).LinearCrossEntropy.apply(
        hidden.flatten(0, -2),
        weight if put_off is None else weight.detach(),
        targets.flatten(),
        token_weights.flatten(),
        shard,
        torch.is_grad_enabled(),
        put_off,
    )
    return loss, nll.view(targets.shape)


def linear_cross_entropy_pair(
    pair: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    derivative_weights: Tensor,
    dot_adjoint: Tensor | None = None,
    shard: VocabularyShard = WHOLE,
) -> Tensor:
    """Σ_t loss_weights_t · nll_t + derivative_weights_t · (d nll_t along the pair's tangent).

    Shapes: pair [2, ..., H], weight [V, H], targets, loss_weights and derivative_weights [...];
    dot_adjoint [..., H] is the known cotangent of the tangent. Result: a scalar, differentiable
    in pair and weight. Backward may run once. Targets, shards and errors as in
    `linear_cross_entropy`.
    """
    check_floats(
        pair=pair,
        weight=weight,
        loss_weights=loss_weights,
        derivative_weights=derivative_weights,
        dot_adjoint=dot_adjoint,
    )
    check_pair("pair", pair, "[2, ..., tokens, H]", 3)
    weights = {"loss_weights": loss_weights, "derivative_weights": derivative_weights}
    _check(pair[0], weight, targets, weights, shard.largest is None)
    check_shape("dot_adjoint", dot_adjoint, pair.shape[1:])
    put_off = receiver(pair, weight)
    result: Tensor = _path(pair, weight).LinearCrossEntropyPair.apply(
        pair.flatten(1, -2),
        weight if put_off is None else weight.detach(),
        targets.flatten(),
        loss_weights.flatten(),
        derivative_weights.flatten(),
        None if dot_adjoint is None else dot_adjoint.flatten(0, -2),
        shard,
        put_off,
    )
    return result
