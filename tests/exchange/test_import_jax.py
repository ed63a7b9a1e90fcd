"""Official checkpoints: what they become, exactly, and every way in which they are refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import build_learner, read_golden
from official_copy import EXPECTED, SETTINGS, STEP, copy_to, delete, write_array, write_official

from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_checkpoint import ImportOptions, import_checkpoint
from ttt_megatron.exchange.import_jax import shapes_settle
from ttt_megatron.exchange.import_settings import resolve_settings
from ttt_megatron.exchange.import_source import ImportSource
from ttt_megatron.exchange.official_names import STORED_NAMES, official_shapes
from ttt_megatron.exchange.official_store import OfficialStore
from ttt_megatron.exchange.published import published_settings
from ttt_megatron.training.weights import load_learner, read_weights

ROOT = Path(__file__).parents[2]
W1 = STORED_NAMES["blocks.w1"]


def options(source: Path, output: Path, **changes) -> ImportOptions:
    named = {"kind": "jax", "tokenizer": "none", "overrides": SETTINGS} | changes
    return ImportOptions(source=source, output=output, **named)


def refused(source: Path, output: Path, **changes) -> str:
    """The one sentence; nothing may be left behind."""
    before = set(output.parent.iterdir())
    with pytest.raises(UserError) as caught:
        import_checkpoint(options(source, output, **changes))
    assert set(output.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def values_of(store: OfficialStore) -> dict[str, np.ndarray]:
    return {name: store.read(name).numpy() for name in store.names}


def test_arrays_are_read_as_they_were_written() -> None:
    found = values_of(OfficialStore(STEP / "model_weights"))
    assert found.keys() == EXPECTED.keys()
    for name, values in found.items():
        assert list(values.shape) == EXPECTED[name]["shape"]
        digest = hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()
        assert digest == EXPECTED[name]["sha256"], name


@pytest.mark.parametrize("place", ["step", "run", "weights"])
def test_every_entry_of_every_array_comes_to_its_place(place: str, tmp_path: Path) -> None:
    source = {"step": STEP, "run": STEP.parent, "weights": STEP / "model_weights"}[place]
    imported = import_checkpoint(options(source, tmp_path / "run"))
    assert imported.checkpoint == tmp_path / "run/checkpoints/step-00002501"
    ours = read_weights(imported.checkpoint)
    theirs = {
        name: torch.from_numpy(values)
        for name, values in values_of(OfficialStore(STEP / "model_weights")).items()
    }

    def official(name: str, index: int) -> torch.Tensor:
        return theirs[STORED_NAMES[name]][index]

    def equal(name: str, *parts: torch.Tensor) -> bool:
        return torch.equal(ours.pop(f"model.{name}.weight"), torch.cat(parts))

    for layer in range(3):
        q, k, v = (official(f"blocks.w{one}", layer).mT for one in "qkv")
        heads = [part[8 * head : 8 * head + 8] for head in (0, 1) for part in (q, k, v)]
        assert equal(f"layers.{layer}.self_attention.linear_qkv", *heads)
        plain = {
            "self_attention.linear_proj": "wo",
            "self_attention.q_layernorm": "q_norm",
            "self_attention.k_layernorm": "k_norm",
            "attention_norm": "seq_norm",
            "attention_post_norm": "seq_post_norm",
            "mlp_norm": "ffn_norm",
            "mlp_post_norm": "ffn_post_norm",
            "mlp.linear_fc2": "w2",
        }
        for mine, its in plain.items():
            value = official(f"blocks.{its}", layer)
            assert equal(f"layers.{layer}.{mine}", value.mT if value.dim() == 2 else value)
        gate, up = (official(f"blocks.{one}", layer).mT for one in ("w1", "w3"))
        assert equal(f"layers.{layer}.mlp.linear_fc1", gate, up)
    for slot, layer in enumerate((1, 2)):
        gate, up = (official(f"prime.{one}", slot).mT for one in ("w1", "w3"))
        assert equal(f"layers.{layer}.prime_mlp.linear_fc1", gate, up)
        assert equal(f"layers.{layer}.prime_mlp.linear_fc2", official("prime.w2", slot).mT)
        assert equal(f"layers.{layer}.prime_norm", official("prime.norm", slot))
        assert equal(f"layers.{layer}.prime_post_norm", official("prime.post_norm", slot))
    assert equal("embedding", theirs[STORED_NAMES["wte"]])
    assert equal("final_norm", theirs[STORED_NAMES["ln_f"]])
    assert not ours


@pytest.mark.parametrize("name", ["A", "H"])
def test_an_imported_model_computes_the_official_losses(name: str, tmp_path: Path) -> None:
    golden = read_golden(ROOT / f"tests/golden/{name}.npz")
    arrays = {key[2:]: golden.arrays[key] for key in golden.arrays if key.startswith("w/")}
    step = write_official(tmp_path / "0", arrays)
    config = golden.config
    settings = (
        f"model.window_size={config['window']}",
        f"model.rope_theta={config['rope_theta']}",
        "model.norm_eps=1e-6",
        f"inner.chunk_size={config['chunk']}",
        f"inner.lr={config['inner_lr']}",
        f"inner.clip={config['inner_clip']}",
        f"inner.mode={'meta' if golden.is_meta else 'off'}",
    )
    imported = import_checkpoint(options(step, tmp_path / "run", overrides=settings))
    learner, _, info = load_learner(imported.checkpoint)
    assert info.step == 1
    learner = learner.double()
    learner.compute_dtype = torch.float64
    with torch.no_grad():
        loss = learner(*golden.batch()).loss
        assert torch.equal(loss, build_learner(golden, torch.float64)(*golden.batch()).loss)
    torch.testing.assert_close(loss, golden.tensor("loss"), rtol=1e-12, atol=0)


def test_the_highest_step_is_taken_by_its_number(tmp_path: Path) -> None:
    run = tmp_path / "checkpoint"
    for name in ("900", "2500", "2501.orbax-checkpoint-tmp-7", "latest"):
        shutil.copytree(STEP, run / name)
    imported = import_checkpoint(options(run, tmp_path / "run"))
    assert imported.checkpoint.name == "step-00002501"


def test_bfloat16_is_imported_exactly_and_told_of(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    values = OfficialStore(STEP / "model_weights").read(W1)
    rounded = values.bfloat16().float()
    assert not torch.equal(rounded, values)
    write_array(step / "model_weights", W1, rounded.numpy(), "bfloat16")
    imported = import_checkpoint(options(step, tmp_path / "run"))
    (note,) = imported.notes
    assert "bfloat16" in note
    assert W1 in note
    gate = read_weights(imported.checkpoint)["model.layers.1.mlp.linear_fc1.weight"][:24]
    assert torch.equal(gate, rounded[1].mT)


def test_other_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    values = OfficialStore(STEP / "model_weights").read(W1).numpy()
    write_array(step / "model_weights", W1, values, "float16")
    message = refused(step, tmp_path / "run")
    assert W1 in message
    assert "float16" in message


def test_a_chunk_that_is_missing_is_not_read_as_zeros(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    delete(step / "model_weights", f"{W1}/0.1.0")
    assert W1 in refused(step, tmp_path / "run")


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    folder = step / "model_weights/ocdbt.process_1/d"
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    message = refused(step, tmp_path / "run")
    assert "language_model.model" in message
    assert "damaged" in message


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_folder_that_is_missing_is_named(process: int, tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    shutil.rmtree(step / f"model_weights/ocdbt.process_{process}")
    assert f"ocdbt.process_{process} is missing" in refused(step, tmp_path / "run")


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    for file in (step / "model_weights/d").iterdir():
        file.unlink()
    assert "list of arrays" in refused(step, tmp_path / "run")
    (step / "model_weights/manifest.ocdbt").unlink()
    assert "manifest.ocdbt is missing" in refused(step, tmp_path / "run")


def test_arrays_missing_and_unknown_are_named(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    delete(step / "model_weights", f"{W1}/")
    assert f"has no array {W1}" in refused(step, tmp_path / "run")
    write_array(step / "model_weights", "language_model.lm_head.weight", np.ones((50, 16)))
    assert "language_model.lm_head.weight" in refused(step, tmp_path / "run")


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    ln_f = STORED_NAMES["ln_f"]
    write_array(step / "model_weights", ln_f, np.ones(17))
    message = refused(step, tmp_path / "run")
    assert ln_f in message
    assert "[17]" in message
    assert "[16]" in message


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    write_array(step / "model_weights", STORED_NAMES["ln_f"], np.full(16, np.nan))
    message = refused(step, tmp_path / "run")
    assert STORED_NAMES["ln_f"] in message
    assert "not finite" in message


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    run, output = tmp_path / "checkpoint", tmp_path / "run"
    run.mkdir()
    assert "no step's folder" in refused(run, output)
    step = copy_to(run)
    assert "one process wrote" in refused(step / "model_weights/ocdbt.process_0", output)
    unfinished = step.rename(run / "2500.orbax-checkpoint-tmp-1")
    assert "unfinished save 2500.orbax-checkpoint-tmp-1" in refused(run, output)
    assert "never finished" in refused(unfinished, output)
    assert "never finished" in refused(unfinished / "model_weights", output)
    empty = run / "17"
    empty.mkdir()
    assert "holds no model_weights" in refused(run, output)
    assert "local folder" in refused(Path("gs://bucket/checkpoint"), output)
    assert "no such folder" in refused(tmp_path / "nowhere", output)


def test_settings_that_nobody_gives_are_asked_for(tmp_path: Path) -> None:
    message = refused(STEP, tmp_path / "run", overrides=SETTINGS[1:4])
    assert "model.window_size, inner.lr, inner.clip" in message
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {window_size: 24}\ninner: {chunk_size: 8}\n")
    imported = import_checkpoint(options(STEP, tmp_path / "run", recipe=recipe, overrides=()))
    # A recipe says everything: what it leaves out is a default.
    assert imported.config.model == ModelConfig(
        vocab_size=50,
        num_layers=3,
        num_suffix_layers=2,
        hidden_size=16,
        num_heads=2,
        ffn_hidden_size=24,
        window_size=24,
    )
    assert imported.config.inner.chunk_size == 8


def test_settings_that_contradict_the_arrays_are_refused(tmp_path: Path) -> None:
    message = refused(STEP, tmp_path / "run", overrides=(*SETTINGS, "model.num_layers=4"))
    assert "model.num_layers = 3" in message
    assert "4" in message
    assert "num_kv_heads" in refused(
        STEP, tmp_path / "run", overrides=(*SETTINGS, "model.num_kv_heads=1")
    )
    same = (*SETTINGS, "model.num_layers=3", "model.num_kv_heads=2")
    import_checkpoint(options(STEP, tmp_path / "run", overrides=same))


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1b", "3b"])
def test_published_models_are_known_by_their_shapes(size: str, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / f"recipes/{size}/base.yaml")
    shapes = shapes_settle(official_shapes(recipe.model), "somewhere")
    source = ImportSource(
        path=tmp_path,
        kind="",
        shapes=shapes,
        stated=published_settings(shapes),
        required=("model.window_size", "model.rope_theta", "inner.lr", "inner.clip"),
        arrays=(),
        place=lambda name, weights, model: None,
    )
    config, notes = resolve_settings(source, None, (), tmp_path / "run")
    assert config.model == recipe.model
    assert config.inner == replace(recipe.inner, lr_start=1.0)
    assert notes == []
    wider = official_shapes(replace(recipe.model, ffn_hidden_size=recipe.model.ffn_hidden_size + 8))
    assert published_settings(shapes_settle(wider, "somewhere")) == {}


def test_state_of_the_optimizer_is_told_of_and_left(tmp_path: Path) -> None:
    step = copy_to(tmp_path)
    (step / "opt_state").mkdir()
    (note,) = import_checkpoint(options(step, tmp_path / "run")).notes
    assert "optimizer" in note
    assert "optimizer's state: give" in refused(step / "opt_state", tmp_path / "other")


def test_progress_names_each_array(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    import_checkpoint(options(STEP, tmp_path / "run"), lambda *one: told.append(one))
    assert {name for name, _, _ in told[:-1]} == EXPECTED.keys()
    assert [done for _, done, _ in told] == list(range(21))


def test_a_folder_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    output = tmp_path / "run"
    imported = import_checkpoint(options(STEP, output))
    listed = json.loads((imported.checkpoint / "manifest.json").read_text())["files"]
    assert {"run.yaml", "info.json", "state/.metadata"} <= listed.keys()
    assert "exists and is not empty" in refused(STEP, output)
