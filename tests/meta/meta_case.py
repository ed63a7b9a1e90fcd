"""Tiny learners and batches on which second-order errors are large."""

import torch
from torch import Tensor

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.oracle import OracleResult, oracle

SHAPE = {
    "vocab_size": 19,
    "num_layers": 4,
    "num_suffix_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 12,
    "window_size": 7,
    "init_std": 0.3,
}
INNER = {"chunk_size": 4, "lr": 0.7, "clip": 2.0}


def learner(model: dict | None = None, inner: dict | None = None, **settings) -> Learner:
    """A float64 learner; `model` and `inner` replace single settings."""
    return Learner(
        ModelConfig(**(SHAPE | (model or {}))),
        InnerConfig(**(INNER | (inner or {}))),
        **({"dtype": torch.float64} | settings),
    )


def batch(length: int = 24, size: int = 3, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and an uneven mask [size, length]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(19, (size, length + 1), generator=generator)
    mask = torch.rand(size, length, generator=generator) > 0.2
    return rows[:, :-1], rows[:, 1:], mask


def gradients(model: Learner) -> dict[str, Tensor]:
    """All gradients by name; every parameter must have one."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def engine_gradients(model: Learner, data: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of the engine's loss."""
    model(*data).loss.backward()
    return gradients(model)


def oracle_gradients(
    model: Learner, data: tuple[Tensor, Tensor, Tensor]
) -> tuple[OracleResult, dict[str, Tensor]]:
    """The oracle's result and gradients."""
    settings = model.settings(model.inner.lr, data[0].shape[1])
    result = oracle(model.model, *data, settings)
    result.loss.backward()
    return result, gradients(model)


def worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any array, relative to its largest entry."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-12))
        for n in expected
    )
