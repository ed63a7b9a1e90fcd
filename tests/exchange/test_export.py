"""What an export holds, and what is no export."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ttt_megatron.errors import UserError
from ttt_megatron.exchange import export as export_module
from ttt_megatron.exchange.export import ExportSettings, export_checkpoint
from ttt_megatron.exchange.exported import is_exported, load_exported
from ttt_megatron.exchange.hf_config import (
    from_hf_config,
    hf_parameter_name,
    our_parameter_name,
    to_hf_config,
)
from ttt_megatron.training.manifest import find_damage
from ttt_megatron.training.weights import load_learner


def test_the_weights_are_the_checkpoints(trained_run, exported_run):
    learner, _, info = load_learner(trained_run.output)
    assert is_exported(exported_run)
    assert not is_exported(trained_run.output)
    loaded, config, exported_info = load_exported(exported_run)
    assert (exported_info.step, exported_info.loss) == (info.step, info.loss)
    assert config.model == loaded.model.config
    ours, theirs = dict(learner.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def test_settings_go_there_and_back(trained_run):
    learner, _, _ = load_learner(trained_run.output)
    exported = to_hf_config(learner.model.config, learner.inner, bos_id=256, dtype="float32")
    model, inner = from_hf_config(exported)
    for name in ("vocab_size", "num_layers", "num_suffix_layers", "window_size", "rope_theta"):
        assert getattr(model, name) == getattr(learner.model.config, name)
    for name in ("mode", "chunk_size", "lr", "clip"):
        assert getattr(inner, name) == getattr(learner.inner, name)
    for name in ("output.weight", "embedding.weight", "layers.0.mlp.linear_fc1.weight"):
        assert our_parameter_name(hf_parameter_name(name)) == name


def test_shards_are_as_small_as_asked_and_complete(trained_run, tmp_path):
    out = tmp_path / "deep" / "small"
    settings = ExportSettings(dtype="bfloat16", max_shard_size="8KB")
    done = export_checkpoint(trained_run.output, out, settings)
    files = sorted(out.glob("*.safetensors"))
    assert done.weight_files == len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    weights = [x for file in files for x in load_file(file).values()]
    assert {x.dtype for x in weights} == {torch.bfloat16}
    assert sum(x.numel() for x in weights) == done.parameters
    assert max(sum(x.nbytes for x in load_file(f).values()) for f in files) <= 8_500
    assert find_damage(out) is None
    assert done.comparison is not None
    assert done.comparison.inner_steps == 2


def test_the_card_tells_where_the_model_is_from(trained_run, exported_run):
    card = (exported_run / "README.md").read_text()
    info = json.loads((exported_run / "info.json").read_text())
    hashed = load_hf(exported_run).base_hash()
    for told in (info["data_fingerprint"], info["tracking_run"], hashed, "chunk_size: 8"):
        assert str(told) in card
    assert "2 inner steps differ from the checkpoint's by at most" in card


def load_hf(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_the_tokenizer_gives_the_models_ids(trained_run, exported_run):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported_run, trust_remote_code=True)
    text = "wal größer 東京 🙂 <|bos|>\n"
    assert theirs(text)["input_ids"] == [256, *text.encode()]
    assert theirs.decode([256, *text.encode()], skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.padding_side) == (256, 256, "left")


def test_an_export_that_computes_something_else_does_not_appear(trained_run, tmp_path, monkeypatch):
    write = export_module._write_weights

    def write_wrongly(weights, folder, size):
        files = write(weights, folder, size)
        path = folder / "model.safetensors"
        stored = load_file(path)
        stored["model.layers.1.prime_mlp.linear_fc1.weight"][0, 0] += 0.5
        save_file(stored, path, metadata={"format": "pt"})
        return files

    monkeypatch.setattr(export_module, "_write_weights", write_wrongly)
    with pytest.raises(UserError, match="not what the checkpoint is"):
        export_checkpoint(trained_run.output, tmp_path / "wrong", ExportSettings())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(trained_run, exported_run, tmp_path):
    def refused(source, output, message, **settings):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=message):
            export_checkpoint(source, output, ExportSettings(**settings))
        assert sorted(tmp_path.rglob("*")) == before

    out = tmp_path / "out"
    refused(tmp_path / "nothing", out, "no folder")
    refused(tmp_path, out, "holds no checkpoint")
    refused(trained_run.output, exported_run, "exists: choose another")
    refused(trained_run.output, out, "max-shard-size 5 bananas", max_shard_size="5 bananas")
    damaged = tmp_path / "step-00000004"
    shutil.copytree(trained_run.output / "checkpoints" / "step-00000004", damaged)
    (damaged / "run.yaml").write_text("name: other\n")
    refused(damaged, out, "is damaged: run.yaml")


@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "config"])
def test_a_damaged_export_is_refused_by_name(exported_run, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(exported_run, folder)
    path = folder / ("config.json" if damage == "config" else "model.safetensors")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    else:
        path.write_bytes(
            content.replace(b"\x00\x00", b"\x00\x01", 1)
            if damage == "other"
            else content.replace(b"24", b"25", 1)
        )
    with pytest.raises(UserError, match=f"is damaged: {path.name}"):
        load_exported(folder)
