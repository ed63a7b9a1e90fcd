"""Models that transformers saved: the same function as imported, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ttt_megatron.data.tokenizer import load_tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_checkpoint import ImportOptions, import_checkpoint
from ttt_megatron.training.weights import load_learner, read_weights

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}
MODELS = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-3, **ROPE),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=7),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "qwen3, windows": Qwen3Config(
        **SHAPE, head_dim=8, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
}
TOKENS = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0))


def save(config: PretrainedConfig, folder: Path) -> torch.Tensor:
    """Saves a random model whose gains are no ones; the loss [2, 32] of every token, float64."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model.double()(TOKENS[:, :-1]).logits
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    )
    return flat.view(2, 32)


def load(source: Path, output: Path, *overrides: str):
    """What was imported, its learner and its loss [2, 32] of every token, float64."""
    imported = import_checkpoint(
        ImportOptions(
            kind="hf", source=source, output=output, tokenizer="none", overrides=overrides
        )
    )
    learner, _, _ = load_learner(imported.checkpoint)
    learner = learner.double()
    learner.compute_dtype = torch.float64
    with torch.no_grad():
        losses = learner(TOKENS[:, :-1], TOKENS[:, 1:], torch.ones(2, 32, dtype=torch.bool))
    return imported, learner, losses.token_nll


def refused(source: Path, output: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(source, output, *overrides)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_is_the_same_function(name: str, tmp_path: Path) -> None:
    expected = save(MODELS[name], tmp_path / "model")
    imported, _, found = load(tmp_path / "model", tmp_path / "run")
    # transformers computes rotary angles and softmax in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert imported.notes == ()
    model = imported.config.model
    assert (model.num_suffix_layers, model.post_norm) == (0, False)
    assert model.qk_norm == name.startswith("qwen3")
    assert model.window_size == {"mistral": 7, "qwen3, windows": 9}.get(name)


def test_prime_mlps_are_added_without_changing_the_function(tmp_path: Path) -> None:
    expected = save(MODELS["llama"], tmp_path / "model")
    overrides = ("model.num_suffix_layers=2", "inner.chunk_size=8")
    _, learner, found = load(tmp_path / "model", tmp_path / "run", *overrides)
    # With inner steps: what they move adds nothing yet.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    parameters = dict(learner.named_parameters())
    assert parameters["model.layers.2.prime_post_norm.weight"].abs().max() == 0
    assert parameters["model.layers.2.prime_mlp.linear_fc1.weight"].std() > 0.01
    assert (parameters["model.layers.2.prime_norm.weight"] == 1).all()


def test_the_tokenizer_beside_the_model_is_taken(tmp_path: Path) -> None:
    save(MODELS["tied"], tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options = ImportOptions(kind="hf", source=tmp_path / "model", output=tmp_path / "run")
    checkpoint = import_checkpoint(options).checkpoint
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (40, 0)
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        import_checkpoint(replace(options, output=tmp_path / "other"))


def test_another_window_is_told_of(tmp_path: Path) -> None:
    expected = save(MODELS["llama"], tmp_path / "model")
    imported, _, found = load(tmp_path / "model", tmp_path / "run", "model.window_size=8")
    (note,) = imported.notes
    assert "model.window_size = 8" in note
    assert "null" in note
    torch.testing.assert_close(found[:, :8], expected[:, :8], rtol=1e-5, atol=1e-5)
    assert (found - expected).abs().max() > 0.1


def test_a_model_in_several_files_and_in_bfloat16_is_imported_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MODELS["llama"]).bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    imported, _, _ = load(folder, tmp_path / "run")
    weights = read_weights(imported.checkpoint)
    up = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(weights["model.layers.1.mlp.linear_fc1.weight"][48:], up.float())
    one = sorted(folder.glob("*.safetensors"))[1]
    one.rename(folder / "elsewhere")
    assert f"{one} is missing" in refused(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias = true"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias = true"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act = gelu"),
        (LlamaConfig(**SHAPE, head_dim=16), "head_dim = 16"),
        (
            LlamaConfig(
                **SHAPE,
                rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            ),
            "rope_type = linear",
        ),
        (
            Qwen3Config(
                **SHAPE, head_dim=8, use_sliding_window=True, sliding_window=9, max_window_layers=2
            ),
            "layer_types",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_our_models_cannot_compute_is_named(
    config: PretrainedConfig, named: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path / "model")
    assert named in refused(tmp_path / "model", tmp_path / "run")


def test_biases_are_named(tmp_path: Path) -> None:
    save(Qwen2Config(**SHAPE), tmp_path / "model")
    message = refused(tmp_path / "model", tmp_path / "run")
    assert "a bias model.layers.0.self_attn.k_proj.bias" in message


def test_other_kinds_of_models_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert "config.json is missing" in refused(folder, tmp_path / "run")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert "model_type = mixtral" in refused(folder, tmp_path / "run")
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(folder, tmp_path / "run")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(MODELS["llama"], folder)
    file = folder / "model.safetensors"
    whole = load_file(file)
    norm, k = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"
    save_file({n: t for n, t in whole.items() if n != norm}, file)
    assert f"has no array {norm}" in refused(folder, tmp_path / "run")
    save_file(whole | {k: whole[k][:8].clone()}, file)
    assert f"{k} has the shape [8, 32]" in refused(folder, tmp_path / "run")
    save_file(whole | {norm: whole[norm] * torch.inf}, file)
    assert "not finite" in refused(folder, tmp_path / "run")
    save_file(whole | {norm: whole[norm].to(torch.float8_e4m3fn)}, file)
    assert f"{norm} is stored as F8_E4M3" in refused(folder, tmp_path / "run")
    file.write_bytes(file.read_bytes()[:5000])
    assert "model.safetensors is no safetensors file" in refused(folder, tmp_path / "run")
    file.unlink()
    assert "holds neither" in refused(folder, tmp_path / "run")


def test_a_shape_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    save(MODELS["llama"], tmp_path / "model")
    message = refused(tmp_path / "model", tmp_path / "run", "model.num_layers=5")
    assert "model.num_layers = 3" in message
    assert "5" in message
