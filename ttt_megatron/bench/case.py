"""What is measured: cases, and the groups that are timed together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ttt_kernels.work import Work

OURS = "ttt_kernels"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time.

    name: the pass or variant; way: who computes it (`OURS`, or a baseline's name); run takes what
    `prepare` returned, which is made anew, untimed, before every run. Where `replayable` a run
    may be repeated on one state and be captured in a CUDA graph. work: the least it takes, None
    where nobody counted; model_flops: what MFU counts; tokens: that a run reads; extra: figures
    of its own; count: how many equal things a run does one after the other, each of which is timed;
    settings: what else it was run with, in words; own_bytes: its weights; is_baseline: whether
    others compute it, so that what it cannot do is no fault of ours.
    """

    name: str
    run: Callable[[Any], Any]
    way: str = OURS
    prepare: Callable[[], Any] = lambda: None
    replayable: bool = False
    work: Work | None = None
    model_flops: float | None = None
    tokens: int | None = None
    settings: str = ""
    own_bytes: int = 0
    count: int = 1
    is_baseline: bool = False
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A case that cannot be measured, and why, in a clause; extra: what is known all the same."""

    name: str
    way: str = OURS
    status: str = "skipped"
    reason: str = ""
    settings: str = ""
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases timed in turn. `build` makes their tensors; nothing is allocated before.

    shape: in words; memory_bytes: what building and running takes, 0 where it does not matter;
    seconds: a guess at one round of all cases, for the time that is left; rounds: timed runs of
    each case. Ratios are to the case of name reference_name (None: of the same name) and way
    reference_way.
    """

    section: str
    operation: str
    shape: str
    precision: str
    build: Callable[[], list[Case | Missing]]
    cold_cache: bool = True
    memory_bytes: float = 0.0
    seconds: float = 0.0
    rounds: int = 20
    reference_name: str | None = None
    reference_way: str = OURS
