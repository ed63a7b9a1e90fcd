"""What speeds are aimed at on a GPU, and whether results reach them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ttt_megatron.bench import meta_cases, prefix_cases
from ttt_megatron.bench.case import OURS
from ttt_megatron.bench.models import E2E, FULL
from ttt_megatron.bench.results import Result

NOT_MEASURED = "not measured"
# Of the floor rate, by pass of attention.
_SHARES = {"forward": 0.6, "inner backward": 0.6, "pair forward": 0.5, "pair backward": 0.5}
# A meta step's time over a plain one's at 8K.
_RATIOS = {"125m": 2.0, "760m": 1.8}
_FP8_GAIN, _GAIN_OVER_FULL = 1.2, 2.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line: what, the figure wanted and the one measured, in words, and whether it is met."""

    what: str
    wanted: str
    measured: str = NOT_MEASURED
    verdict: str = ""


def targets_of(results: Iterable[Result]) -> list[Target]:
    """A line for every target; several where it was measured at several shapes."""
    rows = [one for one in results if one.median]
    found: list[Target] = []
    for name, share in _SHARES.items():
        found += _attention(rows, name, share)
    for size, ratio in _RATIOS.items():
        found += [_step(rows, size, precision, ratio) for precision in ("bf16", "fp8")]
    found += [_prefix(rows, size) for size in _RATIOS]
    found.append(_over_full(rows))
    return found


def _said(reached: bool) -> str:
    return "yes" if reached else "no"


def _attention(rows: list[Result], name: str, share: float) -> list[Target]:
    wanted, what = f"≥ {share:.0%} of floor rate", f"attention, {name}, bf16"
    found = []
    for one in rows:
        place = one.section, one.operation, one.name, one.way, one.precision
        if place != ("kernels", "attention", name, OURS, "bf16") or one.share_of_floor is None:
            continue
        found.append(
            Target(
                what=f"{what}: {one.shape}",
                wanted=wanted,
                measured=f"{one.share_of_floor:.0%}",
                verdict=_said(one.share_of_floor >= share),
            )
        )
    return found or [Target(what=what, wanted=wanted)]


def _steps(rows: list[Result], size: str, precision: str, tokens: int) -> list[Result]:
    shape = f"{size}, {tokens:,} tokens"
    return [
        one
        for one in rows
        if (one.operation, one.shape, one.precision) == (meta_cases.OPERATION, shape, precision)
    ]


def _step(rows: list[Result], size: str, precision: str, ratio: float) -> Target:
    what, wanted = f"meta step over plain step, {size} at 8K, {precision}", f"≤ {ratio:.1f}"
    steps = [
        (one.ratio, one.name)
        for one in _steps(rows, size, precision, 8192)
        if one.name.startswith(E2E) and one.ratio
    ]
    if not steps:
        return Target(what=what, wanted=wanted)
    best, name = min(steps)
    measured = f"{best:.2f} ({name})"
    return Target(what=what, wanted=wanted, measured=measured, verdict=_said(best <= ratio))


def _prefix(rows: list[Result], size: str) -> Target:
    what, wanted = f"prefix, fp8 over bf16, {size} at 8K", f"≥ {_FP8_GAIN:.1f} times as fast"
    for one in rows:
        place = one.operation, one.shape, one.precision, one.name
        if place == (prefix_cases.OPERATION, f"{size}, 8,192 tokens", "bf16 fp8", "fp8"):
            gain = 1 / one.ratio if one.ratio else 0.0
            measured, verdict = f"{gain:.2f}", _said(gain >= _FP8_GAIN)
            return Target(what=what, wanted=wanted, measured=measured, verdict=verdict)
    return Target(what=what, wanted=wanted)


def _over_full(rows: list[Result]) -> Target:
    what = "meta step against full attention's (the quicker of ours and SDPA), 125m at 128K, bf16"
    wanted = f"≥ {_GAIN_OVER_FULL:.1f} times as fast"
    steps = _steps(rows, "125m", "bf16", 131072)
    ours = [one.median or 0.0 for one in steps if one.name.startswith(E2E)]
    full = [one.median or 0.0 for one in steps if one.name.startswith(FULL)]
    if not ours or not full:
        return Target(what=what, wanted=wanted)
    gain = min(full) / min(ours)
    measured, verdict = f"{gain:.2f}", _said(gain >= _GAIN_OVER_FULL)
    return Target(what=what, wanted=wanted, measured=measured, verdict=verdict)
