"""Shape and inner loop of a TTT-E2E model (End-to-End Test-Time Training, arXiv 2512.23675)."""

from typing import Any

from transformers import PreTrainedConfig

TTT_DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "chunk_size": 1024,
    "window_size": 8192,
    "num_suffix_layers": 0,
    "prime_intermediate_size": None,
    "inner_lr": 1.0,
    "clip": 1.0,
    "state_dtype": "float32",
}


class TTTE2EConfig(PreTrainedConfig):
    """A sliding-window transformer whose last blocks hold fast weights.

    `ttt` says how it learns while it reads: `enabled`; `chunk_size` tokens between two inner
    steps; `window_size` keys a query sees (None is full attention); `num_suffix_layers` blocks
    with fast weights, `prime_intermediate_size` wide (None is intermediate_size); `inner_lr` and
    `clip` of the inner step; `state_dtype` of the fast weights. `ttt=False` (or True) turns the
    inner steps off (or on) and leaves the rest of the block as it is. `post_norm` and `qk_norm`
    tell whether what attention and MLP add is normalised, and queries and keys are.
    """

    model_type = "ttt_e2e"

    vocab_size: int = 128_256
    hidden_size: int = 768
    intermediate_size: int = 1664
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-6
    post_norm: bool = True
    qk_norm: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    ttt: dict[str, Any] | bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.ttt is None:
            self.ttt = dict(TTT_DEFAULTS)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ttt" and value is not None:
            value = self._merged(value)
        super().__setattr__(name, value)

    def _merged(self, value: dict[str, Any] | bool) -> dict[str, Any]:
        """The block with what is given changed; raises ValueError for a key it does not have."""
        given = {"enabled": value} if isinstance(value, bool) else dict(value)
        unknown = sorted(set(given) - set(TTT_DEFAULTS))
        if unknown:
            raise ValueError(
                f"config.ttt has no key {unknown[0]!r}; it has {', '.join(sorted(TTT_DEFAULTS))}"
            )
        return {**TTT_DEFAULTS, **(self.__dict__.get("ttt") or {}), **given}

    @property
    def inner(self) -> dict[str, Any]:
        """The `ttt` block."""
        assert isinstance(self.ttt, dict)
        return self.ttt

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def prime_intermediate_size(self) -> int:
        """Width of the MLPs that hold fast weights."""
        return self.inner["prime_intermediate_size"] or self.intermediate_size

    @property
    def learns(self) -> bool:
        """Whether reading takes inner steps, unless a call says otherwise."""
        return bool(self.inner["enabled"]) and self.inner["num_suffix_layers"] > 0

    def base_settings(self) -> dict[str, int | float | str | bool | None]:
        """What a sequence's state rests on beside the weights."""
        inner = self.inner
        return {
            "num_hidden_layers": self.num_hidden_layers,
            "num_suffix_layers": inner["num_suffix_layers"],
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size,
            "prime_intermediate_size": self.prime_intermediate_size,
            "window_size": inner["window_size"],
            "rope_theta": float(self.rope_theta),
            "norm_eps": float(self.rms_norm_eps),
            "tie_embeddings": bool(self.tie_word_embeddings),
            "vocab_size": self.vocab_size,
            "chunk_size": inner["chunk_size"],
            "inner_lr": float(inner["inner_lr"]),
            "clip": float(inner["clip"]),
            "bos_token_id": self.bos_token_id,
        }
