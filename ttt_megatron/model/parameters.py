"""Parameter counts by group, from the shapes alone."""

from dataclasses import dataclass

from ttt_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    embedding: int
    head: int
    blocks: int
    prime: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters, the embedding included."""
        return self.embedding + self.head + self.blocks + self.prime + self.norms


def attention_parameters(config: ModelConfig) -> tuple[int, int]:
    """Of one block's attention: its matrices, its gains."""
    width = config.hidden_size
    head_dim = width // config.num_heads
    kv_width = (config.num_kv_heads or config.num_heads) * head_dim
    return 2 * width * width + 2 * width * kv_width, 2 * head_dim if config.qk_norm else 0


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count a configuration's parameters; `prime` is the fast weights, gains are in `norms`."""
    width, layers, suffix = config.hidden_size, config.num_layers, config.num_suffix_layers
    vocabulary = config.vocab_size or 0
    attention, attention_gains = attention_parameters(config)
    mlp = 3 * width * config.ffn_hidden_size
    prime = 3 * width * (config.prime_ffn_hidden_size or config.ffn_hidden_size)
    gains = (4 if config.post_norm else 2) * width + attention_gains
    return ParameterCounts(
        embedding=vocabulary * width,
        head=0 if config.tie_embeddings else vocabulary * width,
        blocks=layers * (attention + mlp),
        prime=suffix * prime,
        norms=layers * gains + suffix * 2 * width + width,
    )
