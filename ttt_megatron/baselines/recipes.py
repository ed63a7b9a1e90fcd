"""Recipes of the systems, that name only what differs from the run they are made from."""

import os
import re
from pathlib import Path
from typing import Any

from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.recipe import EXTENDS
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.yaml_text import dump_yaml

_OWN = re.compile(r"(?<![^-/])e2e(?![^-/])")
"""TTT-E2E's place in a name made of words with hyphens between, as in pretrain-e2e-8k."""


def named_for(system: str, name: str) -> str:
    """The name of a TTT-E2E run, recipe or folder as another system's.

    The system's name stands where `e2e` does, or else behind all of it.
    """
    renamed, count = _OWN.subn(system, name)
    return renamed if count else f"{name}-{system}"


def recipe_file(system: str, base: Path) -> str:
    """The name of a system's recipe made from `base`: beside a recipe of a system its own."""
    renamed, count = _OWN.subn(system, base.stem)
    return f"{renamed if count else system}.yaml"


def system_recipe(config: RunConfig, made: RunConfig, name: str, base: Path, folder: Path) -> str:
    """The YAML text of a recipe in `folder` for a system `made` of `config`, the recipe `base`.

    It extends the base, trains to the base's folder under the system's name, and starts from such
    a run where the base starts from one.
    """
    before, after = to_flat(config), to_flat(made)
    changed = {key: value for key, value in after.items() if value != before[key]}
    changed["name"] = named_for(name, config.name)
    changed["training.output"] = named_for(name, config.training.output)
    if config.training.init_from is not None:
        changed["training.init_from"] = named_for(name, config.training.init_from)
    nested: dict[str, Any] = {EXTENDS: os.path.relpath(base, folder)}
    for key in (key for key in after if key in changed):
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = changed[key]
    return dump_yaml(nested)
