"""Recipes: layers, overrides, round trips, and every error's words."""

from pathlib import Path

import pytest

from ttt_megatron.config import RunConfig, from_dict, load_recipe, to_dict, to_yaml
from ttt_megatron.config.keys import known_keys
from ttt_megatron.config.layouts import LAYOUTS_FILE
from ttt_megatron.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def other_value(name: str):
    """A legal value that is not the default, for keys that relate to no other."""
    if name == "model.mixers":
        return "full" + 11 * ",attention"
    key = known_keys()[name]
    if key.choices:
        return next(choice for choice in key.choices if choice != key.default)
    return {bool: lambda: not key.default, str: lambda: "1e-3"}[key.kind]()


def test_an_empty_recipe_is_the_defaults(write):
    assert load_recipe(write("empty.yaml", "# nothing\n")) == RunConfig()
    assert load_recipe(write("section.yaml", "model:\n")) == RunConfig()


def test_layers_and_overrides_win_in_order(write):
    write("base.yaml", "model: {num_layers: 8, hidden_size: 512, num_heads: 8}\nname: base\n")
    write("deep/middle.yaml", "extends: ../base.yaml\nmodel: {num_layers: 6}\noptimizer.lr: 1e-2\n")
    leaf = write("deep/leaf.yaml", "extends: middle.yaml\nname: leaf\n")
    config = load_recipe(leaf, ["model.num_heads=4", "model.num_heads=16", "optimizer.lr=1e-4"])
    assert (config.model.num_layers, config.model.hidden_size, config.name) == (6, 512, "leaf")
    assert (config.model.num_heads, config.optimizer.lr) == (16, 1e-4)
    assert load_recipe(leaf).optimizer.lr == 0.01


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer", "lr", 0.001),
        ("optimizer.lr='1e-3'", "optimizer", "lr", 0.001),
        ("inner.clip=2", "inner", "clip", 2.0),
        ("inner.mode=off", "inner", "mode", "off"),
        ("inner.two_level=true", "inner", "two_level", True),
        ("model.window_size=null", "model", "window_size", None),
        ("training.init_from=null", "training", "init_from", None),
        ("training.init_from=1e-3", "training", "init_from", "1e-3"),
        ("data.path=2024", "data", "path", "2024"),
        ("data.path=a=b: [c", "data", "path", "a=b: [c"),
        ("data.path='null'", "data", "path", "null"),
        ("data.path=", "data", "path", ""),
    ],
)
def test_override_values(write, override, section, field, value):
    config = load_recipe(write("r.yaml", "training: {init_from: runs/old}\n"), [override])
    found = getattr(getattr(config, section), field)
    assert found == value
    assert type(found) is type(value)


def test_dictionaries_and_yaml_round_trip_exactly(write):
    # Texts that YAML would take for something else, and floats that do not print short.
    config = from_dict(
        {
            "name": "off",
            "data": {"path": "1e-3", "packing": "spans", "sequence_length": 4096},
            "optimizer": {"lr": 0.1 + 0.2, "eps": 1e-17, "weight_decay": 0},
            "training": {"init_from": "null", "output": "0x10: ü #\n'\"", "seed": 10},
            "model": {"vocab_size": 1 << 40, "window_size": None},
            "tracking": {"experiment": "1:30", "tracking_uri": " 010"},
        }
    )
    assert from_dict(to_dict(config)) == config
    assert load_recipe(write("saved.yaml", to_yaml(config))) == config
    assert type(config.optimizer.weight_decay) is float


@pytest.mark.parametrize(
    "name", [n for n, key in known_keys().items() if key.kind is str or key.kind is bool]
)
def test_every_text_and_switch_survives_a_saved_recipe(write, name):
    needed = {
        "parallel.sequence_parallel": {"tensor": 2},
        "parallel.context_order": {"context": 2},
        "parallel.overlap_param_gather": {"overlap_grad_reduce": True},
    }
    data = {"parallel": needed.get(name, {}), name: other_value(name)}
    if name.startswith("fp8."):
        data["training"] = {"precision": "fp8"}
    config = from_dict(data)
    assert load_recipe(write("saved.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimiser: {lr: 1}", ["r.yaml", "unknown key optimiser.lr", "is optimizer.lr "]),
        ("model: {numlayers: 1}", ["r.yaml", "model.numlayers", "model.num_layers "]),
        ("window_size: 8", ["unknown key window_size", "model.window_size "]),
        ("training: {steps: {a: 1}}", ["training.steps must be an integer, not {'a': 1}"]),
        ("training: {steps: 2.0}", ["training.steps must be an integer, not 2.0"]),
        ("training: {steps: true}", ["training.steps must be an integer, not True"]),
        ("training: {steps: null}", ["training.steps must be an integer, not None"]),
        ("training: {steps: '5'}", ["training.steps must be an integer, not '5'"]),
        ("optimizer: {lr: fast}", ["optimizer.lr must be a number, not 'fast'"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr must be a number, not nan"]),
        ("optimizer: {lr: false}", ["optimizer.lr must be a number, not False"]),
        ("inner: {two_level: 1}", ["inner.two_level must be true or false, not 1"]),
        ("inner: {mode: meat}", ["inner.mode must be one of meta, first_order, naive, off"]),
        ("name: 8", ["name must be text, not 8"]),
        ("model: {vocab_size: many}", ["model.vocab_size must be an integer or null"]),
        ("model: 8", ["model is a section"]),
        ("- 1", ["r.yaml", "`key: value` pairs"]),
        ("name: a\nname: b", ["r.yaml, line 2", "name stands twice"]),
        ("optimizer.lr: 1\noptimizer: {lr: 2}", ["optimizer.lr stands twice"]),
        ("name: [", ["r.yaml, line"]),
        ("1: a", ["r.yaml, line 1", "the key 1 is not text"]),
        ("extends: 5", ["extends must be the path of one recipe, not 5"]),
        ("extends: gone.yaml", ["r.yaml", "gone.yaml"]),
        ("extends: r.yaml", ["circle", "r.yaml -> "]),
        ("inner: {chunk_size: 3000}", ["r.yaml: inner.chunk_size = 3000"]),
    ],
)
def test_bad_recipes_are_refused_in_words(write, text, words):
    with pytest.raises(UserError) as caught:
        load_recipe(write("r.yaml", text))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", ["'training.steps'", "key=value"]),
        ("training.step=4", ["unknown key training.step", "training.steps "]),
        ("training=4", ["training is a section", "training.steps"]),
        ("training.steps=x", ["override 'training.steps=x'", "an integer, not 'x'"]),
    ],
)
def test_bad_overrides_are_refused_in_words(write, override, words):
    with pytest.raises(UserError) as caught:
        load_recipe(write("r.yaml", ""), [override])
    for word in words:
        assert word in str(caught.value)


def test_a_longer_circle_and_unreadable_files(write, tmp_path):
    write("a.yaml", "extends: b.yaml")
    b = write("b.yaml", "extends: ./a.yaml")
    with pytest.raises(UserError, match=r"circle.*b\.yaml -> .*a\.yaml -> .*b\.yaml"):
        load_recipe(b)
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "path",
    [
        str(path.relative_to(RECIPES))
        for path in sorted(RECIPES.rglob("*.yaml"))
        if path.parent.name != "sweeps" and path.name != LAYOUTS_FILE
    ],
)
def test_every_recipe_of_the_repository_is_valid(path):
    load_recipe(RECIPES / path)


@pytest.mark.parametrize(
    ("size", "pretraining", "extension"),
    [
        ("125m", 2.5e9, 125e6),
        ("350m", 7e9, 350e6),
        ("760m", 15e9, 750e6),
        ("1b", 26e9, 1.3e9),
        ("3b", 54e9, 2.7e9),
    ],
)
def test_published_runs_read_the_published_tokens(size, pretraining, extension):
    for recipe, tokens in (
        ("pretrain-e2e-8k.yaml", pretraining),
        ("extend-e2e-32k.yaml", extension),
    ):
        config = load_recipe(RECIPES / size / recipe)
        training = config.training
        read = training.steps * training.global_batch_size * config.data.sequence_length
        assert tokens <= read <= 1.02 * tokens
        assert config.model.num_suffix_layers * 4 == config.model.num_layers
