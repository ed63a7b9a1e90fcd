"""The systems made from a TTT-E2E recipe: equal in parameters, data and schedule."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ttt_megatron.baselines.counts import count_with_mixers
from ttt_megatron.baselines.recipes import named_for, recipe_file, system_recipe
from ttt_megatron.baselines.systems import SYSTEMS, as_system
from ttt_megatron.cli.main import main
from ttt_megatron.config import from_dict, load_recipe, to_dict
from ttt_megatron.errors import UserError
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.training.flops import model_flops_per_token
from ttt_megatron.training.weights import build_learner

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = RECIPES / "reproduction" / "stage1.yaml"
PUBLISHED = sorted(RECIPES.glob("*/pretrain-e2e-8k.yaml"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_parameters_are_counted_as_built_and_equal_the_recipes(name):
    config = load_recipe(SMALL)
    made = as_system(config, name)
    with torch.device("meta"):
        built = sum(p.numel() for p in build_learner(made).parameters())
    assert count_with_mixers(made.model).total == built
    assert built == pytest.approx(count_with_mixers(config.model).total, rel=0.005)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("path", PUBLISHED, ids=[path.parent.name for path in PUBLISHED])
def test_every_published_size_has_every_system(path, name):
    config = load_recipe(path)
    made = as_system(config, name)
    assert load_recipe(path.with_name(recipe_file(name, path))).model == made.model
    total, wanted = (count_with_mixers(one.model).total for one in (made, config))
    # Published baselines' MLPs are rounded down to multiples of 256.
    bound = 0.02 if name in ("swa", "full", "hybrid") else 0.01
    assert total == pytest.approx(wanted, rel=bound)
    assert (made.data, made.optimizer, made.training) == (
        config.data,
        config.optimizer,
        config.training,
    )


def test_systems_are_what_they_are_called():
    config = load_recipe(SMALL)
    made = {name: as_system(config, name) for name in SYSTEMS}
    assert made["e2e"] == config
    assert made["full"].model == replace(made["swa"].model, window_size=None)
    assert made["hybrid"].model.mixer_kinds == ["attention"] * 5 + ["full"]
    assert made["gated_delta"].model.mixer_kinds == ["gated_delta", "attention"] * 3
    assert made["mamba2"].model.mixer_kinds == ["mamba2", "attention"] * 3
    assert made["ttt_kvb"].model.mixer_kinds == ["swa_ttt_kvb"] * 6
    assert made["ttt_kvb"].model.ttt_kvb.chunk_size == config.inner.chunk_size
    assert made["ttt_kvb"].model.ttt_kvb.output_rule == "updated"
    assert made["ttt_kvb_simplified"].model.ttt_kvb.output_rule == "simplified"
    assert made["naive"] == replace(config, inner=replace(config.inner, mode="naive"))
    assert made["off"] == replace(config, inner=replace(config.inner, mode="off"))
    spread = made["e2e_all"]
    assert (spread.inner, spread.model.num_suffix_layers) == (config.inner, 6)
    fast = [count_with_mixers(one.model).prime for one in (spread, config)]
    assert fast[0] == pytest.approx(fast[1], rel=0.01)
    plain = [name for name, one in made.items() if not one.model.num_suffix_layers]
    assert set(SYSTEMS) - set(plain) == {"e2e", "e2e_all", "naive", "off"}
    assert all(made[name].inner.mode == "off" for name in plain)


@pytest.mark.parametrize("mode", ["naive", "off"])
def test_systems_without_trained_steps_have_no_graphs_of_them(mode):
    config = load_recipe(RECIPES / "reproduction-30m" / "stage1.yaml")
    assert config.training.cuda_graphs
    made = as_system(config, mode)
    assert not made.training.cuda_graphs
    assert from_dict(to_dict(made)) == made


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "e2e"])
def test_written_recipes_are_the_systems(stage, name, tmp_path):
    base = RECIPES / "reproduction" / f"{stage}.yaml"
    config = load_recipe(base)
    made = as_system(config, name)
    path = tmp_path / "a" / f"{name}.yaml"
    path.parent.mkdir()
    path.write_text(system_recipe(config, made, name, base, path.parent))
    written = load_recipe(path)
    folder = f"reproduction/runs/{stage}-{name}"
    start = f"reproduction/runs/stage1-{name}" if stage == "stage2" else None
    training = replace(made.training, output=folder, init_from=start)
    assert written == replace(made, name=f"reproduction-{stage}-{name}", training=training)


FOUND = sorted(RECIPES.glob("reproduction*/*/*.yaml"))
OWN = [path for path in FOUND if path.stem in SYSTEMS]
COMPUTE = [path for path in FOUND if path.stem not in SYSTEMS]
SOURCES = sorted(RECIPES.glob("*/*-e2e-*.yaml"))


def place(path):
    return "-".join([*path.parts[-3:-1], path.stem])


@pytest.mark.parametrize("path", OWN, ids=place)
def test_the_repositorys_recipes_are_up_to_date(path):
    base = path.parent.with_suffix(".yaml")
    config = load_recipe(base)
    made = as_system(config, path.stem)
    expected = system_recipe(config, made, path.stem, base, path.parent)
    assert path.read_text() == expected


@pytest.mark.parametrize("base", SOURCES, ids=place)
def test_the_published_recipes_are_what_the_command_writes(base):
    config, names = load_recipe(base), [name for name in SYSTEMS if name != "e2e"]
    for name in names:
        expected = system_recipe(config, as_system(config, name), name, base, base.parent)
        assert base.with_name(recipe_file(name, base)).read_text() == expected, (
            f"remove it, and: ttt-megatron baselines {base} --systems {name} --output {base.parent}"
        )
    beside = {path.name for path in base.parent.glob(base.name.replace("e2e", "*"))}
    assert beside == {base.name, *(recipe_file(name, base) for name in names)}


def test_a_systems_name_stands_where_e2e_does():
    assert named_for("swa", "125m-pretrain-e2e-8k") == "125m-pretrain-swa-8k"
    assert named_for("swa", "runs/e2e/late2e2e") == "runs/swa/late2e2e"
    assert named_for("swa", "runs/stage1") == "runs/stage1-swa"
    assert recipe_file("swa", Path("a-e2e/extend-e2e-32k.yaml")) == "extend-swa-32k.yaml"
    assert recipe_file("swa", Path("a-e2e/stage2.yaml")) == "swa.yaml"


@pytest.mark.parametrize(
    ("length", "base"),
    [(8192, 5e5), (16384, 1e6), (32768, 2e6), (65536, 5e6), (131072, 1e7), (262144, 1e7)],
)
def test_full_attention_raises_the_rotary_base_with_the_length(length, base):
    config = load_recipe(PUBLISHED[0], [f"data.sequence_length={length}"])
    assert as_system(config, "full").model.rope_theta == base
    assert {as_system(config, name).model.rope_theta for name in ("swa", "hybrid")} == {5e5}
    chosen = replace(config, model=replace(config.model, rope_theta=2e7))
    assert as_system(chosen, "full").model.rope_theta == 2e7


@pytest.mark.parametrize("path", COMPUTE, ids=place)
def test_equal_compute_is_as_many_operations(path):
    ours, theirs = load_recipe(path.parent.with_suffix(".yaml")), load_recipe(path)
    same_tokens = load_recipe(path.with_stem(path.stem.removesuffix("-compute")))
    assert theirs.model == same_tokens.model
    length = ours.data.sequence_length
    executed = step_work(ours, tile=1).total.flops / length * ours.training.steps
    plain = model_flops_per_token(theirs.model, length) * theirs.training.steps
    assert plain == pytest.approx(executed, rel=0.02)


def test_the_command_prints_widths_and_writes_recipes(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["baselines", str(SMALL), "--systems", "e2e,swa,mamba2"]
    assert main([*words, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1,642,496" in shown
    assert "1,635,840" in shown
    assert "-0.41%" in shown
    assert sorted(path.name for path in out.iterdir()) == ["mamba2.yaml", "swa.yaml"]
    before = (out / "swa.yaml").read_text()
    assert main([*words, "--output", str(out)]) == 2
    assert "swa.yaml: there is such a file" in capsys.readouterr().err
    assert (out / "swa.yaml").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "swa,mamba"], "mamba is no system; choose of e2e, "),
        (["--output", "README.md"], "--output README.md: that is a file; give a folder"),
    ],
)
def test_the_command_refuses_in_words(words, message, capsys):
    assert main(["baselines", str(SMALL), *words]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_inner_steps_do_not_outlive_them():
    config = load_recipe(SMALL, ["inner.two_level=true", "inner.segment_chunks=4"])
    assert as_system(config, "e2e_all").inner == config.inner
    for name in ("off", "swa"):
        inner = as_system(config, name).inner
        assert (inner.two_level, inner.segment_chunks) == (False, None)


def test_what_cannot_be_made():
    config = load_recipe(SMALL)
    plain = as_system(config, "swa")
    with pytest.raises(UserError, match=r"x\.yaml: systems are made from a TTT-E2E run, .*suffix"):
        as_system(plain, "full", "x.yaml")
    thin = replace(config, model=replace(config.model, ffn_hidden_size=8))
    with pytest.raises(UserError, match=r"swa_ttt_kvb has .* parameters without any MLP, more"):
        as_system(thin, "ttt_kvb")
    odd = from_dict(
        {"model.hidden_size": 48, "model.num_heads": 2, "model.vocab_size": 64, "inner.clip": 1.0}
    )
    with pytest.raises(UserError, match=r"x\.yaml as mamba2: model\.mamba2\.head_dim = 64"):
        as_system(odd, "mamba2", "x.yaml")
