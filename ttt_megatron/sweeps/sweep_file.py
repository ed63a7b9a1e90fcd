"""A sweep's file, read and checked as far as it can be without its recipe. Knows no torch."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_megatron.config.convert import flatten
from ttt_megatron.config.keys import check_value, known_keys, unknown_key
from ttt_megatron.config.yaml_text import parse_yaml
from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.spec import LOSSES, RESERVED, SEED, VALIDATION_LOSS, Axis, Sweep

_KEYS = ("name", "base", "output", "set", "axes", "zipped", "points", "seeds", "measure")
_MEASURE_KEYS = ("loss", "evaluate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def read_sweep(path: str | Path) -> Sweep:
    """The sweep that a file describes.

    Raises UserError for a file that cannot be read, an unknown key (naming the nearest), a value of
    the wrong type, a key that is varied twice or that a sweep sets by itself, and for no points.
    """
    path, source = Path(path), str(path)
    data = _read_mapping(path)
    for key in data:
        if key not in _KEYS:
            raise _unknown(source, key, _KEYS)
    name = str(data.get("name", path.stem))
    if not _NAME.fullmatch(name):
        raise UserError(f"{source}: name {name!r} names folders: take letters, digits, . _ + -")
    sweep = Sweep(
        source=source,
        name=name,
        base=_base(path, data.get("base")),
        output=str(data.get("output") or f"runs/sweeps/{name}"),
        settings=_settings(data.get("set"), f"{source}: set"),
        axes=(*_axes(data.get("axes"), source), *_zipped(data.get("zipped"), source)),
        named_points=_named_points(data.get("points"), source),
        seeds=_seeds(data.get("seeds"), source),
        **_measure(data.get("measure"), source),
    )
    _refuse_doubles(sweep)
    return sweep


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(
            f"{path}: the sweep cannot be read ({reason}); give the path of a YAML file"
        ) from None
    return _mapping(parse_yaml(text, str(path)), str(path))


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{source} must hold `key: value` pairs, not {value!r}")
    return dict(value)


def _unknown(source: str, key: str, known: tuple[str, ...]) -> UserError:
    near = max(known, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    return UserError(
        f"{source}: unknown key {key}; the nearest known key is {near} (all: {', '.join(known)})"
    )


def _base(path: Path, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: base must be the path of a recipe, not {value!r}")
    base = Path(os.path.normpath(path.parent / value))
    if not base.is_file():
        raise UserError(
            f"{path}: base names {value}, and there is no file {base}; the path is taken relative "
            "to the sweep's folder"
        )
    return base


def check_key(key: str, source: str) -> None:
    """Raises UserError if a sweep cannot set `key`: it does not exist, or is the sweep's own."""
    if key not in known_keys():
        raise unknown_key(key, source)
    if key in RESERVED:
        raise UserError(f"{source}: {key} cannot be set here: {RESERVED[key]}")


def _settings(value: Any, source: str) -> dict[str, Any]:
    flat = flatten(_mapping(value, source), source)
    for key in flat:
        check_key(key, source)
    return flat


def _values(key: str, values: Any, source: str) -> list[Any]:
    check_key(key, source)
    if not isinstance(values, list) or not values:
        raise UserError(f"{source}: {key} must have a list of values, not {values!r}")
    return [check_value(key, value, source) for value in values]


def _axes(value: Any, source: str) -> list[Axis]:
    where = f"{source}: axes"
    return [
        Axis(keys=(key,), values=tuple((one,) for one in _values(key, values, where)))
        for key, values in _mapping(value, where).items()
    ]


def _zipped(value: Any, source: str) -> list[Axis]:
    where = f"{source}: zipped"
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of groups of keys, not {value!r}")
    axes = []
    for group in value:
        columns = {k: _values(k, v, where) for k, v in _mapping(group, where).items()}
        lengths = {key: len(values) for key, values in columns.items()}
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise UserError(f"{where}: keys that change together need equally many values: {told}")
        axes.append(Axis(keys=tuple(columns), values=tuple(zip(*columns.values(), strict=True))))
    return axes


def _named_points(value: Any, source: str) -> dict[str, dict[str, Any]]:
    points = {}
    for name, settings in _mapping(value, f"{source}: points").items():
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{source}: the point {name!r} names a folder: take letters, digits, . _ + -"
            )
        points[name] = _settings(settings, f"{source}: point {name}")
    return points


def _seeds(value: Any, source: str) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(_values(SEED, value, f"{source}: seeds"))


def _measure(value: Any, source: str) -> dict[str, Any]:
    where = f"{source}: measure"
    data = _mapping(value, where)
    for key in data:
        if key not in _MEASURE_KEYS:
            raise _unknown(where, key, _MEASURE_KEYS)
    loss = data.get("loss", VALIDATION_LOSS)
    if loss not in LOSSES:
        raise UserError(f"{where}: loss must be one of {', '.join(LOSSES)}, not {loss!r}")
    evaluate = data.get("evaluate", False)
    if evaluate is True or evaluate is None:
        return {"loss": loss, "evaluate": {}}
    if evaluate is False:
        return {"loss": loss, "evaluate": None}
    options = _mapping(evaluate, f"{where}: evaluate")
    if "output" in options:
        raise UserError(f"{where}: evaluate: output is evaluation/ in each run's folder; drop it")
    return {"loss": loss, "evaluate": options}


def _refuse_doubles(sweep: Sweep) -> None:
    varied = sweep.varied + ([SEED] if sweep.seeds else [])
    for key in varied:
        if varied.count(key) > 1:
            raise UserError(f"{sweep.source}: {key} is varied twice; leave one out")
        if key in sweep.settings:
            raise UserError(f"{sweep.source}: {key} is varied and also under set; leave one out")
    if sweep.seeds:
        for name, settings in sweep.named_points.items():
            if SEED in settings:
                raise UserError(f"{sweep.source}: point {name} sets {SEED} beside seeds; drop it")
    if not (sweep.axes or sweep.named_points or sweep.seeds):
        raise UserError(
            f"{sweep.source} has no points: give axes, zipped, points or seeds a value to vary"
        )
