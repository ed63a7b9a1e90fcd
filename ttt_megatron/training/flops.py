"""Model FLOPs: what a plain training step of the same architecture needs, whatever is computed.

A matrix of n elements costs 2n FLOPs a token forwards and twice that backwards, so 6n in all.
Attention adds, for every layer and token, 4 · width FLOPs a visible key forwards (scores and
values), 12 in all. Visible keys are averaged over the positions of a sequence: position p sees
min(p + 1, window). Norms, rotations and softmax are left out, as is what the inner loop adds, so
the figure compares methods at equal model and data.
"""

from ttt_megatron.baselines.ttt_kvb_work import ttt_kvb_flops
from ttt_megatron.baselines.work import gated_delta_flops, mamba2_flops
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.parameters import attention_parameters


def mean_visible_keys(sequence_length: int, window_size: int | None) -> float:
    """Keys a query sees, itself included, averaged over a sequence."""
    window = min(window_size or sequence_length, sequence_length)
    growing = window * (window + 1) // 2
    return (growing + (sequence_length - window) * window) / sequence_length


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a plain forward and backward pass a token; the head counts, the lookup does not."""
    width, ffn = model.hidden_size, model.ffn_hidden_size
    head = (model.vocab_size or 0) * width
    prime = 3 * width * (model.prime_ffn_hidden_size or ffn) * model.num_suffix_layers
    mlps = 3 * width * ffn * model.num_layers
    mixers = sum(_mixer_flops(kind, model, sequence_length) for kind in model.mixer_kinds)
    return 6.0 * (head + prime + mlps) + 3.0 * mixers


def _mixer_flops(kind: str, model: ModelConfig, sequence_length: int) -> float:
    """FLOPs a token of one mixer's forward pass, its linear maps included."""
    if kind == "mamba2":
        return mamba2_flops(model).total
    if kind == "gated_delta":
        return gated_delta_flops(model).total
    bound = ttt_kvb_flops(model).total if kind in ("ttt_kvb", "swa_ttt_kvb") else 0
    if kind == "ttt_kvb":
        return bound
    matrices, _ = attention_parameters(model)
    window = None if kind == "full" else model.window_size
    keys = mean_visible_keys(sequence_length, window)
    return 2.0 * matrices + 4.0 * model.hidden_size * keys + bound
