"""Evaluations that stand side by side, or are put together, must have measured the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttt_megatron.errors import UserError
from ttt_megatron.reporting.evaluations import Evaluation

# Longer values, such as all documents' names, would hide what the sentence says.
_MOST_SHOWN = 60


def refuse_other_measurements(
    found: Sequence[Evaluation],
    facts: Callable[[Evaluation], Mapping[str, Any]],
    options: str,
) -> None:
    """Checks one task's evaluations: `facts` are what they must have in common, by name, besides
    the data; `options`, in words, are those of `ttt-megatron evaluate` that set the facts.

    Raises UserError naming two files that differ, and in what.
    """
    for other in found[1:]:
        first, own = _with_data(found[0], facts), _with_data(other, facts)
        differing = [
            _in_words(name, own[name], value) for name, value in first.items() if own[name] != value
        ]
        if differing:
            raise UserError(
                f"{other.path} and {found[0].path} did not measure the same, but differ in "
                f"{', '.join(differing)}: evaluate both with the same data and {options}, or "
                "report them apart"
            )


def _with_data(one: Evaluation, facts: Callable[[Evaluation], Mapping[str, Any]]) -> dict[str, Any]:
    return {"data": one.about.get("data_fingerprint"), **facts(one)}


def _in_words(name: str, own: object, first: object) -> str:
    shown = f"{name} ({_show(own)} and {_show(first)})"
    return shown if len(shown) <= _MOST_SHOWN else name


def _show(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
