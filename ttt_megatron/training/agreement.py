"""Every rank must run the same configuration, on the same data, with the same code.

Ranks are started apart, perhaps on machines with an older copy of something. What they disagree
on would stop them in the middle of a collective, or worse, train something that no recipe says.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import ttt_kernels
import ttt_megatron
from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.parallel.meeting import Meeting, describe, in_words
from ttt_megatron.training.fused import choose_adam
from ttt_megatron.training.fused_norm import choose_norm
from ttt_megatron.training.precision import compute_dtype, parameter_dtype_of

_MOST_KEYS = 5
_MOST_RANKS = 4
_DEVICE = "kind of device"
_NONE = "none ("
# Before what a rank tells, and the verdict, where another attempt would come to the same.
_LASTING = "lasting: "
# Rank 0 gives up first, and the others hear from it why.
_GRACE = timedelta(seconds=10)


def own_facts(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What all ranks must have in common, by the name it has in a message."""
    facts: dict[str, Any] = to_flat(config)
    facts[_DEVICE] = device.type
    found: dict[str, Callable[[], object]] = {
        "data fingerprint": lambda: open_dataset(config.data.path).fingerprint,
        "prefix's RMSNorm": lambda: choose_norm(
            config.training.fused_norm, device, compute_dtype(config)
        ),
    }
    if config.optimizer.engine == "megatron":
        dtype = parameter_dtype_of(config.training.precision)
        found["AdamW"] = lambda: choose_adam(config.optimizer, device, dtype)
    for name, find in found.items():
        try:
            facts[name] = str(find())
        except UserError as error:
            facts[name] = f"{_NONE}{error})"
    facts["ttt-megatron version"] = ttt_megatron.__version__
    for package in ("torch", "megatron-core"):
        facts[f"{package} version"] = importlib.metadata.version(package)
    return facts | _source_digests()


def _source_digests() -> dict[str, str]:
    digests = {}
    for package in (ttt_megatron, ttt_kernels):
        assert package.__file__ is not None
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            name = f"source file {file.relative_to(folder.parent)}"
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return digests


def require_agreement(meeting: Meeting, facts: dict[str, Any]) -> None:
    """Compares every rank's facts with rank 0's. Collective, through the meeting's store alone.

    Raises UserError, on all ranks, naming the ranks that differ, in what, and both values. It is a
    PassingError where each rank that differs may do so because a machine or a mount is broken: in
    the kind of device, or in what one has and another cannot find; and for ranks that have not told
    theirs within the meeting's timeout.
    """
    if meeting.world_size == 1:
        return
    if meeting.rank == 0:
        meeting.put("facts", json.dumps(facts))
    ours = _from_first(meeting, "facts")
    first, own = json.loads(ours), json.loads(json.dumps(facts))
    mark = "" if _may_pass(first, own) else _LASTING
    meeting.put("differences", mark + "; ".join(_differences(first, own)))
    came: list[int] = []
    if meeting.rank == 0:
        told = meeting.wait_for("differences", range(meeting.world_size))
        came = list(told)
        meeting.put("verdict", _verdict(meeting, told))
    verdict = _from_first(meeting, "verdict")
    if verdict:
        meeting.put("heard", "")
        if meeting.rank == 0:  # which may hold the store that the others still read
            meeting.wait_for("heard", came, _GRACE)
        lasting = verdict.startswith(_LASTING)
        raise (UserError if lasting else PassingError)(verdict.removeprefix(_LASTING))


def _from_first(meeting: Meeting, key: str) -> str:
    found = meeting.wait_for(key, range(1), meeting.timeout + _GRACE)
    if not found:
        raise PassingError(
            f"{describe(meeting, 0)} has told nothing within {in_words(meeting.timeout)} "
            f"(parallel.timeout_minutes): see its last message"
        )
    return found[0]


def _may_pass(first: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a rank agrees with rank 0, or may by itself at the next attempt."""
    keys = [key for key in {**first, **own} if first.get(key) != own.get(key)]
    failed = (str(facts.get(key)).startswith(_NONE) for key in keys for facts in (first, own))
    return not keys or _DEVICE in keys or any(failed)


def _differences(first: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """One phrase a key; rank 0's values come second."""
    keys = [key for key in {**first, **own} if first.get(key) != own.get(key)]
    told = [f"{key} = {_shown(own, key)} where rank 0 has {_shown(first, key)}" for key in keys]
    more = len(told) - _MOST_KEYS
    return told[:_MOST_KEYS] + ([f"and {more} more differences"] if more > 0 else [])


def _shown(facts: dict[str, Any], key: str) -> str:
    return str(facts[key]) if key in facts else "nothing"


def _verdict(meeting: Meeting, differences: dict[int, str]) -> str:
    """What all ranks are told, given what each differs in; empty if they agree."""
    ranks = range(meeting.world_size)
    absent = [describe(meeting, rank) for rank in ranks if rank not in differences]
    if absent:
        return (
            f"{_listed(absent)} told nothing within {in_words(meeting.timeout)} "
            f"(parallel.timeout_minutes): see the last message there"
        )
    told = {rank: text.removeprefix(_LASTING) for rank, text in differences.items()}
    differing = [f"{describe(meeting, rank)} has {text}" for rank, text in told.items() if text]
    if not differing:
        return ""
    lasting = any(text.startswith(_LASTING) for text in differences.values())
    return (
        f"{_LASTING if lasting else ''}the ranks disagree: {_listed(differing, '; ')}. Start "
        f"all ranks with the same recipe and overrides, the same prepared data and the same "
        f"installed code"
    )


def _listed(texts: list[str], separator: str = ", ") -> str:
    more = len(texts) - _MOST_RANKS
    return separator.join(texts[:_MOST_RANKS] + ([f"and {more} more ranks"] if more > 0 else []))
