"""What a TTT-E2E model learnt from one text, as a file: read once, go on from it any time.

A safetensors file of one sequence's fast weights, cached keys and values, unfinished chunk and
last hidden state. It belongs to one base model, by a hash over that model's parameters and
settings, and notices when any byte of it has changed. Knows torch and safetensors alone.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "ttt-e2e-state"
VERSION = 1
# All metadata is one JSON text under one key: several keys would be written in random order.
_METADATA = "ttt_e2e_state"
_HASHED_AT_ONCE = 1 << 24


class StateError(ValueError):
    """A state that cannot be used, told in one sentence: the file, what is wrong, what to do."""


@dataclass(kw_only=True)
class SequenceState:
    """What one sequence's reading left behind (on any device).

    position: tokens read; steps: inner steps taken.
    fast: the fast weights now, [out, in] each, fc1 and fc2 of every prime MLP in order; none if
    read without inner steps.
    kv: keys (normalised and rotated) and values [n, n_kv, d] of every layer, first to last, in
    order of position, as far as later tokens see them; n may be 0 and differ between layers.
    pending_tokens [p] int64: the chunk that no inner step was taken on yet, full or not;
    pending_entered [p, H]: the first suffix block's stream after its attention, of these tokens.
    last_hidden [H]: the hidden state after the last token and the final norm.
    Keys, values, pending_entered and last_hidden are in the compute dtype.
    """

    position: int
    steps: int
    fast: list[Tensor]
    kv: list[tuple[Tensor, Tensor]]
    pending_tokens: Tensor
    pending_entered: Tensor
    last_hidden: Tensor


def base_hash(
    parameters: Iterable[tuple[str, Tensor]],
    settings: dict[str, int | float | str | bool | None],
) -> str:
    """SHA-256, in hex, of a base model: its settings and every parameter's name, dtype and bytes.

    Neither the parameters' order nor their device matters, nor whether a whole number is a float.
    """
    numbers = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in settings.items()
    }
    digest = hashlib.sha256(_canonical(numbers))
    _hash_tensors(digest, parameters)
    return digest.hexdigest()


def parse_change(change: str) -> int | None:
    """The rank of `rank:R`, None of `exact` and `bf16`; StateError for anything else."""
    if change in ("exact", "bf16"):
        return None
    kind, _, rank = change.partition(":")
    if kind != "rank" or not rank.isascii() or not rank.isdigit() or int(rank) == 0:
        raise StateError(f"change {change!r} is unknown: give exact, bf16 or rank:R with R ≥ 1")
    return int(rank)


def save_state(
    path: str | Path,
    state: SequenceState,
    *,
    base: str,
    initial: list[Tensor],
    change: str = "exact",
    created_by: str = f"torch {torch.__version__}",
) -> dict[str, float | int | str]:
    """Write the state; whoever looks at `path` finds what was there before or all of the new file.

    base: the model's `base_hash`. initial: the initial fast weights, as `state.fast`. change: how
    the fast weights are kept. `exact` stores them as they are; `bf16` their change since
    `initial`, rounded; `rank:R` the best rank-R approximation of each matrix's change, its two
    factors [out, R] and [R, in] in bfloat16. All else is stored as it is.

    Returns `bytes` of the file, `drift` ‖W − W₀‖/‖W₀‖ before any loss, and `error`, the loss
    relative to the change, both over all matrices. Raises StateError for an unknown `change`,
    initial weights of other shapes or fast weights that are not finite, OSError if the file cannot
    be written.
    """
    path = Path(path)
    rank = parse_change(change)
    if state.fast and not _alike(state.fast, initial):
        raise StateError(f"{path} is not written: fast weights and initial ones differ in shape")
    tensors, error, drift = _fast_tensors(state.fast, initial, change, rank)
    if not math.isfinite(error + drift):
        raise StateError(
            f"{path} is not written: the fast weights are not finite, read with other settings"
        )
    for layer, (keys, values) in enumerate(state.kv):
        tensors[f"kv.{layer}.k"], tensors[f"kv.{layer}.v"] = keys, values
    tensors["pending.tokens"] = state.pending_tokens
    tensors["pending.entered"] = state.pending_entered
    tensors["last_hidden"] = state.last_hidden
    owned = {name: _owned(tensor) for name, tensor in tensors.items()}
    info: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": created_by,
        "base": base,
        "position": state.position,
        "steps": state.steps,
        "compute_dtype": _name(state.last_hidden.dtype),
        "layers": len(state.kv),
        "fast_weights": len(state.fast),
        "change": change,
        "error": error,
        "drift": drift,
    }
    info["content"] = _content(info, owned)
    _publish(path, owned, {_METADATA: json.dumps(info, sort_keys=True)})
    return {"bytes": path.stat().st_size, "drift": drift, "error": error}


def read_state_info(path: str | Path) -> dict[str, Any]:
    """The file's metadata, needing no model and reading no tensor.

    Keys: format, version, created_by, base, position, steps, compute_dtype, layers, fast_weights
    (how many matrices), change, error, drift, content (SHA-256 of all the rest). Raises
    StateError if it is no state file of this version; `load_state` checks the content.
    """
    path = Path(path)
    with _opened(path) as file:
        return _info(path, file.metadata())


def load_state(
    path: str | Path, *, base: str, initial: list[Tensor], dtype: torch.dtype
) -> SequenceState:
    """Read a state back, on the CPU; `exact` gives every bit back.

    base and initial as for `save_state`, dtype the compute dtype. Raises StateError for a file
    that is no state, is damaged or of another version, and for one of another base model, another
    compute dtype or other shapes.
    """
    path = Path(path)
    with _opened(path) as file:
        info = _info(path, file.metadata())
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise StateError(f"{path} is damaged ({error}): {_AGAIN}") from None
    if _content({k: v for k, v in info.items() if k != "content"}, tensors) != info["content"]:
        raise StateError(f"{path} is damaged (its SHA-256 differs from the one in it): {_AGAIN}")
    if info["base"] != base:
        raise StateError(
            f"{path} belongs to another base model ({info['base'][:12]}…, this one is "
            f"{base[:12]}…): load the model it was read with, or {_AGAIN}"
        )
    if info["compute_dtype"] != _name(dtype):
        raise StateError(
            f"{path} was read in {info['compute_dtype']} and this model computes in "
            f"{_name(dtype)}: load the model in {info['compute_dtype']}, or {_AGAIN}"
        )
    try:
        state = _assembled(info, tensors, initial)
    except KeyError as error:
        raise StateError(f"{path} lacks {error}: {_AGAIN}") from None
    problem = _misfit(state, initial, dtype)
    if problem:
        raise StateError(f"{path} does not fit this model ({problem}): {_AGAIN}")
    return state


_AGAIN = "read the document again"


def _opened(path: Path) -> Any:
    try:
        path.open("rb").close()
        return safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise StateError(
            f"state {path} cannot be read ({error.strerror or error}): give a file that "
            "`read` or `save_state` wrote"
        ) from None
    except (SafetensorError, ValueError) as error:
        raise StateError(f"{path} is no state file, or damaged ({error}): {_AGAIN}") from None


def _info(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        info = json.loads((metadata or {})[_METADATA])
        if info["format"] != FORMAT:
            raise ValueError
        version = info["version"]
    except (KeyError, ValueError, TypeError):
        raise StateError(
            f"{path} holds tensors but no adapted state: give a file that `read` or "
            "`save_state` wrote"
        ) from None
    if version != VERSION:
        raise StateError(
            f"{path} is a state of format version {version} and this is version {VERSION}: use "
            f"the version that wrote it ({info.get('created_by')}), or {_AGAIN}"
        )
    missing = _KEYS - info.keys()
    if missing:
        raise StateError(f"{path} is damaged (no {min(missing)} in its metadata): {_AGAIN}")
    return dict(info)


_KEYS = {"base", "position", "steps", "compute_dtype", "layers", "fast_weights", "change"} | {
    *("created_by", "error", "drift", "content")
}


def _fast_tensors(
    fast: Sequence[Tensor], initial: Sequence[Tensor], change: str, rank: int | None
) -> tuple[dict[str, Tensor], float, float]:
    """What is stored of the fast weights, its error relative to the change, and the drift."""
    stored: dict[str, Tensor] = {}
    lost = moved = size = 0.0
    for index, (now, start) in enumerate(zip(fast, initial, strict=bool(fast))):
        now, start = now.detach(), start.detach().to(now.device)
        difference = now.double() - start.double()
        parts: dict[str, Tensor] = {"": now}
        if change == "bf16":
            parts = {".change": difference.bfloat16()}
        elif rank is not None:
            parts = dict(zip((".left", ".right"), _factors(difference, rank), strict=True))
        stored |= {f"fast.{index}{suffix}": part for suffix, part in parts.items()}
        if change != "exact":
            lost += float((difference - _change(list(parts.values()))).square().sum())
        moved += float(difference.square().sum())
        size += float(start.double().square().sum())
    error, drift = (lost / moved if moved else 0.0), (moved / size if size else 0.0)
    return stored, error**0.5, drift**0.5


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation of [out, in] float64, as bfloat16 [out, R] and [R, in]."""
    wide = difference.shape[0] < difference.shape[1]
    tall = difference.T if wide else difference
    # Singular vectors by way of the smaller Gram matrix: the decomposition is of that size only.
    vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:].flip(1)
    left, right = tall @ vectors, vectors.T
    if wide:
        left, right = right.T, left.T
    return left.bfloat16().contiguous(), right.bfloat16().contiguous()


def _change(parts: Sequence[Tensor]) -> Tensor:
    """The change that was stored, float64 [out, in]."""
    return parts[0].double() if len(parts) == 1 else parts[0].double() @ parts[1].double()


def _assembled(
    info: dict[str, Any], tensors: dict[str, Tensor], initial: Sequence[Tensor]
) -> SequenceState:
    fast = []
    for index in range(info["fast_weights"]):
        name = f"fast.{index}"
        if info["change"] == "exact":
            fast.append(tensors[name])
            continue
        suffixes = (".change",) if info["change"] == "bf16" else (".left", ".right")
        change = _change([tensors[name + suffix] for suffix in suffixes])
        start = initial[index].detach().cpu() if index < len(initial) else change
        fits = start.shape == change.shape
        fast.append((start.double() + change).to(start.dtype) if fits else change)
    return SequenceState(
        position=info["position"],
        steps=info["steps"],
        fast=fast,
        kv=[(tensors[f"kv.{i}.k"], tensors[f"kv.{i}.v"]) for i in range(info["layers"])],
        pending_tokens=tensors["pending.tokens"],
        pending_entered=tensors["pending.entered"],
        last_hidden=tensors["last_hidden"],
    )


def _misfit(state: SequenceState, initial: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with the shapes and dtypes, as far as can be told without the model."""
    if state.fast and not _alike(state.fast, initial):
        return f"fast weights {_shapes(state.fast)}, the model's are {_shapes(initial)}"
    if any(keys.shape != values.shape or keys.dim() != 3 for keys, values in state.kv):
        return "keys and values of different shapes"
    pending, entered = state.pending_tokens, state.pending_entered
    if pending.dim() != 1 or pending.dtype != torch.int64 or len(pending) > state.position:
        return f"pending tokens {_shapes([pending])} at position {state.position}"
    if entered.shape != (len(pending), *state.last_hidden.shape) or entered.dim() != 2:
        return f"pending tokens {_shapes([pending])} with a stream {_shapes([entered])}"
    others = [entered, state.last_hidden, *(x for kv in state.kv for x in kv)]
    if any(x.dtype != dtype for x in others):
        return f"tensors that are not in {_name(dtype)}"
    return None


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{list(x.shape)} {_name(x.dtype)}" for x in tensors) or "none"


def _publish(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside `path`, put on disk, rename."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        # safetensors keeps its files from other users; this one is to be as any other file.
        with beside.open("xb") as empty:
            mode = os.fstat(empty.fileno()).st_mode & 0o777
        try:
            save_file(tensors, beside, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        beside.chmod(mode)
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, alone in its memory, as safetensors asks for."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _content(info: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical(info))
    _hash_tensors(digest, tensors.items())
    return digest.hexdigest()


def _hash_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(_canonical([name, _name(tensor.dtype), list(tensor.shape)]))
        for block in _blocks(tensor.detach()):
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.reshape(-1).split(_HASHED_AT_ONCE)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
