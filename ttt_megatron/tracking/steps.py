"""Which steps are known already."""

import bisect


class StepSet:
    """A set of step numbers that mostly grows at its end: ranges, not single numbers."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __contains__(self, step: int) -> bool:
        place = bisect.bisect_right(self._starts, step) - 1
        return place >= 0 and step < self._stops[place]

    def cut(self, last: int) -> None:
        """Forgets the steps after `last`."""
        keep = bisect.bisect_right(self._starts, last)
        del self._starts[keep:], self._stops[keep:]
        if self._stops:
            self._stops[-1] = min(self._stops[-1], last + 1)

    def add(self, step: int) -> None:
        """Adds a step."""
        if step in self:
            return
        place = bisect.bisect_right(self._starts, step)
        joins_before = place > 0 and self._stops[place - 1] == step
        joins_after = place < len(self._starts) and self._starts[place] == step + 1
        if joins_before and joins_after:
            self._stops[place - 1] = self._stops.pop(place)
            self._starts.pop(place)
        elif joins_before:
            self._stops[place - 1] = step + 1
        elif joins_after:
            self._starts[place] = step
        else:
            self._starts.insert(place, step)
            self._stops.insert(place, step + 1)
