"""A tiny float64 model whose inner steps are large enough to show."""

import torch

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner

BOS = 0
VOCABULARY = 23


def tiny_learner(
    *, suffix: int = 2, window: int | None = 8, chunk: int = 4, seed: int = 3, **inner: object
) -> Learner:
    """3 blocks of width 16; fast weights drift by about a tenth within 30 tokens."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=3,
        num_suffix_layers=suffix,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=24,
        window_size=window,
        init_std=0.25,
    )
    config = InnerConfig(chunk_size=chunk, lr=1.0, clip=0.5, **inner)
    return Learner(model, config, dtype=torch.float64, seed=seed).eval()


def draw_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [b, T], document starts among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    tokens[:, 0] = BOS
    tokens[0, length // 2] = BOS
    return tokens
