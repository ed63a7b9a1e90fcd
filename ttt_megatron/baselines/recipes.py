"""Recipes of the systems, that name only what differs from the run they are made from."""

import os
from pathlib import Path
from typing import Any

from ttt_megatron.baselines.systems import as_system
from ttt_megatron.config.convert import to_dict
from ttt_megatron.config.recipe import EXTENDS
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.yaml_text import dump_yaml


def system_recipe(config: RunConfig, name: str, base: Path, folder: Path) -> str:
    """The YAML text of a recipe in `folder` that extends the TTT-E2E recipe `base`.

    It trains to the base's folder with the system's name behind it, and starts from such a run
    where the base starts from one. Raises UserError as `as_system` does.
    """
    made = as_system(config, name, str(base))
    before, after = _leaves(to_dict(config)), _leaves(to_dict(made))
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


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
