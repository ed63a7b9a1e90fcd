"""Recipes of the systems, that name only what differs from the run they are made from."""

import os
from pathlib import Path
from typing import Any

from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.recipe import EXTENDS
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.yaml_text import dump_yaml


def system_recipe(config: RunConfig, made: RunConfig, name: str, base: Path, folder: Path) -> str:
    """The YAML text of a recipe in `folder` for a system `made` of `config`, the recipe `base`.

    It extends the base, trains to the base's folder with the system's name behind it, and starts
    from such a run where the base starts from one.
    """
    before, after = to_flat(config), to_flat(made)
    changed = {key: value for key, value in after.items() if value != before[key]}
    changed["name"] = f"{config.name}-{name}"
    changed["training.output"] = f"{config.training.output}-{name}"
    if config.training.init_from is not None:
        changed["training.init_from"] = f"{config.training.init_from}-{name}"
    nested: dict[str, Any] = {EXTENDS: os.path.relpath(base, folder)}
    for key in (key for key in after if key in changed):
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = changed[key]
    return dump_yaml(nested)
