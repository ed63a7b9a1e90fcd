from ttt_megatron.config import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.training.flops import mean_visible_keys, model_flops_per_token


def test_visible_keys_are_counted_position_by_position() -> None:
    for length, window in ((8, 3), (8, 8), (8, 20), (8, None)):
        counted = sum(min(p + 1, window or length) for p in range(length)) / length
        assert mean_visible_keys(length, window) == counted


def test_flops_are_six_a_matrix_element_and_attention() -> None:
    model = ModelConfig(
        vocab_size=11,
        num_layers=3,
        num_suffix_layers=1,
        hidden_size=8,
        num_heads=2,
        num_kv_heads=1,
        ffn_hidden_size=12,
        prime_ffn_hidden_size=10,
        window_size=4,
    )
    learner = Learner(model, InnerConfig(chunk_size=4))
    elements = sum(p.numel() for p in learner.parameters() if p.ndim == 2)
    keys = (1 + 2 + 3 + 4 * 13) / 16
    assert model_flops_per_token(model, 16) == 6 * elements + 12 * 3 * 8 * keys
