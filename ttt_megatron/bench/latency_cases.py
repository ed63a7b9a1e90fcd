"""Reading a prompt and decoding after it, by the streaming session, as contexts grow."""

from typing import Any

import torch

from ttt_megatron.baselines.systems import as_system
from ttt_megatron.bench import models
from ttt_megatron.bench.case import Case, Group, Missing
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.models import E2E, FULL, SWA, Size
from ttt_megatron.bench.planned import planned_work
from ttt_megatron.bench.reader import Reader, random_prompt
from ttt_megatron.bench.system_memory import session_bytes
from ttt_megatron.config.schema import RunConfig

PREFILL, DECODE, STEP = "prefill", "decode a token", "decode a token and step"


def latency_group(
    size: Size,
    length: int,
    precision: str,
    device: torch.device,
    rounds: int,
    ceilings: Ceilings,
) -> Group:
    """A prompt of `length` tokens, one sequence. A ratio is to SWA."""
    config = size.at(length, precision)
    variants = {
        E2E: config,
        SWA: as_system(config, "swa"),
        FULL: as_system(config, "full"),
    }
    works = [planned_work(c) for c in variants.values()]
    flops = sum(work.flops for work in works if work is not None) / 3
    return Group(
        section="latency",
        operation="session",
        shape=f"{size.name}, context {length:,}",
        precision=precision,
        build=lambda: _cases(variants, device),
        cold_cache=False,
        memory_bytes=sum(session_bytes(c) for c in variants.values()),
        seconds=flops / ceilings.product_rate(precision) / 0.15,
        rounds=rounds,
        reference_way=SWA,
    )


def _cases(variants: dict[str, RunConfig], device: torch.device) -> list[Case | Missing]:
    first = next(iter(variants.values()))
    vocabulary, length = first.model.vocab_size or 0, first.data.sequence_length
    prompt = random_prompt(vocabulary, length, device)
    cases: list[Case | Missing] = []
    for way, config in variants.items():
        learner = models.make(config, device).eval()
        reader = Reader(learner, prompt)
        common: dict[str, Any] = {
            "way": way,
            "own_bytes": sum(p.nbytes for p in learner.parameters()),
            "extra": {"chunk": float(config.inner.chunk_size)},
        }
        cases.append(Case(name=PREFILL, run=reader.prefill, tokens=length, **common))
        cases.append(
            Case(
                name=DECODE,
                run=reader.decode,
                prepare=reader.begin,
                count=reader.decoded,
                tokens=1,
                **common,
            )
        )
        if way == E2E:
            run, prepare = reader.step, reader.full
            cases.append(Case(name=STEP, run=run, prepare=prepare, tokens=1, **common))
    return cases
