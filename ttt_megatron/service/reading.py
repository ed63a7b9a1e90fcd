"""Rows that are read together: their states in one cache, one call of the model for all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.service.rows import Row
from ttt_megatron.service.served_model import ServedModel


class Batch:
    """Rows whose states are in one cache, as long as they stay together."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._cache: TTTE2ECache | None = None
        self.rows: list[Row] = []

    def arrange(self, wanted: Sequence[Row]) -> None:
        """Have these rows, in whatever order; those that leave take their state with them."""
        staying = [row for row in self.rows if row in wanted]
        coming = [row for row in wanted if row not in self.rows]
        if len(staying) == len(self.rows) and not coming:
            return
        caches = self._split(staying) + [row.take_cache() for row in coming]
        self.rows = staying + coming
        # One cache is taken as it is, and so is not copied at every piece of a long prompt.
        self._cache = None if not caches else caches[0]
        if len(caches) > 1:
            self._cache = TTTE2ECache.stack(caches)

    def read(self, pieces: Sequence[Sequence[int]]) -> None:
        """Read a piece in each row; sets the rows' logits, or their error if the model fails.

        What makes a batch fail may lie in one row: the others then go on alone.
        """
        if self._cache is None:
            return
        before = list(self._cache.positions)
        try:
            logits = _read(self._served, self._cache, pieces)
        except Exception as error:
            self._read_alone(pieces, before, error)
            return
        for index, row in enumerate(self.rows):
            row.logits = logits[index]
            row.reached(self._cache.positions[index], self._cache.steps[index])

    def _split(self, staying: list[Row]) -> list[TTTE2ECache]:
        """Gives leaving rows their states; returns that of the staying, if any."""
        if self._cache is None:
            return []
        if len(self.rows) == 1:
            if staying:
                return [self._cache]
            self.rows[0].cache = self._cache
            return []
        for index, row in enumerate(self.rows):
            if row not in staying and row.needs_state:
                row.cache = self._cache.select([index])
        kept = [index for index, row in enumerate(self.rows) if row in staying]
        if len(kept) == len(self.rows):
            return [self._cache]
        return [self._cache.select(kept)] if kept else []

    def _read_alone(
        self, pieces: Sequence[Sequence[int]], before: list[int], error: Exception
    ) -> None:
        rows = self.rows
        self.arrange([])
        for row, piece, start in zip(rows, pieces, before, strict=True):
            cache = row.cache
            assert cache is not None
            try:
                if len(rows) == 1:
                    raise error
                # The failed call may have read a part.
                rest = list(piece)[cache.positions[0] - start :]
                row.logits = (
                    _read(self._served, cache, [rest])[0] if rest else self._served.logits(cache)
                )
            except Exception as own:
                row.fail(own)
            row.reached(cache.positions[0], cache.steps[0])


def _read(served: ServedModel, cache: TTTE2ECache, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Read pieces of any lengths; scores after the last token of each, [b, V] on the CPU."""
    longest = max(map(len, pieces))
    # Filled up on the left: the last column is every row's last token.
    tokens = torch.tensor([[0] * (longest - len(piece)) + list(piece) for piece in pieces])
    mask = torch.tensor([[0] * (longest - len(piece)) + [1] * len(piece) for piece in pieces])
    device = served.model.device
    with torch.no_grad():
        out = served.model(
            tokens.to(device), mask.to(device), cache=cache, use_cache=True, logits_to_keep=1
        )
    logits: Tensor = out.logits[:, -1].cpu()
    return logits
