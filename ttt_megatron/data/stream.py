"""The endless, seeded sequence of rows that a run reads, and the position in it.

Rows are numbered over the whole run and over all processes: row n is row n mod R of epoch
n div R, where an epoch has R rows. Step s of a run with global batch B reads rows sB to
(s + 1)B − 1, of which data-parallel rank r of W takes the r-th of W equal, contiguous parts. The
position is therefore one number that does not know how many processes there were.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ttt_megatron.data.dataset import TokenDataset
from ttt_megatron.data.packing import EpochPlan, Packing, epoch_plan, rows_per_epoch
from ttt_megatron.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    Attributes:
        tokens: inputs, int64 [b, T].
        targets: the token after each input, int64 [b, T].
        mask: bool [b, T], False where the target is BOS (the next document's start is not to be
            predicted).
        rows: global row numbers, int64 [b].
        documents: document and token offset in it where each row starts, int64 [b, 2].
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    documents: torch.Tensor

    @classmethod
    def from_rows(
        cls,
        sequences: Sequence[np.ndarray],
        bos_id: int,
        rows: Sequence[int],
        documents: Sequence[tuple[int, int]],
    ) -> "Batch":
        """Builds a batch from rows of T + 1 tokens each."""
        stacked = torch.from_numpy(np.stack(sequences))
        targets = stacked[:, 1:].contiguous()
        return cls(
            tokens=stacked[:, :-1].contiguous(),
            targets=targets,
            mask=targets != bos_id,
            rows=torch.tensor(rows, dtype=torch.int64),
            documents=torch.tensor(documents, dtype=torch.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> "Batch":
        """Some of the rows, as views."""
        return Batch(
            self.tokens[rows],
            self.targets[rows],
            self.mask[rows],
            self.rows[rows],
            self.documents[rows],
        )

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` rows, in order; the last may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch with tokens, targets and mask on `device`; the bookkeeping stays."""
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
            self.rows,
            self.documents,
        )


def rank_rows(position: int, global_batch: int, rank: int, world: int) -> range:
    """The global rows of rank `rank` in a step that reads `global_batch` of them from `position`.

    Raises UserError if `world` does not divide `global_batch`.
    """
    if global_batch < 1 or global_batch % world:
        raise UserError(
            f"training.global_batch_size={global_batch} must be a positive multiple of the "
            f"{world} data-parallel processes"
        )
    share = global_batch // world
    return range(position + rank * share, position + (rank + 1) * share)


class TokenStream:
    """Rows of `dataset` at one sequence length, and the number of rows read so far.

    Attributes:
        rows: global rows read since the run's start; `next_batch` advances it.
        rows_per_epoch: R.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        packing: Packing = "concatenate",
        seed: int = 0,
    ) -> None:
        """Raises UserError if the split has too little text for one row, or a value is bad."""
        if sequence_length < 1:
            raise UserError(f"data.sequence_length={sequence_length} must be at least 1")
        if packing not in ("concatenate", "spans"):
            raise UserError(f"data.packing={packing} must be concatenate or spans")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.packing = packing
        self.seed = seed
        self.rows = 0
        self.rows_per_epoch = rows_per_epoch(dataset, sequence_length, packing)
        self._lock = threading.Lock()
        # Two, since a batch may lie across the end of an epoch.
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    @property
    def epoch(self) -> float:
        """Epochs read so far."""
        return self.rows / self.rows_per_epoch

    def read_rows(self, first: int, count: int) -> Batch:
        """Global rows `first` to `first + count` − 1, wherever the stream stands."""
        sequences, documents = [], []
        for row in range(first, first + count):
            epoch, within = divmod(row, self.rows_per_epoch)
            with self._lock:
                plan = self._plan(epoch)
            parts = [self.dataset.read(*piece) for piece in plan.pieces(within)]
            sequences.append(np.concatenate(parts))
            documents.append(plan.start(within))
        rows = range(first, first + count)
        return Batch.from_rows(sequences, self.dataset.bos_id, rows, documents)

    def batch(self, position: int, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank `rank`'s part of the global rows `position` to `position + global_batch` − 1.

        Raises UserError if `world` does not divide `global_batch`.
        """
        rows = rank_rows(position, global_batch, rank, world)
        return self.read_rows(rows.start, len(rows))

    def next_batch(self, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
        """`batch` at the stream's position, which moves on by `global_batch` on every rank."""
        batch = self.batch(self.rows, global_batch, rank, world)
        self.rows += global_batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in; equal on all ranks."""
        return {"rows": self.rows, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a saved position.

        Raises UserError if it was taken in other data or with other settings.
        """
        for key, value in self._identity().items():
            if state.get(key) == value:
                continue
            if key == "fingerprint":
                raise UserError(
                    f"the data in {self.dataset.path} is not the data of the saved position "
                    f"(fingerprint {value[:12]}, saved {str(state.get(key))[:12]}): restore the "
                    "data, or start a new run from the weights with training.init_from"
                )
            raise UserError(
                f"data.{key}={value} differs from the saved position's {state.get(key)}: set it "
                "back, or start a new run from the weights with training.init_from"
            )
        self.rows = int(state["rows"])

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.dataset.fingerprint,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            "seed": self.seed,
        }

    def _make_plan(self, epoch: int) -> EpochPlan:
        return epoch_plan(
            self.dataset.lengths, self.sequence_length, self.packing, self.seed, epoch
        )
