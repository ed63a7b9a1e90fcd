"""A stream of tokens read, in pieces of any size, by a model that learns while it reads.

Fast weights stay as they are until a chunk is full *and* the token after its last is known, which
is that one's target. Then one clipped SGD step is taken on the chunk's loss. Keys and values stay
as first computed. Tokens the model generated are read like any others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_kernels import RoundedWeights, using
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.forward_sweep import SweepState, new_report, step_through_chunk
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.problem import Problem, chunk_token_weights
from ttt_megatron.model.attention import KV
from ttt_megatron.model.transformer import LanguageModel
from ttt_megatron.serving.stream_kv import StreamKV

# What no fast weight can reach runs over whole chunks together, up to about this many tokens.
_SPAN_TOKENS = 1024


@dataclass(frozen=True)
class _PendingChunk:
    """The part of the current chunk that was read.

    tokens [b, k] int64; entered [b, k, H] the output of `enter_suffix`; start: the absolute
    position of the chunk's first token.
    """

    start: int
    tokens: Tensor
    entered: Tensor

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def extended(self, tokens: Tensor, entered: Tensor) -> "_PendingChunk":
        """With more tokens read."""
        return _PendingChunk(
            self.start, torch.cat((self.tokens, tokens), 1), torch.cat((self.entered, entered), 1)
        )


class Session:
    """Sequences in lock step, each with its own fast weights and cache.

    The state is constant in the number of tokens read: the window of every layer, the fast
    weights, the chunk that is not full yet. (Full attention, `window_size` None, keeps all.)

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
        learner.begin_reading(self.inner_steps)
        self.reset()

    def reset(self) -> None:
        """Forget everything read: initial fast weights, empty caches, position 0."""
        model, window = self._model, self._model.config.window_size
        num_blocks = model.config.num_layers
        later = max(model.config.num_suffix_layers - 1, 0) if self.inner_steps else 0
        self.position = 0
        self.steps_taken = 0
        self.fast_weights: list[Tensor] = []
        if self.inner_steps:
            self.fast_weights = inner_step.for_sequences(self._initial_weights(), self.batch)
        self._rounded_fast, self._fast_moved = RoundedWeights(), True
        self._early_kv = StreamKV(num_blocks - later, window)
        self._later_kv = StreamKV(later, window)
        self._pending: _PendingChunk | None = None
        self._last_hidden: Tensor | None = None

    def clone(self) -> "Session":
        """An independent session in the same state: what one reads, the other does not see."""
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        # Inner steps move the fast weights in place; all other tensors are only ever replaced.
        twin.fast_weights = [w.clone() for w in self.fast_weights]
        twin._rounded_fast, twin._fast_moved = RoundedWeights(), True
        twin._early_kv, twin._later_kv = self._early_kv.copy(), self._later_kv.copy()
        return twin

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
        return own + self._early_kv.nbytes + self._later_kv.nbytes

    @property
    def _model(self) -> LanguageModel:
        return self._learner.model

    def _initial_weights(self) -> list[Tensor]:
        return [w.detach() for w in inner_step.flatten(self._model.initial_fast_weights())]

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
        past = self._early_kv.past(0)
        own: list[KV] = []
        for block, cached in zip(model.blocks(0, len(past)), past, strict=True):
            is_entry = self.inner_steps and len(own) == model.num_prefix_layers
            x, kv = (block.attend if is_entry else block)(x, rotation, cached)
            own.append(kv)
        self._early_kv.write(0, own)
        self._early_kv.close()
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
                whole = _PendingChunk(start + done, piece, x)
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
            self._pending = _PendingChunk(position, tokens.clone(), entered.clone())
        else:
            self._pending = pending.extended(tokens, entered)

    def _step(self, chunk: _PendingChunk, next_token: Tensor, logits: list[Tensor] | None) -> None:
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
