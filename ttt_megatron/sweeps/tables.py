"""A sweep's results as tables: for the terminal, in Markdown, as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ttt_megatron.sweeps.plot import draw_sweep
from ttt_megatron.sweeps.points import Point, short_key, show_value
from ttt_megatron.sweeps.results import FINISHED, RESULTS, SeedMean, SweepResults, write_whole
from ttt_megatron.sweeps.state import PointState

STEM = "sweep"
LEGEND = "Nats a token; ± standard error over seeds; in brackets the difference to the lowest."


def rows(results: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each group of seeds: settings, figures, how many are finished."""
    keys = list(dict.fromkeys(k for point in results.points for k in point.settings))
    means = {group: results.mean(group, results.loss) for group in results.groups}
    lowest = min((m.mean for m in means.values() if m.seeds), default=math.nan)
    header = [] if all(not point.named for point in results.points) else ["point"]
    header += [*keys, *results.measured, "seeds", "tokens", "minutes"]
    body = []
    for group, points in results.groups.items():
        settings, done = points[0].settings, [p for p in points if p.status == FINISHED]
        cells = [group] if header[0] == "point" else []
        cells += [show_value(settings[key]) if key in settings else "" for key in keys]
        for name in results.measured:
            mean = results.mean(group, name)
            gap = mean.mean - lowest if name == results.loss else math.nan
            cells.append(_cell(mean, gap))
        finished = f"{len(done)}" if len(done) == len(points) else f"{len(done)} of {len(points)}"
        begun = [p for p in points if p.step] or points
        tokens = sum(p.tokens for p in begun) / len(begun)
        minutes = sum(p.seconds for p in begun) / len(begun) / 60
        body.append([*cells, finished, f"{tokens:,.0f}", f"{minutes:.1f}"])
    return header, body


def _cell(mean: SeedMean, gap: float) -> str:
    if not mean.seeds:
        return "-"
    text = f"{mean.mean:.3f}"
    if not math.isnan(mean.standard_error):
        text += f" ± {mean.standard_error:.3f}"
    return f"{text} (+{gap:.3f})" if gap > 0 else text


def unfinished(results: SweepResults) -> list[str]:
    """A line about every point that is not finished, or whose loss is no number."""
    lines = []
    for point in results.points:
        if point.status != FINISHED:
            reason = f", {point.reason}" if point.reason else ""
            lines.append(
                f"{point.name}: {point.status}, step {point.step} of {point.steps}{reason}"
            )
        elif not math.isfinite(point.values[results.loss]):
            lines.append(f"{point.name}: {FINISHED}, and its {results.loss} is not finite")
    return lines


def terminal_table(results: SweepResults) -> Table:
    """The table for a terminal."""
    header, body = rows(results)
    return _rich(f"{results.name}, nats a token", header, body)


def plan_table(points: Sequence[Point], states: dict[str, PointState], title: str) -> Table:
    """What would run: every point, its settings and how far it is."""
    body = []
    for point in points:
        state = states[point.name]
        words = f"step {state.step} of {state.steps}"
        if state.trained:
            words = f"to measure: {', '.join(state.missing)}" if state.missing else "finished"
        settings = ", ".join(f"{short_key(k)}={show_value(v)}" for k, v in point.settings.items())
        seed = "" if point.seed is None else str(point.seed)
        body.append([str(point.index), point.name, settings, seed, words])
    return _rich(title, ["index", "point", "settings", "seed", "state"], body)


def _rich(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def markdown(results: SweepResults) -> str:
    """The table and what is not finished, in Markdown, without a heading."""
    header, body = rows(results)
    lines = [header, ["---"] * len(header), *body]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    loose = "".join(f"* {line}\n" for line in unfinished(results))
    return f"{LEGEND} Base: `{results.base}`.\n\n{table}" + (f"\n{loose}" if loose else "")


def as_csv(results: SweepResults) -> str:
    """One line a point, with all settings and figures as they are."""
    keys = list(dict.fromkeys(k for point in results.points for k in point.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fixed = ["point", "seed", "status", "step", "steps", "tokens", "seconds"]
    writer.writerow([*fixed, *keys, *results.measured])
    for p in results.points:
        seed = "" if p.seed is None else p.seed
        start = [p.name, seed, p.status, p.step, p.steps, p.tokens, round(p.seconds, 3)]
        settings = [show_value(p.settings[key]) if key in p.settings else "" for key in keys]
        writer.writerow([*start, *settings, *(p.values.get(n, "") for n in results.measured)])
    return text.getvalue()


def write_results(results: SweepResults, output: Path) -> list[Path]:
    """Writes sweep.json, .md, .csv and, if anything was measured, .png; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    files = [output / RESULTS, output / f"{STEM}.md", output / f"{STEM}.csv"]
    picture = output / f"{STEM}.png"
    drawn = draw_sweep(results, picture)
    image = f"\n![{results.name}]({picture.name})\n" if drawn else ""
    texts = (results.to_json(), f"# {results.name}\n\n{markdown(results)}{image}", as_csv(results))
    for path, text in zip(files, texts, strict=True):
        write_whole(path, text)
    return [*files, picture] if drawn else files
