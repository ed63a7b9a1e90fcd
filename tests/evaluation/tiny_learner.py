"""A learner that evaluations are tried on."""

import torch

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner


def tiny_learner(window):
    """Two blocks of width 16, 19 tokens, chunks of 4, in float64."""
    model = ModelConfig(
        vocab_size=19,
        num_layers=2,
        num_suffix_layers=1,
        hidden_size=16,
        num_heads=2,
        ffn_hidden_size=24,
        window_size=window,
        init_std=0.25,
    )
    return Learner(model, InnerConfig(chunk_size=4), dtype=torch.float64).eval()
