"""Sequences in parts: what attention over a part needs of the tokens before it."""

from ttt_megatron.model.attention import FindPast


class SequencePart:
    """A contiguous part of every sequence of a batch. This one is the whole of it."""

    start = 0
    """Position of the part's first token in its sequence."""

    def find_past(self) -> FindPast | None:
        """For one attention layer in one pass: how it finds the keys before the part, if any.

        Called again by a recomputed forward pass, the result must give the same keys again.
        """
        return None


WHOLE = SequencePart()
