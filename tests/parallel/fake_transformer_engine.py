"""TransformerEngine's interface as far as it is used, on any device, rounding as it documents.

Layers multiply only within `autocast`, by scales kept in `fp8_meta` (delayed) or found (current).
As there, an autocast's end moves all scales that layers keep: here, to what fits nothing.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_all_meta = []
_recipe = None


class Format:
    HYBRID = "hybrid"


class DelayedScaling:
    def __init__(self, fp8_format, amax_history_len, reduce_amax):
        assert fp8_format == Format.HYBRID
        assert not reduce_amax


class Float8CurrentScaling:
    def __init__(self, fp8_format):
        assert fp8_format == Format.HYBRID


@contextmanager
def autocast(enabled, recipe):
    global _recipe
    assert enabled
    assert _recipe is None
    _recipe = recipe
    try:
        yield
    finally:
        _recipe = None
        if isinstance(recipe, DelayedScaling):
            for meta in _all_meta:
                meta.scale.fill_(3.0e-3)


def _round(x, dtype, scale):
    if scale is None:
        amax = x.abs().max().float()
        scale = torch.where(amax > 0, _LARGEST[dtype] / amax, 1.0)
    most = _LARGEST[dtype]
    return (x * scale).clamp(-most, most).to(dtype).to(x.dtype) / scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer, delayed):
        scales = layer.fp8_meta["scaling_fwd"].scale.tolist() if delayed else (None, None)
        x, weight = (
            _round(t, torch.float8_e4m3fn, s) for t, s in zip((x, weight), scales, strict=False)
        )
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.delayed = layer, delayed
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        scale = ctx.layer.fp8_meta["scaling_bwd"].scale[0].item() if ctx.delayed else None
        x, weight = ctx.saved_tensors
        dy = _round(dy, torch.float8_e5m2, scale)
        return dy @ weight, dy.T @ x, None, None


class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias, device):
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.fp8_meta = {}

    def init_fp8_metadata(self, num_gemms):
        assert num_gemms == 1
        assert _recipe is not None
        if not self.fp8_meta:
            for name, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                self.fp8_meta[name] = SimpleNamespace(scale=torch.ones(tensors))
                _all_meta.append(self.fp8_meta[name])

    def forward(self, x):
        assert _recipe is not None
        assert len(x) % 16 == 0
        assert x.dtype == self.weight.dtype
        return _Product.apply(x, self.weight, self, isinstance(_recipe, DelayedScaling))
