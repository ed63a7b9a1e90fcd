"""Costs of systems by context length, from results of the section `systems`."""

from collections.abc import Iterable, Mapping

from ttt_megatron.bench.results import Result
from ttt_megatron.bench.system_cases import DECODE, OVER_END, PREFILL, SECTION, TRAIN

READ_COST = "prefill, 1,000 tokens"
DECODE_COST = "decode, a token"
TRAIN_COST = "training step, 1,000 tokens"
MODEL_FLOPS = "model FLOPs, a token"
EXECUTED_FLOPS = "executed FLOPs, a token"
COSTS = (READ_COST, DECODE_COST, TRAIN_COST, MODEL_FLOPS, EXECUTED_FLOPS)

Costs = dict[str, dict[str, dict[int, float]]]
"""Seconds or FLOPs by cost (of `COSTS`), system and context length in tokens."""


def costs_by_model(rows: Iterable[Result]) -> dict[tuple[str, str], Costs]:
    """Costs of every model's systems; a model is its size's name and its precision.

    What was not measured is left out; FLOPs, which need no measuring, are there all the same.
    """
    found: dict[tuple[str, str], Costs] = {}
    cases: dict[tuple[str, str, str, int], dict[str, Result]] = {}
    for one in rows:
        if one.section == SECTION and "context" in one.extra:
            place = size_name(one), one.precision, one.way, int(one.extra["context"])
            cases.setdefault(place, {})[one.name] = one
    for (size, precision, system, length), own in cases.items():
        costs = found.setdefault((size, precision), {cost: {} for cost in COSTS})
        for cost, value in costs_of(own).items():
            costs[cost].setdefault(system, {})[length] = value
    return found


def costs_of(own: Mapping[str, Result]) -> dict[str, float]:
    """One system's costs at one length, from its results by name."""
    seconds = {
        READ_COST: _per_thousand(own.get(PREFILL)),
        DECODE_COST: mean_decoded(own.get(DECODE), own.get(OVER_END)),
        TRAIN_COST: _per_thousand(own.get(TRAIN)),
    }
    extra = next(iter(own.values())).extra if own else {}
    flops = {
        MODEL_FLOPS: extra.get("model_flops"),
        EXECUTED_FLOPS: own[TRAIN].extra.get("executed_flops") if TRAIN in own else None,
    }
    return {cost: value for cost, value in {**seconds, **flops}.items() if value is not None}


def size_name(one: Result) -> str:
    """The model's name, which its shape begins with."""
    return one.shape.partition(",")[0]


def mean_decoded(decode: Result | None, over_end: Result | None) -> float | None:
    """Seconds of a decoded token on average, its share of the update after a chunk included."""
    if decode is None or decode.median is None:
        return None
    if over_end is None or over_end.median is None:
        return decode.median
    # Noise is not to make an update cost less than nothing.
    update = max(over_end.median - 2 * decode.median, 0.0)
    return decode.median + update / decode.extra["chunk"]


def _per_thousand(one: Result | None) -> float | None:
    if one is None or one.median is None or not one.tokens:
        return None
    return 1000 * one.median / one.tokens
