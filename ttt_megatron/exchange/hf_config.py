"""One model's settings on both sides: a run's configuration and an exported folder's."""

from dataclasses import replace
from typing import Any

from ttt_megatron.config.schema import InnerConfig, ModelConfig, RunConfig
from ttt_megatron.hf.configuration_ttt_e2e import TTTE2EConfig

CODE_FILES = (
    "configuration_ttt_e2e.py",
    "modeling_ttt_e2e.py",
    "cache_ttt_e2e.py",
    "reading_ttt_e2e.py",
    "layers_ttt_e2e.py",
    "state_ttt_e2e.py",
)
"""What an exported folder needs of `ttt_megatron/hf/` to be loaded without this project."""

_AUTO_MAP = {
    "AutoConfig": "configuration_ttt_e2e.TTTE2EConfig",
    "AutoModelForCausalLM": "modeling_ttt_e2e.TTTE2EForCausalLM",
    # `transformers serve` asks for no other class that is not part of transformers.
    "AutoModelForDecision": "modeling_ttt_e2e.TTTE2EForCausalLM",
}
_BODY = "model."
_HEADS = {"output.weight": "lm_head.weight"}


def hf_parameter_name(name: str) -> str:
    """An exported parameter's name from that in a learner's model."""
    return _HEADS.get(name, _BODY + name)


def our_parameter_name(name: str) -> str:
    """The inverse of `hf_parameter_name`."""
    back = {theirs: ours for ours, theirs in _HEADS.items()}
    return back.get(name, name.removeprefix(_BODY))


def to_hf_config(
    model: ModelConfig, inner: InnerConfig, *, bos_id: int, dtype: str
) -> TTTE2EConfig:
    """The exported configuration; `dtype` is that of stored weights, `bos_id` ends texts too.

    Raises ValueError if the model has no vocabulary size.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is not set")
    loading: dict[str, Any] = {"architectures": ["TTTE2EForCausalLM"], "auto_map": _AUTO_MAP}
    return TTTE2EConfig(
        **loading,
        dtype=dtype,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads or model.num_heads,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.norm_eps,
        post_norm=model.post_norm,
        qk_norm=model.qk_norm,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=bos_id,
        eos_token_id=bos_id,
        pad_token_id=bos_id,
        ttt={
            "enabled": inner.mode != "off" and model.num_suffix_layers > 0,
            "chunk_size": inner.chunk_size,
            "window_size": model.window_size,
            "num_suffix_layers": model.num_suffix_layers,
            "prime_intermediate_size": model.prime_ffn_hidden_size,
            "inner_lr": inner.lr,
            "clip": inner.clip,
            "state_dtype": "float32",
        },
    )


def from_hf_config(config: TTTE2EConfig) -> tuple[ModelConfig, InnerConfig]:
    """The settings of the model and its inner loop that an exported configuration stands for."""
    inner: dict[str, Any] = config.inner
    model = ModelConfig(
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_suffix_layers=inner["num_suffix_layers"],
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        ffn_hidden_size=config.intermediate_size,
        prime_ffn_hidden_size=inner["prime_intermediate_size"],
        window_size=inner["window_size"],
        rope_theta=config.rope_theta,
        norm_eps=config.rms_norm_eps,
        post_norm=config.post_norm,
        qk_norm=config.qk_norm,
        tie_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )
    return model, InnerConfig(
        mode="meta" if inner["enabled"] else "off",
        chunk_size=inner["chunk_size"],
        lr=inner["inner_lr"],
        clip=inner["clip"],
    )


def with_exported(config: RunConfig, exported: TTTE2EConfig) -> RunConfig:
    """A run's configuration with the exported model in it."""
    model, inner = from_hf_config(exported)
    return replace(config, model=model, inner=inner)
