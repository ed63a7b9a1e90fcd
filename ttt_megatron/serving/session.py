"""A stream of tokens read, in pieces of any size, by a model that learns while it reads.

Fast weights stay as they are until a chunk is full *and* the token after its last is known, which
is that one's target. Then one clipped SGD step is taken on the chunk's loss. Keys and values stay
as first computed. Tokens the model generated are read like any others.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import RoundedWeights, using
from ttt_megatron import __version__
from ttt_megatron.hf.state_ttt_e2e import SequenceState, load_state, save_state
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.forward_sweep import SweepState, new_report, step_through_chunk
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.problem import Problem, chunk_token_weights
from ttt_megatron.model.attention import KV
from ttt_megatron.model.transformer import LanguageModel
from ttt_megatron.serving.pending_chunk import PendingChunk
from ttt_megatron.serving.session_state import (
    BaseModel,
    refuse_misfits,
    refuse_other_mixers,
)
from ttt_megatron.serving.stream_kv import StreamKV
from ttt_megatron.serving.stream_memory import StreamMemory

# What no fast weight can reach runs over whole chunks together, up to about this many tokens.
_SPAN_TOKENS = 1024


class Session:
    """Sequences in lock step, each with its own fast weights and cache.

    The state is constant in the number of tokens read: the window of every layer, the fast
    weights, the chunk that is not full yet. (Attention without a window keeps all.)
    None of its tensors holds a graph, and no row depends on another.

    Attributes:
        batch: sequences.
        position: tokens read.
        inner_steps: whether inner steps are taken.
        steps_taken: inner steps so far.
        fast_weights: one tensor [b, out, in] a fast weight, in the parameters' dtype.
    """

    def __init__(
        self,
        learner: Learner,
        batch: int = 1,
        inner_steps: bool | None = None,
        *,
        bos_id: int | None = None,
    ) -> None:
        """`inner_steps` None takes the mode's: all but `off` step.

        Predicting a token `bos_id` is no part of a chunk's loss, as in training; None masks none.
        The learner's parameters must not change while the session lives.
        """
        model = learner.model
        if inner_steps is None:
            inner_steps = learner.inner.mode != "off"
        self.batch = batch
        self.inner_steps = inner_steps and model.config.num_suffix_layers > 0
        self._learner = learner
        self._bos_id = bos_id
        self._settings = learner.settings(learner.inner.lr, learner.inner.chunk_size)
        self._base = BaseModel(learner, bos_id)
        learner.begin_reading(self.inner_steps)
        self.reset()

    def reset(self) -> None:
        """Forget everything read: initial fast weights, empty caches, position 0."""
        config = self._model.config
        later = max(config.num_suffix_layers - 1, 0) if self.inner_steps else 0
        self.position = 0
        self.steps_taken = 0
        initial = self._initial_weights() if self.inner_steps else []
        self._set_fast_weights(inner_step.for_sequences(initial, self.batch))
        early = config.mixer_kinds[: config.num_layers - later]
        self._early = StreamMemory(early, config.window_size)
        self._later_kv = StreamKV(later, config.window_size)
        self._pending: PendingChunk | None = None
        self._last_hidden: Tensor | None = None

    def clone(self) -> "Session":
        """An independent session in the same state: what one reads, the other does not see."""
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        # Inner steps move the fast weights in place; all other tensors are only ever replaced.
        twin._set_fast_weights([w.clone() for w in self.fast_weights])
        twin._early, twin._later_kv = self._early.copy(), self._later_kv.copy()
        return twin

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; one named twice goes on as two.

        Raises ValueError for no rows, IndexError for one that is not there.
        """
        if not rows:
            raise ValueError("no rows: a session keeps at least one")
        if min(rows) < 0 or max(rows) >= self.batch:
            raise IndexError(f"rows {list(rows)} of a session of {self.batch}")
        index = torch.tensor(list(rows), device=self._model.head_weight.device)
        self.batch = len(rows)
        self._set_fast_weights([w.index_select(0, index) for w in self.fast_weights])
        self._early.select(index)
        self._later_kv.select(index)
        if self._pending is not None:
            self._pending = self._pending.selected(index)
        if self._last_hidden is not None:
            self._last_hidden = self._last_hidden.index_select(0, index)

    def state(self, row: int = 0) -> SequenceState:
        """All that reading left behind in one row, in tensors of its own, on their device.

        Raises ValueError if nothing was read, StateError for a model that has other mixers than
        attention over its window.
        """
        refuse_other_mixers(self._model.config)
        if self._last_hidden is None:
            raise ValueError("the session has read nothing yet")
        last_hidden = self._last_hidden[row].clone()
        tokens = torch.empty(0, dtype=torch.int64, device=last_hidden.device)
        entered = last_hidden.new_empty(0, len(last_hidden))
        if self._pending is not None:
            tokens, entered = self._pending.tokens[row], self._pending.entered[row]
        return SequenceState(
            position=self.position,
            steps=self.steps_taken,
            fast=[w[row].clone() for w in self.fast_weights],
            kv=[
                (kv.k[row].clone(), kv.v[row].clone())
                for kv in (*self._early.entries, *self._later_kv.entries)
            ],
            pending_tokens=tokens.clone(),
            pending_entered=entered.clone(),
            last_hidden=last_hidden,
        )

    def restore(self, states: Sequence[SequenceState]) -> None:
        """Go on where these sequences stood, one a row, whatever the session held before.

        What is read next gives the bits it would have given in the session the states are from,
        if that had the same rows. Raises StateError if a state is not of this model's shapes,
        of the other kind of session (with or without inner steps), or at another position than
        the first; the session is as it was then.
        """
        refuse_other_mixers(self._model.config)
        refuse_misfits(states, self._learner, self.inner_steps)
        first, device = states[0], self._model.head_weight.device

        def rows(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([x.detach().to(device) for x in tensors])

        self.batch, self.position, self.steps_taken = len(states), first.position, first.steps
        self._set_fast_weights([rows(w) for w in zip(*(s.fast for s in states), strict=True)])
        kv = [
            KV(rows(k for k, _ in layer), rows(v for _, v in layer))
            for layer in zip(*(s.kv for s in states), strict=True)
        ]
        held, early = len(first.pending_tokens), self._early.num_blocks
        self._early.restore(kv[:early])
        self._later_kv.restore(kv[early:], held)
        self._pending = None
        if held:
            tokens = rows(s.pending_tokens for s in states)
            entered = rows(s.pending_entered for s in states)
            self._pending = PendingChunk(self.position - held, tokens, entered)
        self._last_hidden = rows(s.last_hidden for s in states)

    def save(
        self, path: str | Path, row: int = 0, *, change: str = "exact"
    ) -> dict[str, float | int | str]:
        """Write one row's state to a file; `change` and what is returned are `save_state`'s."""
        return save_state(
            path,
            self.state(row),
            base=self._base.hash,
            initial=self._initial_weights(),
            change=change,
            created_by=f"ttt-megatron {__version__}",
        )

    def load(self, *paths: str | Path) -> None:
        """`restore` from files, one a row.

        Raises StateError, also for a file that is damaged or belongs to another model.
        """
        initial, dtype = self._initial_weights(), self._learner.compute_dtype
        base = self._base.hash
        self.restore([load_state(p, base=base, initial=initial, dtype=dtype) for p in paths])

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read [b, n] int64, n ≥ 1; returns the logits after each of them, [b, n, V].

        Logits are in the compute dtype. Raises ValueError for another shape or dtype, or a token
        outside the vocabulary.
        """
        logits: list[Tensor] = []
        with using(self._learner.rounded):
            self._read(tokens, logits)
        return torch.cat(logits, dim=1)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """`read` without the memory of all its logits: `next_logits`, [b, V]."""
        with using(self._learner.rounded):
            self._read(tokens, None)
        return self.next_logits

    @property
    def next_logits(self) -> Tensor:
        """The logits after the last token read, [b, V]; ValueError if nothing was read."""
        if self._last_hidden is None:
            raise ValueError("the session has read nothing yet")
        with torch.no_grad(), using(self._learner.rounded):
            return self._model.logits(self._last_hidden)

    @property
    def drift(self) -> Tensor:
        """‖W − W₀‖/‖W₀‖ of the fast weights, [b]; zeros without inner steps."""
        if not self.inner_steps:
            return self._model.head_weight.new_zeros(self.batch)
        initial = self._initial_weights()
        moved = [w - start for w, start in zip(self.fast_weights, initial, strict=True)]
        sum_parts = self._model.slots.sum_parts
        size = inner_step.norm([w.unsqueeze(0) for w in initial], sum_parts)
        return inner_step.norm(moved, sum_parts) / size

    @property
    def nbytes(self) -> int:
        """Bytes of the sequences' state: caches, fast weights, pending chunk."""
        tensors = list(self.fast_weights)
        if self._pending is not None:
            tensors += [self._pending.tokens, self._pending.entered]
        own = sum(x.numel() * x.element_size() for x in tensors)
        return own + self._early.nbytes + self._later_kv.nbytes

    @property
    def _model(self) -> LanguageModel:
        return self._learner.model

    def _initial_weights(self) -> list[Tensor]:
        return [w.detach() for w in inner_step.flatten(self._model.initial_fast_weights())]

    def _set_fast_weights(self, weights: list[Tensor]) -> None:
        self.fast_weights = weights
        self._rounded_fast, self._fast_moved = RoundedWeights(), True

    def _read(self, tokens: Tensor, logits: list[Tensor] | None) -> None:
        tokens = self._checked(tokens)
        chunk = self._settings.chunk_size
        span = chunk * max(1, _SPAN_TOKENS // chunk)
        done, length = 0, tokens.shape[1]
        while done < length:
            # Spans end where chunks do, so that a chunk read at once stays in one piece.
            stop = min(length, done + span - self.position % span)
            x = self._run_early_blocks(tokens[:, done:stop])
            if self.inner_steps:
                self._read_entered(tokens[:, done : stop + 1], x, logits)
            else:
                self._finish(self._model.final_norm(x), logits)
            self.position += stop - done
            done = stop

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)}: the session reads [{self.batch}, n ≥ 1]"
            )
        if tokens.dtype != torch.int64:
            raise ValueError(f"tokens of dtype {tokens.dtype}: the session reads int64")
        vocabulary = self._model.config.vocab_size or 0
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"token {wrong} is outside the vocabulary of {vocabulary}")
        return tokens.to(self._model.head_weight.device)

    def _run_early_blocks(self, tokens: Tensor) -> Tensor:
        """What no fast weight can reach, or all blocks where there are none: [b, n] → [b, n, H]."""
        model = self._model
        x = model.embed(tokens, self._learner.compute_dtype)
        rotation = model.rotations(self.position, tokens.shape[1], x)
        past = self._early.past()
        own: list[Any] = []
        for block, cached in zip(model.blocks(0, len(past)), past, strict=True):
            is_entry = self.inner_steps and len(own) == model.num_prefix_layers
            x, kv = (block.attend if is_entry else block)(x, rotation, cached)
            own.append(kv)
        self._early.advance(own)
        return x

    def _read_entered(self, tokens: Tensor, entered: Tensor, logits: list[Tensor] | None) -> None:
        """The suffix over [b, n, H], chunk by chunk; tokens are the n and, if known, the next."""
        size, done, length = self._settings.chunk_size, 0, entered.shape[1]
        start = self.position
        while done < length:
            if self._pending is not None and self._pending.length == size:
                self._step(self._pending, tokens[:, done : done + 1], None)
            held = 0 if self._pending is None else self._pending.length
            stop = min(length, done + size - held)
            x, piece = entered[:, done:stop], tokens[:, done:stop]
            if stop - done == size and stop < tokens.shape[1]:
                whole = PendingChunk(start + done, piece, x)
                self._step(whole, tokens[:, stop : stop + 1], logits)
            else:
                self._read_part(start + done, piece, x, logits)
            done = stop

    def _read_part(
        self, position: int, tokens: Tensor, entered: Tensor, logits: list[Tensor] | None
    ) -> None:
        """Read tokens that do not complete a chunk, or whose last one's target is not known yet."""
        pending = self._pending
        offset = 0 if pending is None else pending.length
        rotation = self._model.rotations(position, tokens.shape[1], entered)
        fast = inner_step.as_mlps(self.fast_weights)
        if self._fast_moved:
            self._rounded_fast.renew(self.fast_weights, self._learner.compute_dtype)
            self._fast_moved = False
        with using(self._rounded_fast):
            hidden, own = self._model.suffix(entered, rotation, self._later_kv.past(offset), fast)
        self._later_kv.write(offset, own)
        self._finish(hidden, logits)
        if pending is None:
            self._pending = PendingChunk(position, tokens.clone(), entered.clone())
        else:
            self._pending = pending.extended(tokens, entered)

    def _step(self, chunk: PendingChunk, next_token: Tensor, logits: list[Tensor] | None) -> None:
        """Take the inner step on a full chunk; its logits are appended if asked for."""
        targets = torch.cat((chunk.tokens[:, 1:], next_token.to(chunk.tokens.device)), dim=1)
        mask = torch.ones_like(targets) if self._bos_id is None else targets != self._bos_id
        weights = chunk_token_weights(mask, chunk.length)
        problem = Problem(
            model=self._model,
            settings=self._settings,
            targets=targets,
            token_weights=weights.to(
                torch.promote_types(self._learner.compute_dtype, torch.float32)
            ),
            rotation=self._model.rotations(chunk.start, chunk.length, chunk.entered),
            rounded=self._learner.rounded,
        )
        report = new_report(problem, () if logits is None else (0,))
        state = SweepState(self.fast_weights, self._later_kv)
        step_through_chunk(problem, chunk.entered, state, report, 0, record=False)
        if logits is not None:
            logits.append(report.logits[0])
        self._later_kv.close()
        self._pending = None
        self._fast_moved = True
        self.steps_taken += 1

    def _finish(self, hidden: Tensor, logits: list[Tensor] | None) -> None:
        self._last_hidden = hidden[:, -1].clone()
        if logits is not None:
            logits.append(self._model.logits(hidden))
