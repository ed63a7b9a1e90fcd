"""The state file: gives back what was put in, notices any damage, appears whole or not at all."""

import ast
import hashlib
import json
import os
import random
import resource
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ttt_megatron.hf import state_ttt_e2e
from ttt_megatron.hf.state_ttt_e2e import (
    SequenceState,
    StateError,
    base_hash,
    load_state,
    read_state_info,
    save_state,
)

BASE = "b" * 64


def a_state(dtype=torch.bfloat16, *, moved=0.1, scale=1, seed=0):
    """A state of two layers with one prime MLP, and the initial weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    initial = [draw(12 * scale, 4 * scale), draw(4 * scale, 6 * scale)]
    state = SequenceState(
        position=9,
        steps=2,
        fast=[w + moved * draw(*w.shape) for w in initial],
        kv=[(draw(n, 2, 4).to(dtype), draw(n, 2, 4).to(dtype)) for n in (0, 3)],
        pending_tokens=torch.tensor([7]),
        pending_entered=draw(1, 8).to(dtype),
        last_hidden=draw(8).to(dtype),
    )
    return state, initial


def tensors_of(state):
    tensors = [*state.fast, *(x for kv in state.kv for x in kv)]
    return [*tensors, state.pending_tokens, state.pending_entered, state.last_hidden]


def distance(a, b):
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_gives_every_bit_back_and_the_same_file_again(dtype, tmp_path):
    state, initial = a_state(dtype)
    if dtype == torch.float64:
        initial, state.fast = [w.double() for w in initial], [w.double() / 3 for w in state.fast]
    info = save_state(tmp_path / "a", state, base=BASE, initial=initial)
    again = load_state(tmp_path / "a", base=BASE, initial=initial, dtype=dtype)
    assert (again.position, again.steps) == (9, 2)
    for actual, expected in zip(tensors_of(again), tensors_of(state), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    save_state(tmp_path / "b", again, base=BASE, initial=initial)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert info["bytes"] == (tmp_path / "a").stat().st_size
    assert info["error"] == 0.0
    moved = distance(state.fast, initial) / distance(initial, [0 * w for w in initial])
    assert info["drift"] == pytest.approx(moved**0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    (tmp_path / "c").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "c").stat().st_mode


def test_views_of_larger_tensors_and_no_fast_weights_are_fine(tmp_path):
    state, initial = a_state()
    batch = torch.randn(3, 5, 2, 4).bfloat16()
    state = replace(state, fast=[], kv=[(batch[1, 1:4], batch.transpose(2, 3)[1, :3])] * 2)
    state.kv = [(k, v.transpose(1, 2)) for k, v in state.kv]
    info = save_state(tmp_path / "a", state, base=BASE, initial=initial, change="rank:2")
    assert (info["drift"], info["error"]) == (0.0, 0.0)
    again = load_state(tmp_path / "a", base=BASE, initial=initial, dtype=torch.bfloat16)
    assert again.fast == []
    assert torch.equal(again.kv[1][1], batch[1, :3])


def test_a_rounded_change_is_off_by_what_the_file_says(tmp_path):
    state, initial = a_state(scale=8)
    options = {"base": BASE, "initial": initial}
    info = save_state(tmp_path / "a", state, change="bf16", **options)
    again = load_state(tmp_path / "a", dtype=torch.bfloat16, **options)
    change = distance(state.fast, initial)
    assert info["error"] == pytest.approx((distance(again.fast, state.fast) / change) ** 0.5, 1e-3)
    assert 0.0 < info["error"] < 2**-8
    exact = save_state(tmp_path / "b", state, **options)["bytes"]
    assert info["bytes"] < 0.6 * exact
    for actual, expected in zip(tensors_of(again)[2:], tensors_of(state)[2:], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rank", [1, 5, 24, 1000])
def test_a_change_of_low_rank_is_the_best_there_is(rank, tmp_path):
    state, initial = a_state(scale=8)
    options = {"base": BASE, "initial": initial}
    info = save_state(tmp_path / "a", state, change=f"rank:{rank}", **options)
    again = load_state(tmp_path / "a", dtype=torch.bfloat16, **options)
    change = distance(state.fast, initial)
    error = (distance(again.fast, state.fast) / change) ** 0.5
    assert info["error"] == pytest.approx(error, 1e-3)
    assert read_state_info(tmp_path / "a")["error"] == info["error"]
    beyond = 0.0
    for now, start in zip(state.fast, initial, strict=True):
        values = torch.linalg.svdvals(now.double() - start.double())
        beyond += float(values[rank:].square().sum())
    # The factors are rounded to bfloat16: that much more, and no more.
    assert (beyond / change) ** 0.5 <= error
    assert error**2 <= beyond / change + (2**-7) ** 2


def test_unmoved_weights_have_no_error(tmp_path):
    state, initial = a_state(moved=0.0)
    for change in ("exact", "bf16", "rank:1"):
        info = save_state(tmp_path / "a", state, base=BASE, initial=initial, change=change)
        assert (info["drift"], info["error"]) == (0.0, 0.0)
        again = load_state(tmp_path / "a", base=BASE, initial=initial, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(again.fast, initial, strict=True))


@pytest.mark.parametrize("change", ["", "fp8", "rank", "rank:0", "rank:-1", "rank:2.5", "rank:²"])
def test_unknown_changes_are_refused(change, tmp_path):
    state, initial = a_state()
    with pytest.raises(StateError, match="exact, bf16 or rank:R"):
        save_state(tmp_path / "a", state, base=BASE, initial=initial, change=change)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_not_written(tmp_path):
    state, initial = a_state()
    with pytest.raises(StateError, match="differ in shape"):
        save_state(tmp_path / "a", state, base=BASE, initial=initial[::-1])
    state.fast[0][0, 0] = float("nan")
    with pytest.raises(StateError, match="not finite"):
        save_state(tmp_path / "a", state, base=BASE, initial=initial)
    with pytest.raises(OSError, match="No such file"):
        save_state(tmp_path / "no" / "a", a_state()[0], base=BASE, initial=initial)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A file, and what `load_state` needs."""
    state, initial = a_state()
    path = tmp_path / "one.state"
    save_state(path, state, base=BASE, initial=initial)
    return path, {"base": BASE, "initial": initial, "dtype": torch.bfloat16}


def test_any_flipped_bit_is_noticed(saved):
    path, options = saved
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"one\.state"):
            load_state(path, **options)


def test_a_file_that_is_cut_or_longer_is_noticed(saved):
    path, options = saved
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 31), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match=r"one\.state"):
            load_state(path, **options)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StateError, match=r"one\.state"):
        load_state(path, **options)


def test_files_that_are_no_states_are_refused(saved, tmp_path):
    _, options = saved
    text, weights = tmp_path / "book.txt", tmp_path / "model.safetensors"
    text.write_text("Call me Ishmael. " * 20)
    save_file({"a": torch.zeros(2)}, weights)
    for path, message in [
        (text, "book.txt is no state file, or damaged"),
        (weights, "holds tensors but no adapted state"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none", "none cannot be read .No such file"),
    ]:
        for look in (read_state_info, lambda path: load_state(path, **options)):
            with pytest.raises(StateError, match=message):
                look(path)


def with_metadata(path, **changed):
    """Rewrite the file with other metadata and a content hash that is right for it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    info = json.loads(header["__metadata__"]["ttt_e2e_state"])
    info = {k: v for k, v in {**info, **changed}.items() if v is not None and k != "content"}
    with state_ttt_e2e.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    info["content"] = state_ttt_e2e._content(info, tensors)
    save_file(tensors, path, metadata={"ttt_e2e_state": json.dumps(info)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "format version 2 and this is version 1: use the version that wrote it"),
        ({"format": "other"}, "no adapted state"),
        ({"steps": None}, "no steps in its metadata"),
        ({"layers": 3}, "lacks 'kv.2.k'"),
        ({"position": 0}, r"pending tokens \[1\] int64 at position 0"),
        ({"fast_weights": 1}, "does not fit this model .fast weights"),
    ],
)
def test_metadata_of_another_kind_is_refused(saved, changed, message):
    path, options = saved
    with_metadata(path)
    load_state(path, **options)
    with_metadata(path, **changed)
    with pytest.raises(StateError, match=message):
        load_state(path, **options)


def test_another_model_is_refused(saved):
    path, options = saved
    with pytest.raises(StateError, match=r"another base model \(bbbbbbbbbbbb…, this one is c"):
        load_state(path, **{**options, "base": "c" * 64})
    with pytest.raises(StateError, match="read in bfloat16 and this model computes in float32"):
        load_state(path, **{**options, "dtype": torch.float32})
    first, second = options["initial"]
    for initial in ([first], [second, first], [first, second.T]):
        for change in ("exact", "bf16", "rank:1"):
            state, right = a_state()
            save_state(path, state, base=BASE, initial=right, change=change)
            with pytest.raises(StateError, match="does not fit this model"):
                load_state(path, **{**options, "initial": initial})


def test_tensors_that_contradict_one_another_are_refused(saved):
    path, options = saved
    state, initial = a_state()
    keys, values = state.kv[1]
    for wrong in (
        {"kv": [(keys, values[:2])]},
        {"kv": [(keys.float(), values)]},
        {"pending_tokens": torch.tensor([7, 7])},
        {"pending_tokens": torch.tensor([7], dtype=torch.int32)},
        {"pending_entered": torch.zeros(1, 9).bfloat16()},
    ):
        save_state(path, replace(state, **wrong), base=BASE, initial=initial)
        with pytest.raises(StateError, match="does not fit this model"):
            load_state(path, **options)


def test_a_base_models_hash_is_of_names_values_and_settings():
    weight = torch.arange(6.0).view(2, 3)
    parameters = {"b": weight, "a": torch.ones(3).bfloat16(), "c": torch.tensor(1.5)}
    settings = {"lr": 1.0, "window": None, "tie": True}
    base = base_hash(parameters.items(), settings)
    assert len(base) == 64
    assert base == base_hash(reversed(parameters.items()), {"tie": True, "window": None, "lr": 1})
    assert base == base_hash({**parameters, "b": weight.T.contiguous().T}.items(), settings)
    moved = weight.clone()
    moved[1, 2] += 1e-6
    others = [
        base_hash({**parameters, "b": moved}.items(), settings),
        base_hash({**parameters, "b": weight.view(3, 2)}.items(), settings),
        base_hash({**parameters, "b": weight.view(torch.int32)}.items(), settings),
        base_hash({**parameters, "a": torch.ones(3).half()}.items(), settings),
        base_hash({**parameters, "d": torch.ones(1)}.items(), settings),
        base_hash(parameters.items(), {**settings, "lr": 0.5}),
        base_hash(parameters.items(), {**settings, "window": 0}),
    ]
    assert len({base, *others}) == len(others) + 1


def child(work):
    """Run `work` in a forked process; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def test_a_killed_save_leaves_the_old_state_or_the_new_one(tmp_path):
    path = tmp_path / "one.state"
    kinds = [a_state(scale=64, seed=0, moved=moved) for moved in (0.1, 0.2)]
    options = {"base": BASE, "initial": kinds[0][1]}
    save_state(path, kinds[0][0], **options)
    known = {hashlib.sha256(path.read_bytes()).hexdigest()}
    save_state(path, kinds[1][0], **options)
    known.add(hashlib.sha256(path.read_bytes()).hexdigest())

    def save_for_ever():
        while True:
            for state, _ in kinds:
                save_state(path, state, **options)

    draw, cut = random.Random(1), 0
    for _ in range(8):
        pid = child(save_for_ever)
        time.sleep(draw.uniform(0.02, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert hashlib.sha256(path.read_bytes()).hexdigest() in known
        load_state(path, dtype=torch.bfloat16, **options)
        for left in set(tmp_path.iterdir()) - {path}:
            cut += 1
            left.unlink()
    # Some were killed while the file beside was there: otherwise this has shown nothing.
    assert cut > 0


def test_a_save_that_fails_leaves_the_old_state_and_no_litter(tmp_path):
    path = tmp_path / "one.state"
    state, initial = a_state(scale=8)
    save_state(path, state, base=BASE, initial=initial)
    before = path.read_bytes()

    def save_into_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            save_state(path, a_state(scale=8, seed=1)[0], base=BASE, initial=initial)
        except OSError:
            os._exit(7)

    _, status = os.waitpid(child(save_into_a_full_disk), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_module_stands_alone():
    tree = ast.parse(Path(state_ttt_e2e.__file__).read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0] if node.level == 0 else ".")
    assert modules - set(sys.stdlib_module_names) == {"torch", "safetensors"}
