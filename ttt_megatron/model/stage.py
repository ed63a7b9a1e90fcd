"""Which blocks of the model a process holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks, first … stop−1.

    `is_first`: with the embedding before them; `is_last`: with the whole suffix among them, and
    the output head behind.
    """

    first: int
    stop: int
    is_first: bool = True
    is_last: bool = True


def stages(blocks: list[int], num_suffix_layers: int) -> list[Stage]:
    """The stages that hold so many prefix blocks each; the last one holds the suffix as well."""
    found: list[Stage] = []
    first = 0
    for index, count in enumerate(blocks):
        is_last = index == len(blocks) - 1
        stop = first + count + (num_suffix_layers if is_last else 0)
        found.append(Stage(first, stop, is_first=index == 0, is_last=is_last))
        first = stop
    return found
