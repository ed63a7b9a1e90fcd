"""Model FLOPs: what a plain training step of the same architecture needs, whatever is computed.

A matrix of n elements costs 2n FLOPs a token forwards and twice that backwards, so 6n in all.
Attention adds, for every layer and token, 4 · width FLOPs a visible key forwards (scores and
values), 12 in all. Visible keys are averaged over the positions of a sequence: position p sees
min(p + 1, window). Norms, rotations and softmax are left out, as is what the inner loop adds, so
the figure compares methods at equal model and data.
"""

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.parameters import count_parameters


def mean_visible_keys(sequence_length: int, window_size: int | None) -> float:
    """Keys a query sees, itself included, averaged over a sequence."""
    window = min(window_size or sequence_length, sequence_length)
    growing = window * (window + 1) // 2
    return (growing + (sequence_length - window) * window) / sequence_length


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a plain forward and backward pass a token; the head counts, the lookup does not."""
    counts = count_parameters(model)
    head = (model.vocab_size or 0) * model.hidden_size
    matrices = counts.blocks + counts.prime + head
    keys = mean_visible_keys(sequence_length, model.window_size)
    return 6.0 * matrices + 12.0 * model.num_layers * model.hidden_size * keys
