"""GPT models that megatron-core saved: the same function as imported, and what is refused."""

import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import megatron_gpt
import pytest
import torch
from ranks import launch

from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_checkpoint import Imported, ImportOptions, import_checkpoint
from ttt_megatron.exchange.inert_pickle import Unknown, load_inert
from ttt_megatron.training.weights import load_learner, read_weights

SAID = ("model.window_size=null", "model.rope_theta=5000", "model.norm_eps=1e-5")
HALF = {"rope_layout": "half", "overrides": SAID}


@dataclass(frozen=True)
class Saved:
    """A folder of checkpoints, and the losses [2, T] of each one's own model."""

    folder: Path
    losses: dict[str, torch.Tensor]


def _save_all(folder: Path) -> dict[str, torch.Tensor]:
    args = megatron_gpt.arguments
    window = {"window_size": (6, 0)}
    turned = {"rotary_interleaved": True, "qk_layernorm": False}
    told = args(rotary_interleaved=True)
    found = {
        "bare": megatron_gpt.save(folder / "bare"),
        "tied": megatron_gpt.save(folder / "tied/iter_0000030", True, turned, told),
        "window": megatron_gpt.save(folder / "window", False, window, args(**window)),
        "old": megatron_gpt.save_old_format(folder / "old", args()),
        "not gated": megatron_gpt.save(folder / "not-gated", False, {"gated_linear_unit": False}),
    }
    (folder / "tied/latest_checkpointed_iteration.txt").write_text("30\n")
    return {name: losses for name, losses in found.items() if losses is not None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Read only."""
    folder = tmp_path_factory.mktemp("megatron")
    return Saved(folder, launch(_save_all, (folder,), 1))


def load(source: Path, output: Path, **changes) -> Imported:
    return import_checkpoint(
        ImportOptions(kind="megatron", source=source, output=output, tokenizer="none", **changes)
    )


def refused(source: Path, output: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load(source, output, **changes)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["bare", "tied", "window", "old"])
def test_an_imported_model_is_the_same_function(name: str, saved: Saved, tmp_path: Path) -> None:
    named = HALF if name == "bare" else {}
    imported = load(saved.folder / name, tmp_path / "run", **named)
    assert imported.checkpoint.name == ("step-00000000" if name == "bare" else "step-00000030")
    assert imported.config.model.window_size == (7 if name == "window" else None)
    assert imported.config.model.tie_embeddings == (name in ("tied", "old"))
    learner, _, _ = load_learner(imported.checkpoint)
    rows, every = megatron_gpt.tokens(), torch.ones(2, megatron_gpt.LENGTH, dtype=torch.bool)
    with torch.no_grad():
        found = learner(rows[:, :-1], rows[:, 1:], every).token_nll
    torch.testing.assert_close(found, saved.losses[name], rtol=1e-5, atol=2e-5)


def test_a_model_that_was_cut_is_loaded_whole(saved: Saved, tmp_path: Path) -> None:
    launch(megatron_gpt.save, (tmp_path / "two", False, None, None, 2), 2)
    cut = read_weights(load(tmp_path / "two", tmp_path / "cut", **HALF).checkpoint)
    whole = read_weights(load(saved.folder / "bare", tmp_path / "whole", **HALF).checkpoint)
    assert cut.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_what_it_does_not_say_is_asked_for(saved: Saved, tmp_path: Path) -> None:
    bare, output = saved.folder / "bare", tmp_path / "run"
    assert "--rope-layout" in refused(bare, output, overrides=SAID)
    message = refused(bare, output, rope_layout="half", overrides=SAID[2:])
    assert "model.window_size, model.rope_theta" in message
    told = refused(saved.folder / "old", output, rope_layout="interleaved")
    assert "rotated half" in told
    other = refused(saved.folder / "old", output, overrides=("model.num_heads=8",))
    assert "model.num_heads = 4" in other


def test_what_our_models_cannot_compute_is_named(saved: Saved, tmp_path: Path) -> None:
    output = tmp_path / "run"
    message = refused(saved.folder / "not-gated", output, **HALF)
    assert "decoder.layers.0.mlp.linear_fc1.weight has the shape [48, 32]" in message
    arguments = {
        "swiglu": False,
        "use_rope_scaling": True,
        "rotary_percent": 0.5,
        "normalization": "LayerNorm",
        "num_experts": 8,
    }
    file = saved.folder / "old/mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    for name, value in arguments.items():
        changed = tmp_path / name / "mp_rank_00"
        changed.mkdir(parents=True)
        args = megatron_gpt.arguments(**{name: value})
        torch.save(state | {"args": args}, changed / file.name)
        assert f"{name} = {value}" in refused(changed.parent, output)
    biased = state["model"] | {"decoder.layers.0.mlp.linear_fc1.bias": torch.zeros(96)}
    torch.save(state | {"model": biased}, changed / file.name)
    assert "decoder.layers.0.mlp.linear_fc1.bias" in refused(changed.parent, output)
    del biased["decoder.layers.0.mlp.linear_fc1.bias"], biased["decoder.final_layernorm.weight"]
    torch.save(state | {"model": biased}, changed / file.name)
    assert "has no array decoder.final_layernorm.weight" in refused(changed.parent, output)


def test_damage_is_named(saved: Saved, tmp_path: Path) -> None:
    output = tmp_path / "run"
    copy = tmp_path / "copy"
    shutil.copytree(saved.folder / "bare", copy)
    data = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    assert "array " in refused(copy, output, **HALF)
    data.unlink()
    assert data.name in refused(copy, output, **HALF)
    (copy / ".metadata").write_bytes(b"nothing")
    assert "cannot be read" in refused(copy, output, **HALF)
    (copy / ".metadata").unlink()
    assert "no Megatron checkpoint" in refused(copy, output, **HALF)
    for rank in ("mp_rank_00", "mp_rank_01"):
        (copy / rank).mkdir()
    assert "cut for 2 processes" in refused(copy, output)


class _Harm:
    """What a file could do to whoever loads it without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_run_no_code_of_theirs(tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    torch.save({"iteration": 3, "args": _Harm(harmed)}, tmp_path / "file.pt")
    pickle.loads(pickle.dumps(_Harm(harmed)))
    harmed.unlink()
    found = load_inert(tmp_path / "file.pt")
    assert not harmed.exists()
    assert found["iteration"] == 3
    assert isinstance(found["args"], Unknown)
