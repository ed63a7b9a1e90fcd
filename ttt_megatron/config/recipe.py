"""A recipe file, the files it extends, and overrides, resolved into one RunConfig."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_megatron.config.convert import build, flatten
from ttt_megatron.config.keys import check_value, known_keys, sections, unknown_key
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.config.yaml_text import parse_yaml
from ttt_megatron.errors import UserError

EXTENDS = "extends"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated run that the recipe at `path` describes.

    A recipe names only what differs: from the defaults, or from the recipe that its key `extends`
    names (a path relative to the recipe's own folder). Overrides are `dotted.key=value` with the
    value in YAML (`null` for None); of two for one key the last wins.

    Raises UserError for a file that cannot be read, recipes that extend one another in a circle,
    unknown keys, wrong types and impossible values.
    """
    config = build(named_keys(path, overrides))
    validate(config, str(path))
    return config


def named_keys(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The dotted keys that a recipe, those it extends, and overrides name, with checked values.

    Without a path, those of the overrides alone. Raises UserError as `load_recipe` does, but for
    values that are impossible together.
    """
    flat = {} if path is None else _read_chain(Path(path))
    for override in overrides:
        name, value = _parse_override(override)
        flat[name] = value
    return flat


def recipe_files(path: Path) -> list[Path]:
    """The recipe's file and those it extends. Raises UserError as `load_recipe` does for them."""
    return [file for file, _ in _read_layers(path)]


def _read_chain(path: Path) -> dict[str, Any]:
    """The recipe's keys over those of the recipes it extends."""
    layers = reversed(_read_layers(path))
    return {name: value for _, layer in layers for name, value in layer.items()}


def _read_layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe's file with its own keys, then each one that the one before extends."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    visited: list[Path] = []
    while True:
        if path.resolve() in [seen.resolve() for seen in visited]:
            chain = " -> ".join(map(str, [*visited, path]))
            raise UserError(
                f"{path}: recipes extend one another in a circle ({chain}); remove one `extends`."
            )
        visited.append(path)
        data = _read_file(path)
        parent = data.pop(EXTENDS, None)
        layers.append((path, flatten(data, str(path))))
        if parent is None:
            break
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends must be the path of one recipe, not {parent!r}.")
        if not (path.parent / parent).is_file():
            raise UserError(
                f"{path}: extends names {parent}, and there is no file {path.parent / parent}; "
                "the path is taken relative to the recipe's folder."
            )
        path = path.parent / parent
    return layers


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the recipe is not UTF-8 text ({error.reason}).") from None
    except OSError as error:
        raise UserError(f"{path}: the recipe cannot be read ({error.strerror}).") from None
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: a recipe holds `key: value` pairs, not {data!r}.")
    return dict(data)


def _parse_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    name, source = name.strip(), f"override {override!r}"
    if not equals:
        raise UserError(f"{source}: write key=value, for example training.steps=100.")
    if name in sections():
        example = next(key for key in known_keys() if key.startswith(name + "."))
        raise UserError(f"{source}: {name} is a section; set one of its keys, such as {example}.")
    if name not in known_keys():
        raise unknown_key(name, source)
    key = known_keys()[name]
    if key.kind is str and not key.choices:
        return name, _text(text, key.optional, source)
    return name, check_value(name, parse_yaml(text, source), source)


def _text(text: str, optional: bool, source: str) -> str | None:
    """An override's text as it stands, so that a folder named 2024 needs no quotes in quotes."""
    if text[:1] in ("'", '"'):
        value = parse_yaml(text, source)
        return value if isinstance(value, str) else text
    return None if optional and text in ("", "~", "null") else text
