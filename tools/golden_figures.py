"""Computes what golden files hold: by the engine, by the oracle, by the trainer's optimizer."""

import math

import torch
from golden import Golden, build_learner, fast_to_golden, to_ours
from torch import Tensor

import ttt_kernels
from ttt_megatron.config.schema import OptimizerConfig, ParallelConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.oracle import oracle

Figures = dict[str, Tensor]


def _batch(golden: Golden, learner: Learner) -> tuple[Tensor, Tensor, Tensor]:
    """The file's batch on the learner's device."""
    tokens, targets, mask = golden.batch()
    device = learner.model.head_weight.device
    return tokens.to(device), targets.to(device), mask.to(device)


def _meta_gradients(learner: Learner) -> Figures:
    named = learner.model.named_parameters()
    return {f"g/{name}": p.grad for name, p in named if p.grad is not None}


def engine_figures(golden: Golden, learner: Learner) -> Figures:
    """Every quantity of a file, by the engine."""
    batch = _batch(golden, learner)
    output = learner(*batch, golden.inner_lr)
    output.loss.backward()
    last = golden.arrays["chunk_loss"].shape[1] - 1
    with torch.no_grad():
        ends = learner(*batch, golden.inner_lr, final_step=True, logits_of=(0, last))
        x = learner.model.embed(batch[0], learner.compute_dtype)
        rotation = learner.model.rotations(0, batch[0].shape[1], x)
        prefix_out = learner.model.prefix_blocks(x, rotation)
    assert ends.logits is not None
    figures = {
        "loss": output.loss.detach(),
        "eval_loss": ends.loss,
        "seq_loss": output.chunk_losses.mean(1),
        "chunk_loss": output.chunk_losses,
        "token_nll": output.token_nll,
        "logits_first_chunk": ends.logits[0],
        "logits_last_chunk": ends.logits[last],
    }
    if golden.is_meta:
        assert ends.inner_grad_norms is not None
        assert ends.fast_weights is not None
        figures |= {"prefix_out": prefix_out, "inner_gnorm": ends.inner_grad_norms}
        figures |= {f"fast/{k}": v for k, v in fast_to_golden(ends.fast_weights).items()}
    return figures | _meta_gradients(learner)


def oracle_figures(golden: Golden, learner: Learner) -> Figures:
    """The same by the plain definitions, reverse over reverse where there are inner steps."""
    if not golden.is_meta:
        with ttt_kernels.plain_definitions():
            return engine_figures(golden, learner)
    batch = _batch(golden, learner)
    result = oracle(learner.model, *batch, learner.settings(golden.inner_lr, batch[0].shape[1]))
    result.loss.backward()
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
    return {k: v.detach() for k, v in figures.items()} | _meta_gradients(learner)


def trainer_figures(golden: Golden, dtype: torch.dtype) -> tuple[Figures, Figures]:
    """(computed, expected) for the outer steps a file holds, by the trainer's own step."""
    # megatron-core is needed here alone: the engine can be checked where it is not installed.
    from ttt_megatron.parallel.groups import process_groups
    from ttt_megatron.parallel.replica import replicate
    from ttt_megatron.training.optimizer import build_optimizer
    from ttt_megatron.training.passes import forward_backward

    learner = build_learner(golden, dtype)
    start = {name: value.clone() for name, value in learner.model.state_dict().items()}
    config = OptimizerConfig(lr=4e-4, end_lr=1e-5, warmup_fraction=0.1)
    computed: Figures = {}
    expected: Figures = {}
    with process_groups() as groups:
        chunks = replicate([learner], learner.model.config, ParallelConfig())
        optimizer = build_optimizer(chunks, config, total_steps=10)
        for step in range(int(golden.config["outer_steps"])):
            tokens, targets, mask = golden.batch(f"_{step}")
            rows = torch.arange(len(tokens))
            batch = Batch(tokens, targets, mask, rows, torch.zeros(len(tokens), 2))
            optimizer.zero_grad()
            measured = forward_backward(chunks, [batch], golden.inner_lr, groups)
            update = optimizer.step(step)
            loss = float(measured[0]["loss"])
            computed[f"outer/loss_{step}"] = torch.tensor(loss, dtype=torch.float64)
            logged = math.sqrt(update.grad_norm**2 + 1e-5)
            computed[f"outer/gnorm_logged_{step}"] = torch.tensor(logged, dtype=torch.float64)
            rate = torch.tensor(update.learning_rate, dtype=torch.float64)
            computed[f"outer/lr_{step}"] = rate
        expected |= {name: golden.tensor(name) for name in computed}
    theirs = {k[8:]: golden.tensor(k) for k in golden.arrays if k.startswith("outer/w/")}
    state = learner.model.state_dict()
    for name, value in to_ours(theirs, learner).items():
        computed[f"outer/w/{name}"], expected[f"outer/w/{name}"] = state[name], value
        if dtype == torch.float64:
            computed[f"outer/change/{name}"] = state[name] - start[name]
            expected[f"outer/change/{name}"] = value - start[name]
    return computed, expected
