"""The file of layouts beside recipes: read back as written, refused in words."""

import os
from dataclasses import replace

import pytest

from ttt_megatron.config.layouts import (
    ChosenLayout,
    LayoutsFile,
    layout_beside,
    read_layouts,
    shapes_of,
    write_layouts,
)
from ttt_megatron.config.recipe import load_recipe
from ttt_megatron.errors import UserError

FITS = ChosenLayout(
    recipe="a",
    gpus=8,
    precision="bf16",
    settings="parallel.data=8 training.micro_batch_size=2",
    schedule="in turn",
    step_seconds=1.25,
    memory_gib=40.0,
)
UNFIT = ChosenLayout(recipe="a", gpus=8, precision="fp8", unfit="no layout fits: too large")
BOTH = LayoutsFile(
    gpu="h100", layouts={(one.recipe, one.gpus, one.precision): one for one in (FITS, UNFIT)}
)
RECIPE = "model: {num_layers: 4, num_suffix_layers: 1}\n"


def test_what_is_written_is_read_back_and_found_beside_a_recipe(tmp_path):
    path = tmp_path / "layouts.yaml"
    assert layout_beside(tmp_path / "a.yaml", 8, "bf16", "h100") is None
    write_layouts(path, "What it is.\nMore.", BOTH)
    assert path.read_text().startswith("# What it is.\n# More.\ngpu: h100\n")
    assert read_layouts(path) == BOTH
    assert layout_beside(tmp_path / "a.yaml", 8, "bf16", "h100") == FITS
    assert layout_beside(tmp_path / "a.yaml", 8, "fp8", "h100") == UNFIT
    for recipe, gpus, gpu in (("b", 8, "h100"), ("a", 16, "h100"), ("a", 8, "h200")):
        assert layout_beside(tmp_path / f"{recipe}.yaml", gpus, "bf16", gpu) is None
    assert FITS.overrides == ["parallel.data=8", "training.micro_batch_size=2"]


def test_a_file_that_has_changed_is_read_again(tmp_path):
    path = tmp_path / "layouts.yaml"
    write_layouts(path, "", BOTH)
    assert layout_beside(tmp_path / "a.yaml", 8, "fp8", "h100") == UNFIT
    write_layouts(path, "", LayoutsFile(gpu="h100", layouts={}))
    os.utime(path, ns=(1, 1))
    assert layout_beside(tmp_path / "a.yaml", 8, "fp8", "h100") is None


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ("optimizer: {lr: 1e-3}", True),
        ("training: {steps: 9}", True),
        ("data: {sequence_length: 4096}", False),
        ("inner: {chunk_size: 512}", False),
    ],
)
def test_a_recipe_of_other_shapes_than_then_has_no_layout(change, holds, tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(RECIPE)
    shapes = {"a": shapes_of(load_recipe(recipe))}
    write_layouts(tmp_path / "layouts.yaml", "", replace(BOTH, shapes=shapes))
    assert layout_beside(recipe, 8, "bf16", "h100") == FITS
    recipe.write_text(RECIPE + change)
    assert layout_beside(recipe, 8, "bf16", "h100") == (FITS if holds else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: h100\nlayouts: []\nshapes: {a: 1}", "shapes are `recipe: value` pairs"),
        ("- 1", "layouts are a key gpu and a list layouts"),
        ("gpu: h100", "layouts are a key gpu and a list layouts"),
        ("gpu: h100\nlayouts: [1]", "entry 1: an entry is `key: value` pairs, not 1"),
        ("gpu: h100\nlayouts: [{recipe: a}]", "entry 1: gpus is not there; add it"),
        ("gpu: h100\nlayouts: [{gpus: a}]", "entry 1: gpus = 'a' is no value of that key"),
        ("gpu: h100\nlayouts: [{speed: 1}]", "entry 1: there is no speed; the keys are gpus, "),
    ],
)
def test_what_is_no_file_of_layouts_is_refused(text, message, tmp_path):
    path = tmp_path / "layouts.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_layouts(path)
    assert str(error.value).startswith(f"{path}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "there are settings, or unfit with the reason; give one of them"),
        ("settings: parallel.data=1, unfit: no", "give one of them"),
        ("settings: parallel.date=1", "unknown key parallel.date"),
        ("settings: optimizer.lr=1", "settings name optimizer.lr, which is no part of a layout"),
        ("settings: parallel.data=1}, {recipe: a, gpus: 8, precision: bf16, unfit: x", "twice"),
    ],
)
def test_what_is_no_layout_is_refused(more, message, tmp_path):
    path = tmp_path / "layouts.yaml"
    entry = f"recipe: a, gpus: 8, precision: bf16{', ' if more else ''}{more}"
    path.write_text(f"gpu: h100\nlayouts: [{{{entry}}}]")
    with pytest.raises(UserError, match=message):
        read_layouts(path)
