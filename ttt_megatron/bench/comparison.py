"""This run's medians over an earlier one's."""

from ttt_megatron.bench.cells import Table, duration
from ttt_megatron.bench.results import Report


def same_device(new: Report, old: Report) -> bool:
    """Whether both were measured on devices of one name."""
    return bool(new.about.get("device") == old.about.get("device"))


def compare(new: Report, old: Report) -> Table:
    """A row for every case measured in both; ratios below 1 are faster now."""
    before = {one.key: one for one in old.results if one.median}
    rows = []
    for one in new.results:
        other = before.get(one.key)
        if one.median is None or other is None or other.median is None:
            continue
        what = ", ".join(filter(None, (one.operation, one.shape, one.precision)))
        name = ", ".join(filter(None, (one.name, one.way, one.settings)))
        ratio = f"{one.median / other.median:.2f}"
        rows.append((what, name, duration(other.median), duration(one.median), ratio))
    note = "" if rows else "no case was measured in both"
    if not same_device(new, old):
        warning = (
            "DIFFERENT DEVICES, so that ratios compare machines, not code: "
            f"{old.about.get('device')} then, {new.about.get('device')} now"
        )
        note = f"{warning}; {note}" if note else warning
    return Table(
        title=f"Against {old.about.get('date')}, commit {old.about.get('commit') or 'unknown'}",
        columns=("case", "by", "then", "now", "now / then"),
        rows=rows,
        left=2,
        note=note,
    )
