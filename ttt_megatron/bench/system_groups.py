"""Every system of `SYSTEMS` at one context length: which there are, and what is timed together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ttt_megatron.baselines.systems import SYSTEMS, as_system
from ttt_megatron.bench import system_memory
from ttt_megatron.bench.case import Group, Missing
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.models import Size
from ttt_megatron.bench.system_cases import REFERENCE, REPEATS, SECTION, system_cases
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.training.flops import model_flops_per_token

OPERATION = "systems"
# What of a ceiling products are guessed to reach, for the time that is left.
_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Place:
    """What all systems of a group have in common: one sequence of `length` tokens."""

    size: Size
    length: int
    precision: str
    device: torch.device

    def systems(self) -> tuple[dict[str, RunConfig], list[Missing]]:
        """Systems by label, and those that this model does not have."""
        config = self.size.at(self.length, self.precision)
        found: dict[str, RunConfig] = {}
        missing = []
        for name, system in SYSTEMS.items():
            if name in REPEATS:
                continue
            status = "not possible"
            try:
                made = as_system(config, name, self.size.name)
                reason = _known(found, made)
                status = "skipped"
            except UserError as error:
                reason = str(error)
            if reason:
                missing.append(Missing(name="all", way=system.label, status=status, reason=reason))
            else:
                found[system.label] = made
        return found, missing


def system_groups(
    size: Size,
    length: int,
    precision: str,
    device: torch.device,
    rounds: int,
    ceilings: Ceilings,
    available: float,
) -> list[Group]:
    """All systems in turn where they fit into `available` bytes together, and otherwise a group a
    system, without ratios. Ratios are to TTT-E2E.
    """
    place = Place(size=size, length=length, precision=precision, device=device)
    found, missing = place.systems()
    steps = [system_memory.step_bytes(c, device) for c in found.values()]
    together = _resident(found) + max((step for step in steps if step is not None), default=0.0)
    if together <= available:
        return [_group(place, found, missing, rounds, ceilings)]
    alone = [{label: config} for label, config in found.items()]
    # What this model does not have is said with the last one.
    last = len(alone) - 1
    return [
        _group(place, one, missing if index == last else [], rounds, ceilings)
        for index, one in enumerate(alone)
    ]


def _group(
    place: Place,
    systems: dict[str, RunConfig],
    missing: list[Missing],
    rounds: int,
    ceilings: Ceilings,
) -> Group:
    flops = sum(model_flops_per_token(c.model, place.length) for c in systems.values())
    rate = ceilings.product_rate(place.precision) * _SHARE
    alone = f"{next(iter(systems))}, " if len(systems) == 1 else ""
    resident = _resident(systems)
    return Group(
        section=SECTION,
        operation=OPERATION,
        shape=f"{place.size.name}, {alone}context {place.length:,}",
        precision=place.precision,
        build=lambda: [*system_cases(systems, place.length, place.device, resident), *missing],
        cold_cache=False,
        memory_bytes=resident,
        # A prompt is read forwards only, a third of a step; a few tokens are decoded.
        seconds=flops * place.length * 1.5 / rate,
        rounds=rounds,
        reference_way=REFERENCE,
    )


def _known(found: Mapping[str, RunConfig], made: RunConfig) -> str:
    """Words for a system that is there under another name; none if it is not."""

    def what(config: RunConfig) -> Any:
        return {**vars(config.model), "mixers": config.model.mixer_kinds}, config.inner

    same = next((label for label, config in found.items() if what(config) == what(made)), None)
    return f"with {made.model.num_layers} blocks it is {same}" if same else ""


def _resident(systems: Mapping[str, RunConfig]) -> float:
    """Bytes that stay while others run: weights and sessions."""
    return sum(system_memory.session_bytes(c) for c in systems.values())
