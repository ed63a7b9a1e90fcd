"""Layouts that were chosen beforehand: the file `layouts.yaml` beside the recipes it is for."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.recipe import load_recipe, named_keys
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.yaml_text import dump_yaml, parse_yaml
from ttt_megatron.errors import UserError

LAYOUTS_FILE = "layouts.yaml"
LAYOUT_KEYS = frozenset(
    {
        "parallel.data",
        "parallel.tensor",
        "parallel.sequence_parallel",
        "parallel.context",
        "parallel.context_order",
        "parallel.pipeline",
        "parallel.virtual_pipeline",
        "parallel.overlap_grad_reduce",
        "parallel.overlap_param_gather",
        "training.micro_batch_size",
        "training.recompute_prefix",
        "inner.memory_policy",
        "inner.two_level",
    }
)
"""What a layout sets: how processes share the work, and what each keeps in memory."""
SHAPES = ("model.", "inner.", "training.micro_batch_size", "training.recompute_prefix")
SIZES = ("data.sequence_length", "training.global_batch_size", "optimizer.engine")
"""What a layout was chosen for: keys that begin with one of SHAPES, and SIZES."""


@dataclass(frozen=True, kw_only=True)
class ChosenLayout:
    """The layout of one recipe on so many GPUs in one precision, or the reason why there is none.

    `recipe` is a file's name without `.yaml`; `settings` are `key=value` with spaces between.
    Seconds of a step and GiB of the fullest GPU are a plan's; None where the model's mixers are not
    planned, which `note` then says.
    """

    recipe: str
    gpus: int
    precision: str
    settings: str | None = None
    schedule: str | None = None
    step_seconds: float | None = None
    memory_gib: float | None = None
    note: str | None = None
    unfit: str | None = None

    @property
    def overrides(self) -> list[str]:
        """The settings one by one."""
        return (self.settings or "").split()


_KINDS: dict[str, type | tuple[type, ...]] = {
    "gpus": int,
    "step_seconds": (int, float),
    "memory_gib": (int, float),
}
_NEEDED = ("recipe", "gpus", "precision")
Layouts = dict[tuple[str, int, str], ChosenLayout]
"""Chosen layouts by recipe, GPUs and precision."""


@dataclass(frozen=True, kw_only=True)
class LayoutsFile:
    """What a file holds, the kind of GPU it is for, and `shapes_of` each recipe as it was then."""

    gpu: str
    layouts: Layouts
    shapes: dict[str, str] = field(default_factory=dict)


def shapes_of(config: RunConfig) -> str:
    """Stands for all that a layout is chosen for: equal shapes, equal value.

    Settings at their defaults are not in it, so that a new key changes nothing.
    """
    default = to_flat(RunConfig())
    flat = {
        key: value
        for key, value in to_flat(config).items()
        if is_shape(key) and key not in LAYOUT_KEYS and value != default[key]
    }
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def is_shape(key: str) -> bool:
    """Whether a layout is chosen for this key's value."""
    return key.startswith(SHAPES) or key in SIZES


def read_layouts(path: Path) -> LayoutsFile:
    """The layouts that a file holds.

    Raises UserError for a file that cannot be read, and for an entry that is none.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the layouts cannot be read ({error})") from None
    rows = data.get("layouts") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not isinstance(data.get("gpu"), str):
        raise UserError(
            f"{path}: layouts are a key gpu and a list layouts; write the file anew with "
            "tools/choose_layouts.py"
        )
    found: Layouts = {}
    for number, row in enumerate(rows, 1):
        entry = _entry(row, f"{path}, entry {number}")
        key = entry.recipe, entry.gpus, entry.precision
        if key in found:
            raise UserError(
                f"{path}: {entry.recipe} on {entry.gpus} GPUs in {entry.precision} stands twice; "
                "remove one"
            )
        found[key] = entry
    return LayoutsFile(gpu=data["gpu"], layouts=found, shapes=_shapes(data, str(path)))


def _shapes(data: dict[str, Any], source: str) -> dict[str, str]:
    found = data.get("shapes", {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UserError(
            f"{source}: shapes are `recipe: value` pairs; write the file anew with "
            "tools/choose_layouts.py"
        )
    return found


def _entry(row: Any, source: str) -> ChosenLayout:
    known = {field.name for field in fields(ChosenLayout)}
    if not isinstance(row, dict):
        raise UserError(f"{source}: an entry is `key: value` pairs, not {row!r}")
    for name, value in row.items():
        if name not in known:
            raise UserError(
                f"{source}: there is no {name}; the keys are {', '.join(sorted(known))}"
            )
        if isinstance(value, bool) or not isinstance(value, _KINDS.get(name, str)):
            raise UserError(f"{source}: {name} = {value!r} is no value of that key; write it anew")
    for name in _NEEDED:
        if name not in row:
            raise UserError(f"{source}: {name} is not there; add it")
    if ("settings" in row) == ("unfit" in row):
        raise UserError(f"{source}: there are settings, or unfit with the reason; give one of them")
    entry = ChosenLayout(**row)
    try:
        named = named_keys(None, entry.overrides)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for name in named.keys() - LAYOUT_KEYS:
        raise UserError(
            f"{source}: settings name {name}, which is no part of a layout; remove it there"
        )
    return entry


def write_layouts(path: Path, heading: str, file: LayoutsFile) -> None:
    """Writes a file that `read_layouts` reads, in the order of the entries, under a comment."""
    rows = []
    for entry in file.layouts.values():
        values = {field.name: getattr(entry, field.name) for field in fields(entry)}
        rows.append({name: value for name, value in values.items() if value is not None})
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    beside = path.with_name(f".{path.name}.tmp")
    text = comment + dump_yaml({"gpu": file.gpu, "shapes": file.shapes, "layouts": rows})
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def layout_beside(recipe: Path, gpus: int, precision: str, gpu: str) -> ChosenLayout | None:
    """The layout chosen for a recipe in the file beside it; None where none was chosen, or the
    recipe has had other shapes since.

    Raises as `read_layouts` and `load_recipe` do.
    """
    path = recipe.with_name(LAYOUTS_FILE)
    if not path.is_file():
        return None
    file = _read_once(path.resolve(), path.stat().st_mtime_ns)
    if file.gpu != gpu:
        return None
    chosen = file.layouts.get((recipe.stem, gpus, precision))
    shapes = file.shapes.get(recipe.stem)
    if chosen is None or shapes is None or shapes_of(load_recipe(recipe)) == shapes:
        return chosen
    return None


@cache
def _read_once(path: Path, changed: int) -> LayoutsFile:
    """As `read_layouts`, once for every time the file is changed."""
    return read_layouts(path)
