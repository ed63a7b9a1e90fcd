"""The meta gradient by reverse over reverse: small, plain and slow; what the engine must equal.

Everything is one autograd graph: inner gradients are taken with `create_graph=True` through the
plain definitions of the operations. One process only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ttt_kernels
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.problem import InnerSettings
from ttt_megatron.model.attention import KV
from ttt_megatron.model.transformer import LanguageModel


@dataclass
class OracleResult:
    """loss: scalar with the whole graph behind it; chunk_losses and gradient_norms [b, N]."""

    loss: Tensor
    chunk_losses: Tensor
    gradient_norms: Tensor
    token_nll: Tensor
    logits: list[Tensor]
    prefix_output: Tensor
    fast: list[Tensor]


def oracle(
    model: LanguageModel, tokens: Tensor, targets: Tensor, mask: Tensor, settings: InnerSettings
) -> OracleResult:
    """The meta loss of a batch, a step after every chunk (also the last, for the record).

    tokens and targets [b, T] int64, mask [b, T] bool, T a multiple of the chunk size.
    """
    dtype = model.head_weight.dtype
    with ttt_kernels.plain_definitions():
        x = model.embed(tokens, dtype)
        rotation = model.rotations(0, tokens.shape[1], x)
        prefix_output = model.prefix_blocks(x, rotation)
        entered = model.enter_suffix(prefix_output, rotation)
        fast = [
            w.expand(tokens.shape[0], *w.shape)
            for w in inner_step.flatten(model.initial_fast_weights())
        ]
        kv: list[KV | None] = [None] * (len(model.suffix_blocks) - 1)
        losses, norms, nlls, logits = [], [], [], []
        for start in range(0, tokens.shape[1], settings.chunk_size):
            rows = slice(start, start + settings.chunk_size)
            hidden, own = model.suffix(
                entered[:, rows], rotation[rows], kv, inner_step.as_mlps(fast)
            )
            logits.append(model.logits(hidden))
            nll = F.cross_entropy(logits[-1].mT, targets[:, rows], reduction="none")
            kept = mask[:, rows].to(dtype)
            loss = (nll * kept).sum(-1) / kept.sum(-1).clamp_min(1e-10)
            fast, gradient_norm = _step(fast, loss, settings)
            kv = _appended(kv, own, model.config.window_size)
            losses.append(loss)
            norms.append(gradient_norm)
            nlls.append(nll)
    chunk_losses = torch.stack(losses, dim=1)
    return OracleResult(
        chunk_losses.mean(),
        chunk_losses,
        torch.stack(norms, dim=1),
        torch.cat(nlls, dim=1),
        logits,
        prefix_output,
        fast,
    )


def _step(fast: list[Tensor], loss: Tensor, settings: InnerSettings) -> tuple[list[Tensor], Tensor]:
    gradient = torch.autograd.grad(loss.sum(), fast, create_graph=True)
    if not settings.second_order:
        gradient = tuple(g.detach() for g in gradient)
    squared = torch.stack([g.square().sum(dim=(1, 2)) for g in gradient]).sum(0)
    safe_norm = torch.where(squared > 0, squared, 1.0).sqrt()
    clipped = (safe_norm >= settings.clip) & (squared > 0) & (settings.clip > 0)
    rate = settings.lr * torch.where(clipped, settings.clip / safe_norm, 1.0)
    moved = [w - rate.view(-1, 1, 1) * g for w, g in zip(fast, gradient, strict=True)]
    return moved, torch.where(squared > 0, safe_norm, 0.0)


def _appended(kv: list[KV | None], own: list[KV], window: int | None) -> list[KV | None]:
    joined: list[KV | None] = []
    for past, new in zip(kv, own, strict=True):
        both = new if past is None else KV(*(torch.cat(p, 1) for p in zip(past, new, strict=True)))
        keep = both.k.shape[1] if window is None else min(window - 1, both.k.shape[1])
        first = both.k.shape[1] - keep
        joined.append(KV(both.k[:, first:], both.v[:, first:]) if keep else None)
    return joined
