"""Reading: tokens go through the blocks in pieces, and after each full chunk comes an inner step.

The fast weights of a row stay as they are until its chunk is full *and* the token after the last
is known, which is that one's target. Then one clipped SGD step is taken on the chunk's loss. Keys
and values stay as first computed. Rows are at positions of their own; a piece never goes beyond
the end of a row's chunk, and rows with fewer tokens than others are filled up with tokens that
nothing sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache_ttt_e2e import TTTE2ECache
from .configuration_ttt_e2e import TTTE2EConfig
from .layers_ttt_e2e import Block, FastMLP, RMSNorm, head_adjoint, rotation_table

Store = Callable[[Sequence[int], Sequence[int], Sequence[int], Tensor], None]
"""Takes rows, where their pieces start, how long they are, and final hidden states [r, m, H]."""


@dataclass(frozen=True)
class Network:
    """What reading needs of a model: embedding [V, H], blocks, final norm, head [V, H]."""

    config: TTTE2EConfig
    embedding: Tensor
    blocks: Sequence[Block]
    final_norm: RMSNorm
    head: Tensor

    @property
    def entry(self) -> int:
        """The first block with fast weights; its attention is the last no fast weight reaches."""
        return len(self.blocks) - int(self.config.inner["num_suffix_layers"])

    def initial_fast_weights(self) -> list[Tensor]:
        """fc1 and fc2 of every prime MLP, [out, in], in the dtype they are kept in."""
        mlps = [block.prime_mlp for block in self.blocks if block.prime_mlp is not None]
        kept = getattr(torch, self.config.inner["state_dtype"])
        return [
            linear.weight.detach().to(torch.promote_types(kept, linear.weight.dtype))
            for mlp in mlps
            for linear in (mlp.linear_fc1, mlp.linear_fc2)
        ]


@dataclass(frozen=True)
class _Piece:
    """Tokens [b, m] of the rows of a cache, of which the first lengths[r] are to be read.

    sizes [b, 1] are the lengths, positions [b, m] the tokens' own, slots [b, m] theirs in the
    cache, used [b, m] tells tokens from filling; visible [b, m, K] which slots they see.
    """

    tokens: Tensor
    lengths: Sequence[int]
    sizes: Tensor
    used: Tensor
    positions: Tensor
    slots: Tensor
    visible: Tensor
    table: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, cache: TTTE2ECache, tokens: Tensor, lengths: Sequence[int]) -> "_Piece":
        """The next piece of each row, for which the cache makes room."""
        config, device = cache.config, tokens.device
        cache.grow(max(p + n for p, n in zip(cache.positions, lengths, strict=True)))
        sizes = torch.tensor(lengths, device=device).unsqueeze(1)
        offsets = torch.arange(tokens.shape[1], device=device).expand(tokens.shape)
        used, starts = offsets < sizes, cache.starts(device)
        # Filling tokens stand where the row's last token does, so that they too see something.
        positions = starts + offsets.minimum(sizes - 1)
        return cls(
            tokens=tokens,
            lengths=lengths,
            sizes=sizes,
            used=used,
            positions=positions,
            slots=cache.slots(positions, used),
            visible=_visible(positions, cache.key_positions(starts + sizes - 1), cache.window),
            table=rotation_table(positions, config.head_dim, config.rope_theta),
        )


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys [b, K] queries [b, T] see, by position: [b, T, K] bool."""
    q, k = queries.unsqueeze(-1), keys.unsqueeze(-2)
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (k > q - window)


def _pairs(weights: Sequence[Tensor]) -> list[FastMLP]:
    return [(weights[i], weights[i + 1]) for i in range(0, len(weights), 2)]


class Reader:
    """Moves the rows of a cache on by reading tokens."""

    def __init__(self, network: Network, cache: TTTE2ECache) -> None:
        self.network = network
        self.cache = cache

    def read(self, tokens: Tensor, lengths: Sequence[int], store: Store) -> None:
        """Read the first lengths[r] of tokens [b, n] in each row r."""
        cache, done = self.cache, [0] * len(lengths)
        while rows := [r for r, length in enumerate(lengths) if done[r] < length]:
            self._end_full_chunks(rows, tokens, done)
            starts = [done[r] for r in rows]
            sizes = [min(lengths[r] - done[r], cache.chunk - cache.pending(r)) for r in rows]
            whole = cache.learns and min(sizes) == cache.chunk
            whole = whole and all(done[r] + cache.chunk < lengths[r] for r in rows)
            longest = max(sizes) + whole
            piece = tokens.new_zeros(len(rows), longest)
            for i, (r, start, size) in enumerate(zip(rows, starts, sizes, strict=True)):
                piece[i, : size + whole] = tokens[r, start : start + size + whole]
            if whole:
                cache.begin_learning(self.network.initial_fast_weights())
            part = self._part(rows)
            hidden = part._read_chunk(piece) if whole else part._read_piece(piece, sizes)
            self._merge(rows, part)
            store(rows, starts, sizes, hidden)
            for r, size in zip(rows, sizes, strict=True):
                done[r] += size

    def _end_full_chunks(self, rows: Sequence[int], tokens: Tensor, done: Sequence[int]) -> None:
        """The inner steps that only waited for a next token."""
        ended = [r for r in rows if self.cache.learns and self.cache.pending(r) == self.cache.chunk]
        if ended:
            self.cache.begin_learning(self.network.initial_fast_weights())
            part = self._part(ended)
            part._step_on_pending(torch.stack([tokens[r, done[r]] for r in ended]))
            self._merge(ended, part)

    def _part(self, rows: Sequence[int]) -> "Reader":
        """A reader of these rows: of all of them this one, else one with a copy of their state."""
        if len(rows) == self.cache.batch:
            return self
        return Reader(self.network, self.cache.select(rows))

    def _merge(self, rows: Sequence[int], part: "Reader") -> None:
        if part is not self:
            self.cache.put(rows, part.cache)

    def _read_piece(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Tokens that complete no chunk, or whose next token is not known: [r, m] → [r, m, H]."""
        cache, network = self.cache, self.network
        piece = _Piece.of(cache, tokens, lengths)
        x = self._enter(piece)
        if cache.learns:
            cache.hold(tokens, x, piece.used)
        fast = self._fast(cache.fast_weights(x.dtype))
        for layer in range(network.entry, len(network.blocks)):
            if layer > network.entry:
                x = self._attend(layer, x, piece)
            x = network.blocks[layer].feed_forward(x, fast[layer - network.entry])
        hidden: Tensor = network.final_norm(x)
        self._finish(hidden, piece)
        return hidden

    def _read_chunk(self, tokens: Tensor) -> Tensor:
        """A chunk of every row, [r, C + 1] with the token after it, and the inner step."""
        cache = self.cache
        piece = _Piece.of(cache, tokens[:, :-1], [cache.chunk] * cache.batch)
        hidden, own, leaves = self._learn(self._enter(piece), piece.positions)
        for layer, (k, v) in enumerate(own, start=self.network.entry + 1):
            cache.write(layer, k, v, piece.slots)
        self._step(hidden, tokens[:, 1:], leaves)
        self._finish(hidden.detach(), piece)
        return hidden.detach()

    def _step_on_pending(self, next_tokens: Tensor) -> None:
        """The inner step on full chunks whose tokens were read before; next_tokens [r]."""
        cache = self.cache
        assert cache.pending_tokens is not None
        assert cache.pending_entered is not None
        tokens = cache.pending_tokens[:, : cache.chunk]
        targets = torch.cat((tokens[:, 1:], next_tokens.unsqueeze(1)), dim=1)
        offsets = torch.arange(cache.chunk, device=tokens.device)
        positions = cache.starts(tokens.device) - cache.chunk + offsets
        hidden, _, leaves = self._learn(cache.pending_entered[:, : cache.chunk], positions)
        self._step(hidden, targets, leaves)

    def _enter(self, piece: _Piece) -> Tensor:
        """What no fast weight reaches, up to the entry's attention: → [r, m, H]."""
        network = self.network
        x = torch.nn.functional.embedding(piece.tokens, network.embedding)
        for layer, block in enumerate(network.blocks[: network.entry + 1]):
            x = self._attend(layer, x, piece)
            if layer < network.entry:
                x = block.feed_forward(x, None)
        return x

    def _attend(self, layer: int, x: Tensor, piece: _Piece) -> Tensor:
        """A block's attention over what its ring holds and the piece, which goes into it first."""
        block, cache = self.network.blocks[layer], self.cache
        q, k, v = block.self_attention.project(block.attention_norm(x), piece.table)
        cache.write(layer, k, v, piece.slots)
        keys, values = (ring[layer][:, :-1] for ring in (cache.keys, cache.values))
        out = block.self_attention.mix(q, keys, values, piece.visible)
        return x + block.attention_post_norm(out)

    def _learn(
        self, entered: Tensor, positions: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
        """The suffix over full chunks [r, C, H], ready to be differentiated by the fast weights.

        Returns final hidden states, keys and values of the blocks after the entry, and the fast
        weights as leaves.
        """
        network, cache = self.network, self.cache
        leaves = [w.detach().requires_grad_() for w in cache.fast]
        table = rotation_table(positions, network.config.head_dim, network.config.rope_theta)
        held = cache.key_positions(cache.starts(entered.device) - 1)
        before = held.where(held < positions[:, :1], -1)
        visible = _visible(positions, torch.cat((before, positions), dim=1), cache.window)
        own = []
        with torch.enable_grad():
            x, fast = entered, self._fast(leaves)
            for layer in range(network.entry, len(network.blocks)):
                block = network.blocks[layer]
                if layer > network.entry:
                    q, k, v = block.self_attention.project(block.attention_norm(x), table)
                    own.append((k.detach(), v.detach()))
                    cache.make_rings(layer, k.detach())
                    keys = torch.cat((cache.keys[layer][:, :-1], k), dim=1)
                    values = torch.cat((cache.values[layer][:, :-1], v), dim=1)
                    out = block.self_attention.mix(q, keys, values, visible)
                    x = x + block.attention_post_norm(out)
                x = block.feed_forward(x, fast[layer - network.entry])
            return network.final_norm(x), own, leaves

    def _step(self, hidden: Tensor, targets: Tensor, leaves: list[Tensor]) -> None:
        """One clipped SGD step of every row on its chunk's mean loss; predicting BOS is no part."""
        config, cache = self.network.config, self.cache
        mask = (
            torch.ones_like(targets)
            if config.bos_token_id is None
            else (targets != config.bos_token_id)
        )
        mask = mask.to(cache.fast[0].dtype)
        weights = mask / mask.sum(-1, keepdim=True).clamp_min(1e-10)
        adjoint = head_adjoint(hidden.detach(), self.network.head, targets, weights)
        gradients = torch.autograd.grad(hidden, leaves, adjoint)
        squares = torch.stack([g.flatten(1).square().sum(-1) for g in gradients])
        norm, clip = squares.sum(0).sqrt(), config.inner["clip"]
        factor = torch.where(norm < clip, 1.0, clip / norm.clamp_min(clip)) if clip else 1.0
        rate = config.inner["inner_lr"] * factor * torch.ones_like(norm)
        # Nothing is allocated once weights change: a step is taken whole or not at all.
        for g in gradients:
            g.mul_(rate.view(-1, 1, 1))
        for w, g in zip(cache.fast, gradients, strict=True):
            w.sub_(g)
        cache.fast_weights_moved()
        cache.steps = [steps + 1 for steps in cache.steps]

    def _finish(self, hidden: Tensor, piece: _Piece) -> None:
        """Keep the last of each row's final hidden states; count the piece as read."""
        last = (piece.sizes - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        self.cache.last_hidden = hidden.gather(1, last).squeeze(1)
        self.cache.advance(piece.lengths)

    def _fast(self, weights: Sequence[Tensor]) -> Sequence[FastMLP | None]:
        suffix = len(self.network.blocks) - self.network.entry
        return _pairs(weights) if weights else [None] * suffix


def plain_pass(network: Network, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The model without inner steps over whole texts, differentiable: [b, T] → [b, T, H].

    mask [b, T] bool tells tokens from padding; None is all tokens.
    """
    config, device = network.config, tokens.device
    here = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    positions = here.cumsum(1) - 1
    visible = _visible(positions, positions.where(here, -1), config.inner["window_size"])
    # Padding sees itself, so that it is a number.
    visible = visible | torch.eye(tokens.shape[1], dtype=torch.bool, device=device)
    table = rotation_table(positions, config.head_dim, config.rope_theta)
    x = torch.nn.functional.embedding(tokens, network.embedding)
    for block in network.blocks:
        q, k, v = block.self_attention.project(block.attention_norm(x), table)
        out = block.self_attention.mix(q, k, v, visible)
        x = block.feed_forward(x + block.attention_post_norm(out), None)
    hidden: Tensor = network.final_norm(x)
    return hidden
