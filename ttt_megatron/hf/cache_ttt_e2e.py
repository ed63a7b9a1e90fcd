"""What a TTT-E2E model remembers of the texts it reads, row by row.

Each row has its own fast weights, the keys and values its next tokens can see, and the chunk that
is not full yet. None of it grows with the number of tokens read (but for full attention). Keys
and values lie in rings: a token at position p in slot p mod `ring`, which is window − 1 + chunk.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configuration_ttt_e2e import TTTE2EConfig
from .state_ttt_e2e import SequenceState, load_state, save_state

_FIRST_CAPACITY = 64


class TTTE2ECache:
    """The state of `batch` texts, each at its own position.

    Attributes:
        positions: tokens read by each row.
        steps: inner steps taken by each row.
        learns: whether rows take inner steps.
        capacity: slots of the rings there is memory for; one more takes what nobody reads.
        columns: columns of `input_ids` seen, padding included, since `count_from_here`.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (True,)

    def __init__(self, config: TTTE2EConfig, batch: int = 1, ttt: bool | None = None) -> None:
        """Rows that have read nothing; `ttt` None is what the configuration says."""
        inner = config.inner
        self.config = config
        self.chunk: int = inner["chunk_size"]
        self.window: int | None = inner["window_size"]
        self.learns = config.learns if ttt is None else ttt and inner["num_suffix_layers"] > 0
        self.ring = None if self.window is None else self.window - 1 + self.chunk
        self._clear(batch)

    def _clear(self, batch: int) -> None:
        self.positions = [0] * batch
        self.steps = [0] * batch
        self.columns = 0
        self.capacity = 0
        self.fast: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.pending_tokens: Tensor | None = None
        self.pending_entered: Tensor | None = None
        self.last_hidden: Tensor | None = None
        self._rounded: list[Tensor] = []

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in [*self._tensors(), *self._rounded])

    def pending(self, row: int) -> int:
        """Tokens of a row's chunk that no inner step was taken on yet."""
        return self.positions[row] - self.chunk * self.steps[row] if self.learns else 0

    # What generate() asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that later calls are to leave out."""
        return self.columns

    def count_from_here(self) -> "TTTE2ECache":
        """Later `input_ids` hold only what follows, not what was read so far. Returns self."""
        self.columns = 0
        return self

    def crop(self, max_length: int) -> None:
        """Raises ValueError: what was learnt cannot be taken back."""
        raise ValueError(
            f"the cache cannot be cropped to {max_length}: fast weights keep what they learnt; "
            "clone() the cache before reading what may have to go"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on as the row beam_idx[i] was."""
        self.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.reorder(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, copies side by side."""
        self.reorder([row for row in range(self.batch) for _ in range(repeats)])

    # Rows.

    def reset(self) -> "TTTE2ECache":
        """Forget everything. Returns self."""
        self._clear(self.batch)
        return self

    def clone(self) -> "TTTE2ECache":
        """An independent copy."""
        return self.select(range(self.batch))

    def detach(self) -> "TTTE2ECache":
        """Returns self: a cache holds no tensor that gradients flow through."""
        return self

    def select(self, rows: Sequence[int]) -> "TTTE2ECache":
        """An independent cache of these rows, in this order; a row may come more than once."""
        chosen = copy.copy(self)
        chosen.reorder(rows)
        return chosen

    def reorder(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        wrong = [row for row in rows if not 0 <= row < self.batch]
        if wrong:
            raise IndexError(f"the cache has {self.batch} rows and none with the index {wrong[0]}")
        index = torch.tensor(list(rows), dtype=torch.int64)
        self.positions = [self.positions[row] for row in rows]
        self.steps = [self.steps[row] for row in rows]
        self._map(lambda x: x.index_select(0, index.to(x.device)))

    def put(self, rows: Sequence[int], part: "TTTE2ECache") -> None:
        """Rows go on as those of `part`, which `select` made."""
        if part.fast and not self.fast:
            raise ValueError("begin_learning() has to be called before rows are selected to learn")
        capacity = max(self.capacity, part.capacity)
        self._reserve(capacity)
        part._reserve(capacity)
        mine = self._named()
        for name, new in part._named().items():
            if name not in mine:
                mine[name] = new.new_zeros(self.batch, *new.shape[1:])
            own = mine[name]
            own[torch.tensor(list(rows), device=own.device)] = new
        self._set(mine)
        for row, position, steps in zip(rows, part.positions, part.steps, strict=True):
            self.positions[row], self.steps[row] = position, steps

    @staticmethod
    def stack(caches: Sequence["TTTE2ECache"]) -> "TTTE2ECache":
        """One cache with the rows of several of one model, alike in whether they learn.

        Raises ValueError if some have fast weights of their own and some do not.
        """
        first = caches[0]
        if any(cache.learns != first.learns for cache in caches):
            raise ValueError("caches with and without inner steps do not go into one batch")
        if len({bool(cache.fast) for cache in caches}) > 1:
            raise ValueError("begin_learning() has to be called on every cache before they stack")
        stacked = TTTE2ECache(first.config, sum(cache.batch for cache in caches), first.learns)
        stacked.capacity = max(cache.capacity for cache in caches)
        for cache in caches:
            cache._reserve(stacked.capacity)
        parts = [cache._named() for cache in caches]
        shapes = {name: x for part in parts for name, x in part.items()}
        stacked._set(
            {
                name: torch.cat(
                    [
                        part.get(name, like.new_zeros(cache.batch, *like.shape[1:]))
                        for part, cache in zip(parts, caches, strict=True)
                    ]
                )
                for name, like in shapes.items()
            }
        )
        stacked.positions = [p for cache in caches for p in cache.positions]
        stacked.steps = [n for cache in caches for n in cache.steps]
        return stacked

    # The file of one row.

    def save(
        self, path: str | Path, model: Any, row: int = 0, change: str = "exact"
    ) -> dict[str, Any]:
        """Write a row's state for later: fast weights, window, position; returns what was written.

        `change`: exact; bf16, the change of the fast weights rounded; rank:R, its largest R
        directions. Read the text again by `load(path, model)`.
        """
        initial = model.initial_fast_weights() if self.learns else []
        return save_state(
            path, self.state(row, initial), base=model.base_hash(), initial=initial, change=change
        )

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "TTTE2ECache":
        """A cache of one row from a file; ValueError if it was written for another model."""
        cache = cls(model.config)
        initial = model.initial_fast_weights() if cache.learns else []
        state = load_state(path, base=model.base_hash(), initial=initial, dtype=model.dtype)
        return cls.from_state(model.config, state, model.device)

    def state(self, row: int, initial: Sequence[Tensor]) -> SequenceState:
        """A row's state; `initial` are the fast weights a row starts from. ValueError if empty."""
        position, pending = self.positions[row], self.pending(row)
        if position == 0 or self.last_hidden is None:
            raise ValueError(f"row {row} of the cache has read nothing yet: there is no state")
        fast = [w[row] for w in self.fast] or [w.clone() for w in initial]
        suffix = self.config.inner["num_suffix_layers"]
        first_later = self.config.num_hidden_layers - suffix + 1 if self.learns else len(self.keys)
        kv = []
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            start = position - pending if layer >= first_later else position
            reach = start if self.window is None else min(start, self.window - 1)
            held = torch.arange(start - reach, position, device=keys.device)
            slots = held if self.ring is None else held % self.ring
            kv.append((keys[row, slots], values[row, slots]))
        hidden = self.last_hidden[row]
        tokens, entered = torch.empty(0, dtype=torch.int64), hidden.new_empty(0, len(hidden))
        if self.pending_tokens is not None and self.pending_entered is not None:
            tokens = self.pending_tokens[row, :pending]
            entered = self.pending_entered[row, :pending]
        return SequenceState(
            position=position,
            steps=self.steps[row],
            fast=fast if self.learns else [],
            kv=kv,
            pending_tokens=tokens.clone(),
            pending_entered=entered.clone(),
            last_hidden=hidden.clone(),
        )

    @classmethod
    def from_state(
        cls, config: TTTE2EConfig, state: SequenceState, device: torch.device | str = "cpu"
    ) -> "TTTE2ECache":
        """A cache of one row that goes on from a state."""
        cache = cls(config, 1, ttt=bool(state.fast))
        cache.positions, cache.steps = [state.position], [state.steps]
        cache.fast = [w.unsqueeze(0).to(device, copy=True) for w in state.fast]
        cache.grow(state.position)
        for layer, (keys, values) in enumerate(state.kv):
            held = torch.arange(state.position - len(keys), state.position, device=device)
            k, v = (x.unsqueeze(0).to(device) for x in (keys, values))
            cache.write(layer, k, v, cache.slots(held.unsqueeze(0)))
        pending = len(state.pending_tokens)
        if cache.learns:
            cache._make_pending(state.pending_entered.unsqueeze(0).to(device))
            assert cache.pending_tokens is not None
            assert cache.pending_entered is not None
            cache.pending_tokens[0, :pending] = state.pending_tokens.to(device)
            cache.pending_entered[0, :pending] = state.pending_entered.to(device)
        cache.last_hidden = state.last_hidden.unsqueeze(0).to(device, copy=True)
        return cache

    # What reading does to it.

    def begin_learning(self, initial: Sequence[Tensor]) -> None:
        """Give every row fast weights of its own, if rows take inner steps and have none yet."""
        if self.learns and not self.fast:
            self.fast = [w.detach().expand(self.batch, *w.shape).clone() for w in initial]

    def fast_weights(self, dtype: torch.dtype) -> list[Tensor]:
        """The rows' fast weights in a dtype; none while all rows have the initial ones."""
        if not self.fast or self.fast[0].dtype == dtype:
            return self.fast
        if not self._rounded or self._rounded[0].dtype != dtype:
            self._rounded = [w.to(dtype) for w in self.fast]
        return self._rounded

    def fast_weights_moved(self) -> None:
        """Tell that `fast` was changed in place."""
        self._rounded = []

    def starts(self, device: torch.device) -> Tensor:
        """The rows' positions, [b, 1] int64."""
        return torch.tensor(self.positions, device=device).unsqueeze(1)

    def key_positions(self, last: Tensor) -> Tensor:
        """Which position each slot holds once last [b, 1] is written: [b, capacity].

        −1 or less where it holds none.
        """
        slots = torch.arange(self.capacity, device=last.device)
        if self.ring is None:
            return slots.where(slots <= last, -1)
        return last - (last - slots) % self.ring

    def grow(self, length: int) -> None:
        """Make room for texts of so many tokens, or for as many as a ring holds."""
        needed = length if self.ring is None else min(length, self.ring)
        if needed > self.capacity:
            wanted = max(needed, 2 * self.capacity, _FIRST_CAPACITY)
            self._reserve(wanted if self.ring is None else min(wanted, self.ring))

    def slots(self, positions: Tensor, used: Tensor | None = None) -> Tensor:
        """Where tokens at positions [b, T] are kept; those not used are thrown away."""
        slots = positions if self.ring is None else positions % self.ring
        return slots if used is None else slots.where(used, self.capacity)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store keys and values [b, T, n_kv, d] in slots [b, T]."""
        self.make_rings(layer, k)
        index = slots[..., None, None].expand_as(k)
        self.keys[layer].scatter_(1, index, k)
        self.values[layer].scatter_(1, index, v)

    def make_rings(self, layer: int, like: Tensor) -> None:
        """The rings of a layer, if it has none yet; layers come in turn."""
        if layer == len(self.keys):
            shape = (self.batch, self.capacity + 1, *like.shape[-2:])
            self.keys.append(like.new_zeros(shape))
            self.values.append(like.new_zeros(shape))

    def hold(self, tokens: Tensor, entered: Tensor, used: Tensor) -> None:
        """Add to the rows' chunks those of tokens [b, T] that are used, and entered [b, T, H]."""
        self._make_pending(entered)
        assert self.pending_tokens is not None
        assert self.pending_entered is not None
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        held = [self.pending(row) for row in range(self.batch)]
        slots = torch.tensor(held, device=tokens.device).unsqueeze(1) + offsets
        slots = slots.where(used, self.chunk)
        self.pending_tokens.scatter_(1, slots, tokens)
        self.pending_entered.scatter_(1, slots[..., None].expand_as(entered), entered)

    def advance(self, sizes: Sequence[int]) -> None:
        """Count so many more tokens as read by each row."""
        self.positions = [old + new for old, new in zip(self.positions, sizes, strict=True)]

    def _make_pending(self, entered: Tensor) -> None:
        if self.pending_tokens is None:
            shape = (self.batch, self.chunk + 1)
            self.pending_tokens = entered.new_zeros(shape, dtype=torch.int64)
            self.pending_entered = entered.new_zeros(*shape, entered.shape[-1])

    def _reserve(self, capacity: int) -> None:
        """At least so many slots in every ring; what is in slots stays there."""
        missing = capacity - self.capacity
        if missing <= 0:
            return

        def longer(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)

        self.keys, self.values = [longer(x) for x in self.keys], [longer(x) for x in self.values]
        self.capacity = capacity

    def _named(self) -> dict[str, Tensor]:
        named = {f"fast.{i}": x for i, x in enumerate(self.fast)}
        named |= {f"keys.{i}": x for i, x in enumerate(self.keys)}
        named |= {f"values.{i}": x for i, x in enumerate(self.values)}
        single = {
            "pending_tokens": self.pending_tokens,
            "pending_entered": self.pending_entered,
            "last_hidden": self.last_hidden,
        }
        return named | {name: x for name, x in single.items() if x is not None}

    def _set(self, named: dict[str, Tensor]) -> None:
        for kind in ("fast", "keys", "values"):
            count = sum(name.startswith(f"{kind}.") for name in named)
            setattr(self, kind, [named[f"{kind}.{i}"] for i in range(count)])
        for name in ("pending_tokens", "pending_entered", "last_hidden"):
            setattr(self, name, named.get(name))
        self._rounded = []

    def _tensors(self) -> list[Tensor]:
        return list(self._named().values())

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self._set({name: function(x) for name, x in self._named().items()})
