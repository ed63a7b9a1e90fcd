"""Decoded text under a judge, and the checks for leakage: a table each."""

from collections.abc import Sequence
from typing import Any

from ttt_megatron.evaluation.decoding import HELD_OUT
from ttt_megatron.evaluation.formatting import mean_cell
from ttt_megatron.evaluation.statistics import Mean
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.evaluations import Evaluation, read_evaluation
from ttt_megatron.reporting.runs import Group
from ttt_megatron.reporting.same_measurement import refuse_other_measurements
from ttt_megatron.reporting.section import Section

_NAN = float("nan")


def _evaluations(groups: Sequence[Group], task: str) -> list[tuple[str, Evaluation]]:
    """With the run's own label: these are not put together over seeds."""
    return [
        (run.label, found)
        for group in groups
        for run in group.runs
        if (found := read_evaluation(run, task)) is not None
    ]


def _mean(value: dict[str, Any] | None) -> Mean:
    if value is None or value["mean"] is None:
        return Mean(_NAN, _NAN, 0, 0)
    error = value["standard_error"]
    known = _NAN if error is None else error
    return Mean(value["mean"], known, value["documents"], value["tokens"])


def decode_section(groups: Sequence[Group]) -> Section | None:
    """The judge's loss on what each run decoded; None if none was evaluated.

    Raises UserError if two runs went on from other text, by other numbers of tokens or other seeds.
    """
    found = _evaluations(groups, "decode")
    if not found:
        return None
    options = "--length, --documents, --prefill, --decode and --seed"
    refuse_other_measurements([one for _, one in found], _decoded, options)
    rows, metrics = [], {}
    for label, one in found:
        for name, judged in one.values["judgements"].items():
            mean = _mean(judged["mean"])
            gap = "" if name == HELD_OUT else mean_cell(_mean(judged["minus_held_out"]), "+")
            judge = str(one.about.get("judge", ""))
            rows.append([f"{label}, {name}", mean_cell(mean), gap, one.values["unit"], judge])
            metrics[f"decode/{label}/{name}"] = mean.mean
    header = ["decoded by", "nats", "- held-out text", "a", "judge"]
    legends = dict.fromkeys(one.values["legend"] for _, one in found)
    return Section(
        title="Decoded text under a judge",
        text="\n\n".join(legends),
        grids=[Grid(title="", header=header, rows=rows)],
        metrics=metrics,
    )


def _decoded(one: Evaluation) -> dict[str, Any]:
    """What was gone on from, and how far."""
    names = ("documents", "prefill", "decoded")
    return {**{name: one.values[name] for name in names}, "seed": one.about.get("seed")}


def leakage_section(groups: Sequence[Group]) -> Section | None:
    """Whether losses depend on what they must not; None if none was evaluated.

    Raises UserError if two runs read other documents, or other parts of them.
    """
    found = _evaluations(groups, "leakage")
    if not found:
        return None
    options = "--length, --documents and --last"
    refuse_other_measurements([one for _, one in found], _read_for_leakage, options)
    rows = []
    for label, one in found:
        for way, each in one.values["ways"].items():
            before = max(check["largest_change_before"] for check in each["causality"])
            content = each["content"][0] if each["content"] else {}
            rows.append(
                [
                    f"{label}, {way}",
                    "no leak" if each["holds"] else "LEAKS",
                    f"{before:.1e}",
                    f"{each['isolation']['largest_change_beside']:.1e}",
                    mean_cell(_mean(each["isolation"]["behind_another"]), "+"),
                    mean_cell(_mean(content.get("shuffled")), "+"),
                    mean_cell(_mean(content.get("foreign")), "+"),
                ]
            )
    header = ["", "verdict", "largest change before a changed token", "beside other documents"]
    header += ["behind another document", "context shuffled", "another document's context"]
    legends = dict.fromkeys(one.values["legend"] for _, one in found)
    return Section(
        title="Checks for leakage",
        text="\n\n".join(legends),
        grids=[Grid(title="", header=header, rows=rows)],
    )


def _read_for_leakage(one: Evaluation) -> dict[str, Any]:
    """What was read, and the part of it that was measured."""
    names = ("documents", "last")
    return {**{name: one.values[name] for name in names}, "length": one.about.get("length")}
