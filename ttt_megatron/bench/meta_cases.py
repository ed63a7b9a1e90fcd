"""One meta step, forwards and backwards, beside plain steps of models of the same size."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ttt_kernels.work import Work
from ttt_megatron.baselines.systems import as_system
from ttt_megatron.bench import baselines, models
from ttt_megatron.bench.case import Case, Group, Missing
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.models import E2E, FULL, SWA, Size
from ttt_megatron.bench.planned import planned_work
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.training.float8 import float8_backend
from ttt_megatron.training.flops import model_flops_per_token

PLAIN = "same model, no inner steps"
GRAPHS = "CUDA graphs"
FULL_BY_SDPA = f"{FULL}, SDPA"
OPERATION = "step"
# What of a ceiling steps are guessed to reach, for the time that is left.
_SHARE = 0.25
_Context = Callable[[], AbstractContextManager[None]]


def meta_group(
    size: Size,
    length: int,
    precision: str,
    device: torch.device,
    rounds: int,
    ceilings: Ceilings,
    available: float,
) -> Group:
    """One sequence of `length` tokens. Ratios are to the same model without inner steps.

    What is kept is the most that is estimated to fit into `available` bytes: all of the prefix's
    activations, or its blocks' inputs, and beyond that fast weights at segment starts alone.
    """
    config = size.at(length, precision)
    variants = {
        E2E: config,
        PLAIN: as_system(config, "off"),
        SWA: as_system(config, "swa"),
        FULL: as_system(config, "full"),
    }
    chosen, missing = _choose(variants, device, available)
    seconds = sum(
        work.flops / ceilings.product_rate(precision) / _SHARE
        for work in map(planned_work, chosen.values())
        if work is not None
    )
    return Group(
        section="meta",
        operation=OPERATION,
        shape=f"{size.name}, {length:,} tokens",
        precision=precision,
        build=lambda: [*_cases(chosen, device), *missing],
        cold_cache=False,
        seconds=seconds,
        rounds=rounds,
        reference_name=PLAIN,
    )


def _choose(
    variants: dict[str, RunConfig], device: torch.device, available: float
) -> tuple[dict[str, RunConfig], list[Missing]]:
    """Every variant with as much kept as fits, the prefix's alike in all; and those that do not."""

    def resident(name: str) -> float:
        """Weights of the other models, which stay where they are."""
        others = {str(v.model): v for v in variants.values() if v.model != variants[name].model}
        return sum(models.weight_bytes(v, device) for v in others.values())

    def needed(name: str, config: RunConfig) -> float:
        return models.step_bytes(config, device) + resident(name)

    choices = [(False, False), (True, False), (True, True)]
    for prefix, two_level in choices:
        kept = {
            name: models.with_memory(c, prefix=prefix, two_level=two_level)
            for name, c in variants.items()
        }
        if all(needed(name, c) <= available for name, c in kept.items()):
            break
    missing = [
        Missing(
            name=name,
            status="out of memory",
            reason=f"needs {needed(name, c) / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free "
            "(estimated)",
            settings=_settings(c),
        )
        for name, c in kept.items()
        if needed(name, c) > available
    ]
    fitting = {n: c for n, c in kept.items() if needed(n, c) <= available}
    if E2E in fitting and not fitting[E2E].inner.two_level:
        base = fitting[E2E]
        saved = models.with_memory(
            base, policy="save_all", prefix=base.training.recompute_prefix, two_level=False
        )
        more = {E2E: base}
        if needed(E2E, saved) <= available:
            more[f"{E2E}, save_all"] = saved
        if replayable(config=base, device=device):
            more |= {f"{name}, {GRAPHS}": c for name, c in more.items()}
        fitting = more | fitting
    if FULL in fitting:
        fitting[FULL_BY_SDPA] = fitting[FULL]
    return fitting, missing


def replayable(config: RunConfig, device: torch.device) -> bool:
    """Whether passes over chunks can be CUDA graphs: not with TransformerEngine's products."""
    if device.type != "cuda":
        return False
    if config.training.precision != "fp8":
        return True
    return float8_backend(models.on(config, device)) == "torch"


def _settings(config: RunConfig) -> str:
    words = ["prefix recomputed"] if config.training.recompute_prefix else []
    words += ["two-level"] if config.inner.two_level else []
    return ", ".join(words)


def _cases(chosen: dict[str, RunConfig], device: torch.device) -> Iterator[Case]:
    if not chosen:
        return
    first = next(iter(chosen.values()))
    vocabulary, length = first.model.vocab_size or 0, first.data.sequence_length
    rows = torch.randint(vocabulary, (1, length + 1), device=device)
    batch = rows[:, :-1], rows[:, 1:], torch.ones_like(rows[:, 1:], dtype=torch.bool)
    built: dict[str, Learner] = {}
    for name, config in chosen.items():
        key = str(config.model)
        if key not in built:
            built[key] = models.make(config, device)
        learner = models.sharing(built[key], config, graphs=name.endswith(GRAPHS))
        weights = sum(p.nbytes for p in learner.parameters())
        total = planned_work(config)

        attention: _Context = (
            baselines.full_attention_by_sdpa if name == FULL_BY_SDPA else nullcontext
        )

        def run(_: Any, learner: Learner = learner, within: _Context = attention) -> None:
            with within():
                learner(*batch).loss.backward()
            # Gone at once: the other models' steps need the room.
            learner.zero_grad(set_to_none=True)

        yield Case(
            name=name,
            run=run,
            work=None if total is None else Work(int(total.flops), int(total.traffic)),
            model_flops=model_flops_per_token(config.model, length) * length,
            tokens=length,
            settings=_settings(config),
            own_bytes=weights,
            extra={"parameters": sum(p.numel() for p in learner.parameters())},
        )
