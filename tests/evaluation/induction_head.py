"""A model built by hand that continues a text as it went on before: an induction head.

Block 0's heads look 1 to 4 tokens back and write down what stood there. Block 1 looks for the place
whose 4 tokens before are the last 4 read, and copies the token found. So the model copies whatever
its window shows, and can do nothing else: what it scores is known without measuring.
"""

import math

import torch
from torch import Tensor

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.block import Block

VOCAB = 257
HEADS, HEAD_DIM = 4, 128
HIDDEN = HEADS * HEAD_DIM
CODE = 20  # dimensions that tell tokens apart
STRIDE = 24  # of the stream: the token's own code, then those of 1 to 4 tokens back
CONSTANT = HIDDEN - 1
THETA = 1e30
TURNING = 7  # pairs of a head that rotate at usable rates, and tell positions apart
STILL = 32  # dimensions from here on hardly rotate, and compare contents


def induction_learner(window_size: int | None, chunk_size: int = 64) -> Learner:
    """The model at byte level in float32; its fast weights change nothing, however they move."""
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        num_suffix_layers=1,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        ffn_hidden_size=8,
        window_size=window_size,
        rope_theta=THETA,
    )
    learner = Learner(config, InnerConfig(chunk_size=chunk_size)).eval()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(VOCAB, CODE, generator=generator)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif ".prime_mlp." not in name:
                parameter.zero_()
        embedding = learner.model.head_weight
        embedding[:, :CODE] = torch.nn.functional.normalize(codes, dim=-1)
        embedding[:, CONSTANT] = 1.0
        first, second = learner.model.blocks()
        _look_back(first)
        _copy_behind_a_match(second)
        second.prime_post_norm.weight.zero_()
        learner.model.final_norm.weight.fill_(4.0)
    return learner


def _look_back(block: Block) -> None:
    """Head h attends h + 1 tokens back, by position alone, and writes that token's code."""
    q, k, v = _projections(block)
    rates = THETA ** (-torch.arange(TURNING) * 2.0 / HEAD_DIM)
    even = torch.arange(TURNING) * 2
    for head in range(HEADS):
        q[head, even, CONSTANT] = 1.0
        k[head, even, CONSTANT] = torch.cos(rates * (head + 1))
        k[head, even + 1, CONSTANT] = torch.sin(rates * (head + 1))
        _copy_code(block, v, head, STRIDE * (head + 1))
    _finish(block, added=math.sqrt(HEADS))


def _copy_behind_a_match(block: Block) -> None:
    """Head 0 compares the last 4 tokens with those before every place, and copies its token."""
    q, k, v = _projections(block)
    own = torch.arange(CODE)
    for back in range(4):
        rows = STILL + CODE * back + own
        q[0, rows, STRIDE * back + own] = 1.0
        k[0, rows, STRIDE * (back + 1) + own] = 1.0
    _copy_code(block, v, 0, 0)
    _finish(block, added=50.0)


def _projections(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Views of what makes q, k and v: [heads, head_dim, HIDDEN] each."""
    weight = block.self_attention.linear_qkv.weight.view(HEADS, 3, HEAD_DIM, HIDDEN)
    return weight[:, 0], weight[:, 1], weight[:, 2]


def _copy_code(block: Block, v: Tensor, head: int, to: int) -> None:
    own = torch.arange(CODE)
    v[head, own, own] = 1.0
    block.self_attention.linear_proj.weight[to + own, head * HEAD_DIM + own] = 1.0


def _finish(block: Block, added: float) -> None:
    """Attention sharp enough to take one place; what it adds to the stream is `added` long."""
    block.self_attention.q_layernorm.weight.fill_(8.0)
    block.self_attention.k_layernorm.weight.fill_(8.0)
    block.attention_post_norm.weight.fill_(added / math.sqrt(HIDDEN))
