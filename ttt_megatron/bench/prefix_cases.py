"""The prefix of a meta step, forwards and backwards, in several precisions in turn."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ttt_megatron.bench import models
from ttt_megatron.bench.case import Case, Group
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.models import Size
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.planning.step_work import step_work

OPERATION = "prefix"


def prefix_group(
    size: Size,
    length: int,
    precisions: Sequence[str],
    device: torch.device,
    rounds: int,
    ceilings: Ceilings,
) -> Group:
    """Embedding, prefix blocks and the first suffix block's attention over one sequence.

    Ratios are to the last precision but fp8: what fp8 is weighed against.
    """
    configs = {precision: size.at(length, precision) for precision in precisions}
    flops = step_work(next(iter(configs.values())), tile=1).total.flops
    rate = min(ceilings.product_rate(precision) for precision in precisions)
    return Group(
        section="meta",
        operation=OPERATION,
        shape=f"{size.name}, {length:,} tokens",
        precision=" ".join(precisions),
        build=lambda: list(_cases(configs, device)),
        cold_cache=False,
        memory_bytes=max(models.step_bytes(c, device) for c in configs.values())
        + sum(models.weight_bytes(c, device) for c in configs.values()),
        seconds=len(configs) * flops / rate,
        rounds=rounds,
        reference_name=next((p for p in reversed(precisions) if p != "fp8"), precisions[0]),
    )


def _cases(configs: dict[str, RunConfig], device: torch.device) -> Iterator[Case]:
    first = next(iter(configs.values()))
    vocabulary, length = first.model.vocab_size or 0, first.data.sequence_length
    tokens = torch.randint(vocabulary, (1, length), device=device)
    for precision, config in configs.items():
        learner = models.make(config, device)
        cotangent = torch.randn(
            1, length, config.model.hidden_size, device=device, dtype=learner.compute_dtype
        )

        def run(_: Any, learner: Learner = learner, cotangent: Any = cotangent) -> None:
            learner.run_prefix(tokens).backward(cotangent)
            learner.zero_grad(set_to_none=True)

        yield Case(
            name=precision,
            run=run,
            tokens=length,
            own_bytes=sum(p.nbytes for p in learner.parameters()),
        )
