"""Results as tables, for a terminal and for Markdown."""

from collections.abc import Callable

from ttt_megatron.bench import latency_cases, meta_cases, prefix_cases
from ttt_megatron.bench.case import OURS
from ttt_megatron.bench.cells import (
    NONE,
    Table,
    digits,
    duration,
    median,
    notes,
    percent,
    size_of_bytes,
    spread,
)
from ttt_megatron.bench.results import Report, Result
from ttt_megatron.bench.system_tables import system_tables


def tables_of(report: Report) -> list[Table]:
    """A table an operation and shape of the kernels, and one for every other section."""
    makers: dict[str, Callable[[list[Result]], list[Table]]] = {
        "kernels": _kernels,
        "inner": lambda rows: [_steps(rows, "Inner step", "time / reading")],
        "meta": _meta,
        "latency": lambda rows: [_latency(rows)],
        "systems": system_tables,
    }
    found: list[Table] = []
    for section in report.sections:
        found += makers[section]([one for one in report.results if one.section == section])
    return found


def _rate(one: Result) -> str:
    """FLOP/s where products bound it, bytes/s where memory does."""
    if one.median is None or one.flops is None or one.bytes is None:
        return NONE
    amount, unit = (one.flops, "FLOP/s") if one.flops else (one.bytes, "B/s")
    rate = amount / one.median
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if rate >= size:
            return f"{digits(rate / size)} {letter}{unit}"
    return f"{digits(rate)} {unit}"


def _ratio(one: Result) -> str:
    return NONE if one.ratio is None else f"{one.ratio:.2f}"


def _kernels(rows: list[Result]) -> list[Table]:
    places = dict.fromkeys((r.operation, r.shape, r.precision) for r in rows)
    found = []
    for place in places:
        own = [r for r in rows if (r.operation, r.shape, r.precision) == place]
        order = list(dict.fromkeys(r.name for r in own))
        own.sort(key=lambda r: (order.index(r.name), r.way != OURS))
        cells = [
            (r.name, r.way, median(r), spread(r), _rate(r), percent(r.share_of_floor), _ratio(r))
            for r in own
        ]
        columns = ("pass", "by", "median", "spread", "rate", "of floor", "time / ours")
        title = ", ".join(place)
        found.append(Table(title=title, columns=columns, rows=cells, left=2, note=notes(own)))
    return found


def _steps(rows: list[Result], title: str, relation: str) -> Table:
    with_mfu = any(r.mfu is not None for r in rows)
    columns = ["size", "precision", "what", "median", "spread", relation, "tokens/s"]
    columns += ["MFU"] if with_mfu else []
    columns += ["of floor", "peak memory"]
    cells = []
    for r in rows:
        speed = NONE if r.median is None or not r.tokens else digits(r.tokens / r.median)
        what = f"{r.name} ({r.settings})" if r.settings else r.name
        row = [r.shape, r.precision, what, median(r), spread(r), _ratio(r), speed]
        row += [percent(r.mfu)] if with_mfu else []
        cells.append((*row, percent(r.share_of_floor), size_of_bytes(r.peak_bytes)))
    return Table(title=title, columns=tuple(columns), rows=cells, left=3, note=notes(rows))


def _meta(rows: list[Result]) -> list[Table]:
    titles = {
        meta_cases.OPERATION: ("Meta step, forwards and backwards", "time / plain"),
        prefix_cases.OPERATION: ("Prefix, forwards and backwards", "relative time"),
    }
    found = []
    for operation, words in titles.items():
        own = [one for one in rows if one.operation == operation]
        found += [_steps(own, *words)] if own else []
    return found


def _latency(rows: list[Result]) -> Table:
    columns = (
        "context", "precision", "model", "prefill", "tokens/s", "decode a token", "spread",
        "with a step", "mean a token", "peak memory",
    )  # fmt: skip
    cells = []
    for shape, precision, way in dict.fromkeys((r.shape, r.precision, r.way) for r in rows):
        own = {r.name: r for r in rows if (r.shape, r.precision, r.way) == (shape, precision, way)}
        if "all" in own:
            cells.append((shape, precision, "all", own["all"].status, *[NONE] * 6))
            continue
        prefill, decode = own[latency_cases.PREFILL], own[latency_cases.DECODE]
        step = own.get(latency_cases.STEP)
        read = prefill.median
        speed = digits((prefill.tokens or 0) / read) if read else NONE
        peaks = [r.peak_bytes for r in own.values() if r.peak_bytes is not None]
        cells.append(
            (
                shape,
                precision,
                way,
                median(prefill),
                speed,
                median(decode),
                spread(decode),
                NONE if step is None else median(step),
                duration(mean_token(decode, step)),
                size_of_bytes(max(peaks, default=None)),
            )
        )
    return Table(
        title="Latency of a streaming session",
        columns=columns,
        rows=cells,
        left=3,
        note=notes(rows),
    )


def mean_token(decode: Result, step: Result | None) -> float | None:
    """Seconds a decoded token takes on average, its share of a chunk's inner step included."""
    if decode.median is None or step is None or step.median is None:
        return decode.median
    return decode.median + (step.median - decode.median) / decode.extra["chunk"]


def heading(about: dict) -> str:
    """Where, when and with what."""
    ceilings = about["ceilings"]
    rates = ", ".join(f"{p} {f / 1e12:.3g} TFLOP/s" for p, f in ceilings["flops"].items())
    lines = [
        f"{about['device']}; {about['date']}; torch {about['torch']}, "
        + "".join(f"{name} {v}, " for name, v in about["packages"].items() if name == "triton")
        + f"Python {about['python']}; commit {about['commit'] or 'unknown'}; `{about['command']}`",
        f"Operations by {about['backend']}. Ceilings: {rates}, "
        f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s ({ceilings['source']}).",
    ]
    return "\n\n".join(lines)


def as_markdown(report: Report) -> str:
    """Heading, tables, legend."""
    parts = [heading(report.about), *(table.markdown() for table in tables_of(report)), LEGEND]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Medians; the spread is half the distance of the quartiles. Of floor: the time that the least "
    "FLOPs and bytes need at the ceilings, over the median; on a CPU small tensors stay in its "
    "caches, which are quicker than the memory that floors count with. MFU counts a plain step's "
    "FLOPs of the same model; fp8 is held against bf16's rates. Plain is the "
    f'"{meta_cases.PLAIN}", its prime MLPs ordinary layers; SWA and full attention have none, and '
    "MLPs wider by about as many parameters; SDPA is PyTorch's attention in place of ours. Peak "
    "memory is that of tensors, with weights and gradients and without an optimizer. A mean token "
    "has its share of the step that follows every chunk."
)
