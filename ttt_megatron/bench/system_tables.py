"""The section `systems` in tables: costs by context, and where TTT-E2E becomes the cheaper."""

from ttt_megatron.bench.cells import NONE, Table, digits, duration, median, notes, size_of_bytes
from ttt_megatron.bench.cells import spread as spread_of
from ttt_megatron.bench.crossings import find_crossing
from ttt_megatron.bench.results import MEASURED, Result
from ttt_megatron.bench.system_cases import DECODE, PREFILL, REFERENCE, TRAIN
from ttt_megatron.bench.system_figures import (
    COSTS,
    DECODE_COST,
    EXECUTED_FLOPS,
    MODEL_FLOPS,
    READ_COST,
    TRAIN_COST,
    Costs,
    costs_by_model,
    costs_of,
    size_name,
)

LEGEND = (
    "Decoding has its share of the update that follows a chunk. FLOPs are those of a training step "
    "a token: a plain step's of the same model, and executed ones where the planner counts the "
    "mixers. Peak memory is a step's."
)
CROSSING_LEGEND = (
    f"From (or only below) which context {REFERENCE} costs less, on straight lines over the "
    f"logarithm of the length; in brackets its cost over the other's at the longest."
)


def system_tables(rows: list[Result]) -> list[Table]:
    """What every system costs at every length, and a table of crossings."""
    crossings = [
        row
        for (size, precision), costs in costs_by_model(rows).items()
        for row in _crossings(f"{size} {precision}", costs)
    ]
    tables = [_costs(rows)]
    if crossings:
        columns = ("size", "against", *COSTS)
        title = f"Where {REFERENCE} is cheaper"
        tables.append(
            Table(title=title, columns=columns, rows=crossings, left=2, note=CROSSING_LEGEND)
        )
    return tables


def _costs(rows: list[Result]) -> Table:
    columns = (
        "size", "precision", "context", "system", READ_COST, "spread", DECODE_COST, "spread",
        TRAIN_COST, "spread", "model MFLOPs", "executed MFLOPs", "with", "peak memory",
    )  # fmt: skip
    places = dict.fromkeys((one.shape, one.precision, one.way) for one in rows)
    cells = []
    for shape, precision, way in places:
        own = {r.name: r for r in rows if (r.shape, r.precision, r.way) == (shape, precision, way)}
        if "all" in own:
            context = shape.rpartition("context ")[2]
            words = size_name(own["all"]), precision, context, way or "all"
            cells.append((*words, own["all"].status, *[NONE] * 9))
        else:
            cells.append(_row(own, size_name(next(iter(own.values()))), precision, way))
    note = " ".join(filter(None, (LEGEND, notes(rows))))
    return Table(title="Every system", columns=columns, rows=cells, left=4, note=note)


def _row(own: dict[str, Result], size: str, precision: str, way: str) -> tuple[str, ...]:
    costs = costs_of(own)
    train = own[TRAIN]
    context = train.extra.get("context")
    times: list[str] = []
    for name, cost in ((PREFILL, READ_COST), (DECODE, DECODE_COST), (TRAIN, TRAIN_COST)):
        one = own[name]
        times += [duration(costs.get(cost)) if one.status == MEASURED else median(one)]
        times += [spread_of(one)]
    flops = (costs.get(MODEL_FLOPS), costs.get(EXECUTED_FLOPS))
    return (
        size,
        precision,
        NONE if context is None else f"{context:,.0f}",
        way,
        *times,
        *(NONE if value is None else digits(value / 1e6) for value in flops),
        train.settings or NONE,
        size_of_bytes(train.peak_bytes),
    )


def _crossings(size: str, costs: Costs) -> list[tuple[str, ...]]:
    """A row a system, in the order of their results."""
    systems = dict.fromkeys(system for by_system in costs.values() for system in by_system)
    rows = []
    for system in systems:
        if system == REFERENCE:
            continue
        cells = []
        for cost in COSTS:
            ours, theirs = (costs[cost].get(name, {}) for name in (REFERENCE, system))
            crossing = find_crossing(ours, theirs)
            cells.append(NONE if crossing is None else f"{crossing} ({crossing.ratio:.2f})")
        rows.append((size, system, *cells))
    return rows
