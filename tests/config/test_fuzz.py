"""Whatever a recipe says, it is a run or one sentence; never a traceback."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_megatron.config import from_dict, load_recipe, to_dict, to_yaml
from ttt_megatron.config.keys import Key, known_keys
from ttt_megatron.config.schema import ATTENTION_MIXERS, RunConfig
from ttt_megatron.config.yaml_text import parse_yaml
from ttt_megatron.errors import UserError
from ttt_megatron.model.parameters import count_parameters

# The same examples every time: what is red here is red there.
_FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "0", "1e-3", "true", "null", "auto", "meta", "off", "full", "-", "~"]),
    st.text(max_size=12),
)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
_SECTIONS = sorted({name.split(".")[0] for name in known_keys()})
_NAMES = st.sampled_from(sorted(known_keys())) | st.sampled_from(_SECTIONS) | st.text(max_size=12)


def _fitting(key: Key) -> st.SearchStrategy[Any]:
    """Values of the right type, small and near one another, so that they meet in relations."""
    if key.choices:
        found: st.SearchStrategy[Any] = st.sampled_from(key.choices)
    elif key.kind is bool:
        found = st.booleans()
    elif key.kind is int:
        found = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 2048, 10**9])
    elif key.kind is float:
        found = st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0, 1.5, 8.0, 1e30])
    elif key.name == "model.mixers":
        words = ("attention", "full", "mamba2", "gated_delta", "ttt_kvb", "swa_ttt_kvb")
        found = st.lists(st.sampled_from(words), min_size=1, max_size=4).map(",".join)
    else:
        found = st.text(max_size=6)
    return st.none() | found if key.optional else found


_SETTINGS = st.lists(st.sampled_from(sorted(known_keys())), max_size=8, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: _fitting(known_keys()[name]) for name in names})
)


def _sound(config: RunConfig) -> None:
    """What every run that passes can be asked."""
    assert from_dict(parse_yaml(to_yaml(config), "again"), "again") == config
    assert from_dict(to_dict(config)) == config
    assert config.parallel.world_size >= 1
    if config.model.vocab_size is not None and config.model.mixers in ATTENTION_MIXERS:
        assert count_parameters(config.model).total > 0


def _tells(error: UserError, source: str = "") -> None:
    text = str(error)
    assert text
    assert source in text
    assert "Traceback" not in text


@_FUZZ
@given(st.dictionaries(_NAMES, _ANYTHING, max_size=4))
def test_keys_and_values_of_any_kind(values: dict[str, Any]) -> None:
    try:
        _sound(from_dict(values, "fuzz"))
    except UserError as error:
        _tells(error, "fuzz")


@_FUZZ
@given(_SETTINGS)
def test_settings_of_the_right_types_in_any_combination(values: dict[str, Any]) -> None:
    try:
        _sound(from_dict(values, "fuzz"))
    except UserError as error:
        _tells(error)


@_FUZZ
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
)
def test_files_of_any_content(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_bytes(content)
        try:
            _sound(load_recipe(recipe))
        except UserError as error:
            _tells(error, str(recipe))


@_FUZZ
@given(
    st.lists(
        st.builds("{}={}".format, _NAMES, st.text(max_size=12)) | st.text(max_size=8), max_size=3
    )
)
def test_overrides_of_any_text(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text("name: fuzz\n")
        try:
            _sound(load_recipe(recipe, overrides))
        except UserError as error:
            _tells(error)
