"""Of every system: reading a prompt, decoding after it, a training step, and their FLOPs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import RoundedWeights
from ttt_kernels.work import Work
from ttt_megatron.baselines.systems import SYSTEMS
from ttt_megatron.bench import models, system_memory
from ttt_megatron.bench.case import Case, Missing
from ttt_megatron.bench.memory import available_bytes
from ttt_megatron.bench.meta_cases import GRAPHS, replayable
from ttt_megatron.bench.planned import planned_work
from ttt_megatron.bench.reader import Reader, random_prompt
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.training.flops import model_flops_per_token

SECTION = "systems"
REFERENCE = SYSTEMS["e2e"].label
# It reads as TTT-E2E does and is trained as without inner steps: both are there.
REPEATS = ("naive",)
PREFILL, DECODE, TRAIN = "prefill", "decode a token", "training step"
OVER_END = "decode two tokens over a chunk's end"


def system_cases(
    systems: Mapping[str, RunConfig], length: int, device: torch.device, resident: float
) -> Iterator[Case | Missing]:
    """What is timed of every system, by label, one after the other.

    length: tokens of the prompt and of a step's sequence; resident: bytes of all weights and
    sessions, which stay. A step that is estimated not to fit beside them is missing.
    """
    room = available_bytes(device) - resident
    kept = _choose(systems, device, room)
    learners: dict[str, Learner] = {}
    for label, config in systems.items():
        rows = random_prompt(config.model.vocab_size or 0, length + 1, device)
        key = str(config.model)
        if key not in learners:
            learners[key] = models.make(config, device)
        yield from _reading(label, _twin(learners[key], config), config, rows[:, :-1])
        yield _training(label, learners[key], kept[label], rows, room)


def _choose(
    configs: Mapping[str, RunConfig], device: torch.device, room: float
) -> dict[str, RunConfig]:
    """All systems with as much kept as fits, the prefix's activations alike in all."""
    kept: dict[str, RunConfig] = dict(configs)
    for prefix, two_level in ((False, False), (True, False), (True, True)):
        kept = {
            label: models.with_memory(c, prefix=prefix, two_level=two_level)
            for label, c in configs.items()
        }
        steps = (system_memory.step_bytes(c, device) for c in kept.values())
        if all(step is None or step <= room for step in steps):
            break
    return kept


def facts_of(config: RunConfig, length: int) -> dict[str, float]:
    """What is known of a system without measuring: FLOPs of a training step a token.

    context: tokens; chunk: tokens between updates; model_flops: a plain step's; executed_flops:
    those that are executed, where the planner counts its mixers.
    """
    facts = {
        "context": float(length),
        "chunk": float(config.inner.chunk_size),
        "model_flops": model_flops_per_token(config.model, length),
    }
    work = planned_work(config)
    return facts if work is None else {**facts, "executed_flops": work.flops / length}


def _twin(learner: Learner, config: RunConfig, *, graphs: bool = False) -> Learner:
    """The same weights, rounded for itself: what a step rounds is not what a session does."""
    twin = models.sharing(learner, config, graphs=graphs)
    twin.rounded = RoundedWeights()
    return twin


def _updates(config: RunConfig) -> bool:
    """Whether a session does more at the end of a chunk."""
    steps = config.model.num_suffix_layers > 0 and config.inner.mode != "off"
    return steps or any("ttt_kvb" in kind for kind in config.model.mixer_kinds)


def _reading(label: str, learner: Learner, config: RunConfig, prompt: Tensor) -> Iterator[Case]:
    reader = Reader(learner, prompt)
    common: dict[str, Any] = {
        "way": label,
        "own_bytes": sum(p.nbytes for p in learner.parameters()),
        "extra": facts_of(config, prompt.shape[1]),
    }
    yield Case(name=PREFILL, run=reader.prefill, tokens=prompt.shape[1], **common)
    run, prepare = reader.decode, reader.begin
    yield Case(name=DECODE, run=run, prepare=prepare, count=reader.decoded, tokens=1, **common)
    if _updates(config):
        over, prepare = reader.over_end, reader.almost_full
        yield Case(name=OVER_END, run=over, prepare=prepare, tokens=2, **common)


def _training(
    label: str,
    learner: Learner,
    config: RunConfig,
    rows: Tensor,
    room: float,
) -> Case | Missing:
    device, length = rows.device, rows.shape[1] - 1
    graphs = config.inner.mode == "meta" and replayable(config, device)
    twin = _twin(learner, config, graphs=graphs)
    mask = torch.ones(1, length, dtype=torch.bool, device=device)

    def step(tokens: int) -> None:
        read, following = rows[:, :tokens], rows[:, 1 : tokens + 1]
        twin(read, following, mask[:, :tokens]).loss.backward()
        # Gone at once: the other systems' steps need the room.
        twin.zero_grad(set_to_none=True)

    common: dict[str, Any] = {
        "name": TRAIN,
        "way": label,
        "settings": _settings(config, graphs),
        "extra": facts_of(config, length),
    }
    needed = system_memory.step_bytes(config, device)
    if needed is None:
        needed = system_memory.tried_step_bytes(step, config, device)
    if needed is not None and needed > room:
        reason = f"needs {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free (estimated)"
        return Missing(status="out of memory", reason=reason, **common)
    work = planned_work(config)
    return Case(
        run=lambda _: step(length),
        work=None if work is None else Work(int(work.flops), int(work.traffic)),
        model_flops=model_flops_per_token(config.model, length) * length,
        tokens=length,
        own_bytes=sum(p.nbytes for p in twin.parameters()),
        **common,
    )


def _settings(config: RunConfig, graphs: bool) -> str:
    words = ["prefix recomputed"] if config.training.recompute_prefix else []
    words += ["two-level"] if config.inner.two_level else []
    words += [GRAPHS] if graphs else []
    return ", ".join(words)
