"""What ranks are told that do not run the same; in threads, over a real store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_run import small_run

from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.parallel.meeting import Meeting
from ttt_megatron.training.agreement import own_facts, require_agreement

Facts = dict[str, Any]


def _told(
    facts: list[Facts | None], seconds: float = 20.0, kinds: list[type[UserError]] | None = None
) -> list[str]:
    """What each rank is told; a rank without facts never comes. `kinds`: the errors' go there."""
    store, timeout = dist.HashStore(), timedelta(seconds=seconds)
    store.set_timeout(timeout)

    def one(rank: int) -> str:
        own = facts[rank]
        if own is None:
            return ""
        meeting = Meeting(store=store, rank=rank, world_size=len(facts), timeout=timeout)
        try:
            require_agreement(meeting, own)
        except UserError as error:
            if kinds is not None:
                kinds.append(type(error))
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, range(len(facts))))


def test_every_rank_is_told_who_differs_in_what(data: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")
    facts = own_facts(small_run(data, tmp_path), device)
    assert _told([facts] * 3) == [""] * 3
    other = own_facts(small_run(data, tmp_path, optimizer__lr=0.5), device)
    other["source file ttt_megatron/training/run.py"] = "0123"
    del other["torch version"]
    told = _told([facts, facts, other])
    assert len(set(told)) == 1
    assert "rank 2 has optimizer.lr = 0.5 where rank 0 has 0.01" in told[0]
    assert "source file ttt_megatron/training/run.py = 0123 where rank 0 has " in told[0]
    assert f"torch version = nothing where rank 0 has {torch.__version__}" in told[0]
    assert "rank 1" not in told[0]


def test_data_that_cannot_be_read_is_a_difference(data: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")
    missing = own_facts(small_run(tmp_path / "nowhere", tmp_path), device)
    (told, _) = _told([own_facts(small_run(data, tmp_path), device), missing])
    assert "data fingerprint = none (" in told
    assert "nowhere" in told


@pytest.mark.parametrize(
    ("others", "passes"),
    [
        ([{"kind of device": "cpu", "AdamW": "torch"}], True),
        ([{"data fingerprint": "none (no such folder)"}], True),
        ([{"optimizer.lr": 0.5}], False),
        ([{"kind of device": "cpu"}, {"optimizer.lr": 0.5}], False),
    ],
)
@pytest.mark.parametrize("first_differs", [True, False])
def test_what_a_broken_machine_makes_differ_may_pass(
    others: list[Facts], passes: bool, first_differs: bool
) -> None:
    sound = {
        **{"kind of device": "cuda", "AdamW": "apex", "data fingerprint": "ab"},
        "optimizer.lr": 0.1,
    }
    facts = [sound, *({**sound, **other} for other in others)]
    kinds: list[type[UserError]] = []
    told = _told(facts[::-1] if first_differs else facts, kinds=kinds)
    assert set(kinds) == {PassingError if passes else UserError}
    assert told[0].startswith("the ranks disagree: rank 1 has ")
    assert "lasting" not in told[0]


def test_a_rank_that_does_not_come_is_named() -> None:
    told = _told([{"a": 1}, None, {"a": 1}], seconds=0.5)
    assert told[0] == told[2]
    assert told[0].startswith("rank 1 told nothing within 0.5 seconds (parallel.timeout_minutes)")
