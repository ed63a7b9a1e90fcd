"""Tiny cases run in parts on several processes, and whole in one."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner, LearnerOutput
from ttt_megatron.parallel.context import context_parts, own_tokens
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_schedule import one_forward_one_backward
from ttt_megatron.parallel.context_tasks import SHARES, PartPasses, zigzag_order

VOCABULARY = 19
MODEL = {
    "vocab_size": VOCABULARY,
    "num_layers": 4,
    "num_suffix_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 12,
    "window_size": 7,
    "init_std": 0.3,
}
# A large rate and a clip that is active on some chunks only: second-order errors are large.
INNER = {"chunk_size": 4, "lr": 0.7, "clip": 2.0}

Data = tuple[Tensor, Tensor, Tensor]

# Shares of the zigzag passes, by which backward passes are split; the suffix's is by default.
SPLITS = {
    "none": SHARES.joined(),
    "suffix": SHARES,
    "both": replace(SHARES, prefix_backward=0.196, prefix_weights=0.078),
}


@dataclass(frozen=True)
class Case:
    """Settings that differ from the defaults above, and a number of micro-batches."""

    model: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    length: int = 32
    split: str = "suffix"
    debts: int | None = 1

    @property
    def model_config(self) -> ModelConfig:
        """The whole model configuration."""
        return ModelConfig(**(MODEL | self.model))

    def build(self) -> Learner:
        """The learner, in float64; the same on every rank."""
        inner = InnerConfig(**(INNER | self.inner))
        settings = {"dtype": torch.float64, "seed": 3} | self.learner
        return Learner(self.model_config, inner, **settings)

    def data(self) -> list[Data]:
        """Micro-batches of two sequences: tokens, targets and an uneven mask."""
        return [micro_batch(self.length, seed) for seed in range(self.micro_batches)]


def micro_batch(length: int, seed: int, size: int = 2) -> Data:
    """Tokens, targets and mask [size, length]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (size, length + 1), generator=generator)
    mask = torch.rand(size, length, generator=generator) > 0.2
    return rows[:, :-1], rows[:, 1:], mask


Result = dict[str, Tensor]


def whole(case: Case) -> Result:
    """What one process computes."""
    learner = case.build()
    outputs = [learner(*data) for data in case.data()]
    for output in outputs:
        (output.loss / case.micro_batches).backward()
    with torch.no_grad():
        read = [learner(*data) for data in case.data()]
    return _measured(outputs) | _gradients(learner) | _read(read)


def in_parts(case: Case, links: ContextLinks) -> Result:
    """What the links' ranks compute together, put together on every rank."""
    # Links know one model's shapes.
    links.known.clear()
    learner = case.build()
    parts = context_parts(links, case.length // links.num_parts, case.model_config.window_size)
    by_part = dict(zip(links.own_parts, parts, strict=True))
    whole_batches = case.data()

    def batch(index: int, part: int) -> Data:
        tokens, targets, mask = (own_tokens(x, links) for x in whole_batches[index])
        place = links.own_parts.index(part)
        return tokens[place], targets[place], mask[place]

    run = _in_zigzag if links.zigzag else _in_plain_order
    outputs = run(case, links, learner, by_part, batch)
    found = _gradients(learner)
    if links.rank > 0 and case.inner.get("mode") != "off":
        assert all(not found[name].any() for name in found if ".prime_mlp." in name)
    measured = {part: _measured(of_part) for part, of_part in outputs.items()}
    for part, own in by_part.items():
        if not links.zigzag:
            with torch.no_grad():
                read = [learner(*batch(i, part), None, own) for i in range(case.micro_batches)]
            measured[part] |= _read(read)
    links.settle()
    for gradient in found.values():
        dist.all_reduce(gradient)
    return _put_together(measured) | found


def _in_plain_order(case, links, learner, parts, batch) -> dict[int, list[LearnerOutput]]:
    [(part, own)] = parts.items()
    outputs: list[LearnerOutput] = []

    def forward(index: int) -> Tensor:
        outputs.append(learner(*batch(index, part), None, own))
        return outputs[-1].loss

    def backward(index: int, loss: Tensor) -> None:
        (loss / case.micro_batches).backward()

    ahead = links.size - 1 - links.rank
    one_forward_one_backward(case.micro_batches, ahead, forward, backward)
    links.settle()
    return {part: outputs}


def _in_zigzag(case, links, learner, parts, batch) -> dict[int, list[LearnerOutput]]:
    passes = PartPasses(
        learner=learner,
        parts=parts,
        batch=batch,
        inner_lr=None,
        scale=1 / case.micro_batches,
        measure=lambda output, part: output,
    )
    place = case.micro_batches, links.size, links.rank
    passes.run(zigzag_order(*place, SPLITS[case.split], case.debts), links)
    return {
        part: [passes.measured[index, part] for index in range(case.micro_batches)]
        for part in parts
    }


def _gradients(learner: Learner) -> Result:
    gradients = {}
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradients[f"gradient of {name}"] = parameter.grad
    return gradients


def _measured(outputs: list[LearnerOutput]) -> Result:
    found = {"loss": torch.stack([output.loss.detach() for output in outputs])}
    for name in ("chunk_losses", "token_nll", "inner_grad_norms", "drift"):
        values = [getattr(output, name) for output in outputs]
        if values[0] is not None:
            found[name] = torch.stack(values)
    return found


def _read(outputs: list[LearnerOutput]) -> Result:
    """Losses read without an outer gradient, and the fast weights at the end."""
    found = {"nll read": torch.stack([output.token_nll for output in outputs])}
    for index in range(len(outputs[0].fast_weights or [])):
        values = [output.fast_weights[index] for output in outputs]
        found[f"fast weight {index}"] = torch.stack(values)
    return found


def _put_together(own: dict[int, Result]) -> Result:
    """Of all parts: losses summed, what holds at the end from the last, the rest joined."""
    gathered: list[dict[int, Result]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    by_part = {part: result for one in gathered for part, result in one.items()}
    results = [by_part[part] for part in sorted(by_part)]
    together = {}
    for name in results[0]:
        values = [result[name] for result in results if name in result]
        if name == "loss":
            together[name] = torch.stack(values).sum(0)
        elif name == "drift" or name.startswith("fast weight"):
            together[name] = values[-1]
        else:
            together[name] = torch.cat(values, dim=-1)
    return together


def run_in_parts(cases: dict[str, Case], zigzag: dict[str, Case]) -> dict[str, dict[str, Result]]:
    """Every case, on all processes of the world: what `launch` starts."""
    dist.init_process_group("gloo")
    try:
        assert dist.group.WORLD is not None
        plain = context_links(dist.group.WORLD)
        turning = context_links(dist.group.WORLD, zigzag=True)
        return {
            "plain": {name: in_parts(case, plain) for name, case in cases.items()},
            "zigzag": {name: in_parts(case, turning) for name, case in zigzag.items()},
        }
    finally:
        dist.destroy_process_group()


def worst_error(actual: Result, expected: Result) -> tuple[float, str]:
    """Largest difference of any array found, relative to its largest entry; the array's name."""
    assert {"loss", "token_nll"} < actual.keys() <= expected.keys()
    return max(
        (float((actual[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-12)), n)
        for n in actual
    )
