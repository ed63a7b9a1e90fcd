"""Checkpoints of the official JAX implementation: where they lie, and what model they hold."""

import re
from pathlib import Path
from typing import Any

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_source import ImportSource, Weights
from ttt_megatron.exchange.official_names import STORED_NAMES, official_shapes, place
from ttt_megatron.exchange.official_store import MANIFEST, OfficialStore
from ttt_megatron.exchange.published import published_settings

_WEIGHTS, _OPTIMIZER = "model_weights", "opt_state"
_STEP = re.compile(r"[0-9]+")
_UNFINISHED = ".orbax-checkpoint-tmp"
_FUNCTION = ("model.window_size", "model.rope_theta", "model.norm_eps")
_INNER = ("inner.chunk_size", "inner.lr", "inner.clip")
_PRIME = {name for name in STORED_NAMES if name.startswith("prime.")}


def look_at_official(path: Path) -> ImportSource:
    """A step's folder, a run's (its last step), or the step's `model_weights`, as a source.

    Raises UserError if it is none of these, or its arrays are not those of one of our models.
    """
    folder = _find_weights(path)
    store = OfficialStore(folder)
    short = _check_names(store)
    found = {name: store.shape(stored) for name, stored in short.items()}
    shapes = shapes_settle(found, str(folder))
    notes = []
    half = [stored for stored in short.values() if store.dtype(stored) == "bfloat16"]
    if half:
        notes.append(
            f"warning: {len(half)} arrays are stored in bfloat16 ({half[0]}, ...); they are "
            f"imported exactly, but training kept float32"
        )
    if (folder.parent / _OPTIMIZER).exists():
        notes.append("the optimizer's state is there and is not brought in, weights alone are")
    step = folder.parent.name
    by_stored = {stored: name for name, stored in short.items()}

    def read_and_place(stored: str, weights: Weights, model: ModelConfig) -> None:
        place(by_stored[stored], store.read(stored), weights, model)

    return ImportSource(
        path=folder,
        kind="checkpoint of the official implementation",
        shapes=shapes,
        stated=published_settings(shapes),
        required=_FUNCTION + (_INNER if shapes["model.num_suffix_layers"] else ()),
        # The official folder of step s holds the weights after s + 1 updates.
        step=int(step) + 1 if _STEP.fullmatch(step) else 0,
        arrays=list(by_stored),
        place=read_and_place,
        notes=notes,
    )


def _find_weights(path: Path) -> Path:
    path = path.resolve()
    if _UNFINISHED in path.name or _UNFINISHED in path.parent.name:
        raise UserError(f"{path} is a save that was never finished: give another step's folder")
    if re.fullmatch(r"ocdbt\.process_\d+", path.name):
        raise UserError(
            f"{path} holds what one process wrote, not the whole: give {path.parent.parent}"
        )
    if path.name == _OPTIMIZER:
        raise UserError(f"{path} is the optimizer's state: give {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a step's folder, or the run's")
    if (path / MANIFEST).is_file() or path.name == _WEIGHTS:
        return path
    children = [child for child in path.iterdir() if child.is_dir()]
    steps = [child for child in children if _STEP.fullmatch(child.name)]
    if _STEP.fullmatch(path.name) or any(child.name == _WEIGHTS for child in children):
        step = path
    elif steps:
        step = max(steps, key=lambda child: int(child.name))
    else:
        unfinished = [child.name for child in children if _UNFINISHED in child.name]
        what = f"only the unfinished save {unfinished[0]}" if unfinished else "no step's folder"
        raise UserError(
            f"{path} holds {what} (a plain number, such as 4799): give a folder that holds one, "
            f"or the step's own"
        )
    if not (step / _WEIGHTS).is_dir():
        raise UserError(f"{step} holds no {_WEIGHTS}: copy the checkpoint again, whole")
    return step / _WEIGHTS


def _check_names(store: OfficialStore) -> dict[str, str]:
    """The stored names by our short ones; UserError unless they are those of one of our models."""
    known = {stored: name for name, stored in STORED_NAMES.items()}
    extra = [stored for stored in store.names if stored not in known]
    if extra:
        raise UserError(
            f"{store.folder} has an array {extra[0]} ({len(extra)} in all) that no model of ours "
            f"has: only models with a tied head, sandwich norms and SwiGLU MLPs are imported"
        )
    present = {known[stored] for stored in store.names}
    expected = set(STORED_NAMES) - (set() if present & _PRIME else _PRIME)
    missing = sorted(STORED_NAMES[name] for name in expected - present)
    if missing:
        raise UserError(
            f"{store.folder} has no array {missing[0]} ({len(missing)} are missing): copy the "
            f"checkpoint again, whole"
        )
    return {name: STORED_NAMES[name] for name in STORED_NAMES if name in present}


def shapes_settle(found: dict[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The settings of the model whose arrays, by short name, have these shapes.

    Raises UserError naming the array that does not fit the others.
    """

    def size(name: str, axis: int, axes: int) -> int:
        if len(found[name]) != axes or 0 in found[name]:
            raise _misfit(where, name, found[name], f"has not {axes} axes")
        return found[name][axis]

    width, head = size("wte", 1, 2), size("blocks.q_norm", 1, 2)
    if width % head:
        raise _misfit(where, "blocks.q_norm", found["blocks.q_norm"], f"does not divide {width}")
    model = ModelConfig(
        vocab_size=size("wte", 0, 2),
        num_layers=size("blocks.wq", 0, 3),
        num_suffix_layers=size("prime.w1", 0, 3) if "prime.w1" in found else 0,
        hidden_size=width,
        num_heads=width // head,
        ffn_hidden_size=size("blocks.w1", 2, 3),
    )
    for name, shape in official_shapes(model).items():
        if found[name] != shape:
            raise _misfit(where, name, found[name], f"should be {list(shape)} by the others")
    keys = ("vocab_size", "num_layers", "num_suffix_layers", "hidden_size", "num_heads")
    settled = {f"model.{key}": getattr(model, key) for key in (*keys, "ffn_hidden_size")}
    return settled | {
        "model.num_kv_heads": None,
        "model.prime_ffn_hidden_size": None,
        "model.tie_embeddings": True,
        "model.post_norm": True,
        "model.qk_norm": True,
    }


def _misfit(where: str, name: str, shape: tuple[int, ...], problem: str) -> UserError:
    return UserError(
        f"{where}: array {STORED_NAMES[name]} has the shape {list(shape)}, which {problem}; the "
        f"arrays are not of one model, copy the checkpoint again"
    )
