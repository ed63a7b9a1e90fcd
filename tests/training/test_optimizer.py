"""The outer optimizer against the official implementation and against AdamW written out."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ttt_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.model.decay import undecayed
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.parallel.replica import replicate
from ttt_megatron.training.optimizer import OuterOptimizer, build_optimizer
from ttt_megatron.training.passes import forward_backward

ROOT = Path(__file__).parents[2]
SHAPE = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, ffn_hidden_size=8)


def test_three_steps_of_the_official_implementation() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from golden import build_learner, read_golden, to_ours

    golden = read_golden(ROOT / "tests" / "golden" / "A.npz")
    learner = build_learner(golden, torch.float64)
    config = OptimizerConfig(lr=4e-4, end_lr=1e-5, warmup_fraction=0.1)
    with process_groups() as groups:
        chunks = replicate([learner], learner.model.config, ParallelConfig())
        optimizer = build_optimizer(chunks, config, total_steps=10)
        for step in range(3):
            tokens, targets, mask = golden.batch(f"_{step}")
            rows = torch.arange(len(tokens))
            batch = Batch(tokens, targets, mask, rows, torch.zeros(len(tokens), 2))
            optimizer.zero_grad()
            # Two micro-batches of one sequence: their gradients' mean is wanted.
            measured = forward_backward(chunks, batch.split(1), golden.inner_lr, groups)
            update = optimizer.step(step)
            loss = sum(float(one["loss"]) for one in measured) / len(measured)
            assert loss == pytest.approx(golden.arrays[f"outer/loss_{step}"].item(), rel=1e-10)
            logged = golden.arrays[f"outer/gnorm_logged_{step}"].item()
            assert math.sqrt(update.grad_norm**2 + 1e-5) == pytest.approx(logged, rel=1e-10)
        wanted = {k[8:]: golden.tensor(k) for k in golden.arrays if k.startswith("outer/w/")}
        ours = learner.model.state_dict()
        for name, value in to_ours(wanted, learner).items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-10 * value.abs().max())


def _net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def _gradients(net: nn.Module, optimizer: OuterOptimizer, inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    net(inputs).square().sum().backward()
    net.finish_grad_sync()


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_reaches_the_parameters_it_should(decay: str) -> None:
    config = OptimizerConfig(lr=0.1, warmup_fraction=0.0, weight_decay=0.5, decay=decay)
    with process_groups():
        net = _net(torch.float32)
        net[2].weight = undecayed(net[2].weight.detach())
        before = [p.detach().clone() for p in net.parameters()]
        [ddp] = replicate([net], SHAPE, ParallelConfig())
        optimizer = build_optimizer([ddp], config, total_steps=10)
        _gradients(ddp, optimizer, torch.zeros(1, 7))
        for parameter in ddp.parameters():
            parameter.main_grad.zero_()
        optimizer.step(0)
        for old, new in zip(before, net.parameters(), strict=True):
            factor = 0.95 if decay == "all" or old.ndim == 2 else 1.0
            factor = 1.0 if new is net[2].weight else factor
            torch.testing.assert_close(new.detach(), old * factor)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    with process_groups():
        net = _net(torch.float32)
        [ddp] = replicate([net], SHAPE, ParallelConfig())
        optimizer = build_optimizer([ddp], OptimizerConfig(warmup_fraction=0.0), total_steps=10)
        _gradients(ddp, optimizer, torch.ones(2, 7))
        assert optimizer.step(0).applied
        before = [p.detach().clone() for p in net.parameters()]
        _gradients(ddp, optimizer, torch.full((2, 7), math.inf))
        update = optimizer.step(1)
        assert not update.applied
        assert not math.isfinite(update.grad_norm)
        for old, new in zip(before, net.parameters(), strict=True):
            assert torch.equal(old, new)
        _gradients(ddp, optimizer, torch.ones(2, 7))
        assert optimizer.step(2).applied
        assert all(torch.isfinite(p).all() for p in net.parameters())
