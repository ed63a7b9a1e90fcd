"""TTT-KVB from its definition: token by token, inner gradients by autograd, weights in full."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ttt_kernels
from ttt_kernels.rope.reference import rope_reference


@dataclass
class Loop:
    """What the loop puts out [b, T, H], and the norm of every token's step before its clip."""

    out: torch.Tensor
    norms: list


def rms(x, norm):
    """RMS norm with a module's gain; x itself where the module has none."""
    if not hasattr(norm, "weight"):
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def fast_mlp(x, fast, settings):
    """One head's fast MLP on one token [d]; fast is a dict of its matrices and biases."""
    before = fast["fc1"] @ x
    if settings.fast_mlp == "gelu":
        hidden = F.gelu(before + fast["bias1"], approximate="tanh")
        return fast["fc2"] @ hidden + fast["bias2"]
    gate, up = before.chunk(2)
    return fast["fc2"] @ (F.silu(gate) * up)


def read(x, fast, layer, head):
    """What one token reads of a head."""
    out = fast_mlp(x, fast, layer.settings)
    if layer.settings.loss == "dot":
        return out
    gain, bias = layer.binding_gain[head], layer.binding_bias[head]
    return x + F.layer_norm(out, out.shape, gain, bias, layer.config.norm_eps)


def binding_loss(k, v, fast, layer, head):
    """The loss of one key and value."""
    out = read(k, fast, layer, head)
    if layer.settings.loss == "dot":
        return -(out * v).sum()
    return 0.5 * (out - v).square().sum()


def rates(x, layer):
    """[b, T, n]."""
    settings = layer.settings
    if settings.rate_form == "constant":
        fixed = torch.full((*x.shape[:2], layer.heads), settings.rate, dtype=x.dtype)
        return fixed / layer.head_dim
    logits = x @ layer.linear_rate.weight.T + layer.rate_bias
    if settings.rate_form == "sigmoid":
        return settings.rate * torch.sigmoid(logits) / layer.head_dim
    shift = math.log(math.exp(settings.rate) - 1)
    return torch.log1p(torch.exp(logits + shift)) / layer.head_dim


def rotated(x, layer):
    """x [b, T, n, d] turned as the layer's positions say."""
    kind, config, length = layer.settings.positions, layer.config, x.shape[1]
    if kind == "none":
        return x
    if kind == "chunk":
        whole = ttt_kernels.rotations(0, length, layer.head_dim, config.rope_theta, x)
        return rope_reference(x, whole[torch.arange(length) % layer.settings.chunk_size])
    heads = config.num_heads
    table = ttt_kernels.rotations(0, length, config.hidden_size // heads, config.rope_theta, x)
    return rope_reference(x.reshape(*x.shape[:2], heads, -1), table).reshape(x.shape)


def stepped(start, total, count, layer, head, norms):
    """The weights `start` after the summed gradients of `count` tokens."""
    settings = layer.settings
    step = {key: part / count if settings.average else part for key, part in total.items()}
    norm = torch.sqrt(sum(part.square().sum() for part in step.values()))
    norms.append(norm.item())
    factor = settings.clip / norm if settings.clip and norm >= settings.clip else 1.0
    fast = {key: start[key] - factor * step[key] for key in start}
    if settings.weight_norm:
        for key, first in (("fc1", layer.fast_fc1[head]), ("fc2", layer.fast_fc2[head])):
            rows = fast[key].norm(dim=1, keepdim=True) + 1e-5
            fast[key] = fast[key] / rows * first.norm(dim=1, keepdim=True)
    return fast


def head_loop(q, k, v, rate, layer, head):
    """One head of one sequence: q, k, v [T, d] (q may be None), rate [T] → [T, d]."""
    settings, outs, norms = layer.settings, [], []
    names = ("fc1", "fc2", "bias1", "bias2") if settings.has_biases else ("fc1", "fc2")
    start = {name: getattr(layer, f"fast_{name}")[head] for name in names}
    total, count = {name: torch.zeros_like(part) for name, part in start.items()}, 0
    for t in range(len(k)):
        loss = binding_loss(k[t], v[t], start, layer, head)
        gradients = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        total = {
            name: total[name] + rate[t] * gradient
            for name, gradient in zip(names, gradients, strict=True)
        }
        count += 1
        ends = count == settings.chunk_size
        after = start
        if settings.output_rule == "updated" or ends:
            after = stepped(start, total, count, layer, head, norms)
        if settings.output_rule == "updated":
            outs.append(read(q[t], after, layer, head))
        else:
            outs.append(read(k[t] if q is None else q[t], start, layer, head))
        if ends:
            start = after
            total, count = {name: torch.zeros_like(part) for name, part in start.items()}, 0
    return torch.stack(outs), norms


def loop(layer, x):
    """The layer [b, T, H] → [b, T, H] by the loop, over all of x."""
    parts = (x @ layer.linear_qkv.weight.T).unflatten(-1, (-1, layer.heads, layer.head_dim))
    *queries, k, v = parts.unbind(2)
    k = rotated(rms(k, layer.k_layernorm), layer)
    q = rotated(rms(queries[0], layer.q_layernorm), layer) if queries else None
    rate = rates(x, layer)
    rows, norms = [], []
    for row in range(len(x)):
        heads = []
        for head in range(layer.heads):
            own = None if q is None else q[row, :, head]
            args = own, k[row, :, head], v[row, :, head], rate[row, :, head]
            out, lengths = head_loop(*args, layer, head)
            heads.append(out)
            norms += lengths
        rows.append(torch.stack(heads, dim=1))
    out = rms(torch.stack(rows), layer.out_layernorm).flatten(-2)
    return Loop(out @ layer.linear_proj.weight.T, norms)
