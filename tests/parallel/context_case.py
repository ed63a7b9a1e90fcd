"""Tiny cases run in parts on several processes, and whole in one."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner, LearnerOutput
from ttt_megatron.parallel.context import context_part, own_part
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_schedule import one_forward_one_backward

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


@dataclass(frozen=True)
class Case:
    """Settings that differ from the defaults above, and a number of micro-batches."""

    model: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    length: int = 32

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
    return _measured(outputs) | _gradients(learner) | _read(read, learner)


def in_parts(case: Case, links: ContextLinks) -> Result:
    """What the links' ranks compute together, put together on every rank."""
    learner = case.build()
    data = [tuple(own_part(x, links) for x in one) for one in case.data()]
    part = context_part(links, case.length // links.size, case.model_config.window_size)
    outputs: list[LearnerOutput] = []

    def forward(index: int) -> Tensor:
        outputs.append(learner(*data[index], None, part))
        return outputs[-1].loss

    def backward(index: int, loss: Tensor) -> None:
        (loss / case.micro_batches).backward()

    one_forward_one_backward(case.micro_batches, links, forward, backward)
    found = _gradients(learner)
    if links.rank > 0 and case.build().inner.mode != "off":
        assert all(not found[name].any() for name in found if ".prime_mlp." in name)
    with torch.no_grad():
        read = [learner(*one, None, part) for one in data]
    links.settle()
    for gradient in found.values():
        dist.all_reduce(gradient)
    return _put_together(_measured(outputs)) | found | _read(read, learner, links)


def _gradients(learner: Learner) -> Result:
    gradients = {}
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradients[f"gradient of {name}"] = parameter.grad
    return gradients


def _measured(outputs: list[LearnerOutput]) -> Result:
    found = {"loss": torch.stack([output.loss.detach() for output in outputs])}
    for name in ("chunk_losses", "token_nll", "inner_grad_norms"):
        values = [getattr(output, name) for output in outputs]
        if values[0] is not None:
            found[name] = torch.stack(values)
    return found


def _read(
    outputs: list[LearnerOutput], learner: Learner, links: ContextLinks | None = None
) -> Result:
    """The fast weights at the end of the sequences, read without an outer gradient; the losses."""
    found = {"nll read": torch.stack([output.token_nll for output in outputs])}
    if links is not None:
        found = _put_together(found)
    for index in range(len(outputs[0].fast_weights or [])):
        values = [output.fast_weights[index] for output in outputs]
        found[f"fast weight {index}"] = _of_last_rank(torch.stack(values), links)
    if outputs[0].drift is not None:
        found["drift"] = _of_last_rank(torch.stack([o.drift for o in outputs]), links)
    return found


def _of_last_rank(x: Tensor, links: ContextLinks | None) -> Tensor:
    if links is not None:
        dist.broadcast(x, src=links.size - 1)
    return x


def _put_together(own: Result) -> Result:
    """Losses summed over the ranks, everything else concatenated along its last axis."""
    gathered: list[Result] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {
        name: sum(one[name] for one in gathered)
        if name == "loss"
        else torch.cat([one[name] for one in gathered if name in one], dim=-1)
        for name in gathered[0]
    }


def run_in_parts(cases: dict[str, Case]) -> dict[str, Result]:
    """Every case, on all processes of the world: what `launch` starts."""
    dist.init_process_group("gloo")
    try:
        assert dist.group.WORLD is not None
        links = context_links(dist.group.WORLD)
        return {name: in_parts(case, links) for name, case in cases.items()}
    finally:
        dist.destroy_process_group()


def worst_error(actual: Result, expected: Result) -> tuple[float, str]:
    """Largest difference of any array relative to its largest entry, and the array's name."""
    assert actual.keys() == expected.keys()
    return max(
        (float((actual[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-12)), n)
        for n in expected
    )
