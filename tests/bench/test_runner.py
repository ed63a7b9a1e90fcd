"""What becomes of groups that fail, do not fit, or come too late."""

import pytest
import torch

from ttt_megatron.bench.case import Case, Group, Missing
from ttt_megatron.bench.ceilings import Ceilings, named_gpu
from ttt_megatron.bench.clock import CpuClock
from ttt_megatron.bench.runner import Runner

CPU = torch.device("cpu")
CEILINGS = Ceilings(flops={"fp32": 1e9}, peak={"fp32": 1e9}, bytes_per_second=1e9, source="a test")


def group(*cases, **settings):
    about = {"section": "kernels", "operation": "o", "shape": "s", "precision": "fp32", "rounds": 3}
    return Group(**{"build": lambda: list(cases), **about, **settings})


def refuse(_):
    raise RuntimeError("cannot\nbe done")


def run_out(_):
    raise torch.OutOfMemoryError("no room")


def runner(**settings):
    return Runner(CPU, CEILINGS, log=lambda _: None, **settings)


def test_failures_are_kept_apart_and_the_rest_is_measured():
    made = torch.ones(300, 300)
    cases = [
        Case(name="a", run=lambda _: made @ made),
        Case(name="b", run=refuse),
        Case(name="c", way="other", run=refuse, is_baseline=True),
        Case(name="d", run=run_out),
        Missing(name="e", reason="nobody wrote it"),
    ]
    found = runner().measure(group(*cases))
    assert [r.status for r in found] == [
        "measured",
        "failed",
        "not possible",
        "out of memory",
        "skipped",
    ]
    assert found[1].reason == "RuntimeError: cannot"
    assert len(found[0].seconds) == 3
    assert found[0].peak_bytes == made.nbytes


def test_groups_that_do_not_fit_are_not_built():
    def build():
        raise AssertionError("built")

    [found] = runner().measure(group(memory_bytes=1e18, build=build))
    assert found.status == "out of memory"
    assert "GiB are free" in found.reason


def test_groups_that_cannot_be_built_are_told_of():
    def build():
        raise ValueError("no such shape")

    [found] = runner().measure(group(build=build))
    assert (found.status, found.reason) == ("failed", "ValueError: no such shape")


def test_groups_after_the_budget_are_skipped():
    results = []
    late = runner(budget=1e-9)
    late.run([group(Case(name="a", run=refuse)) for _ in range(2)], results.extend)
    assert [r.status for r in results] == ["skipped", "skipped"]


def test_cases_after_the_budget_are_skipped():
    one = runner(budget=60)

    def use_up(_):
        one._budget = 0.0

    found = one.measure(group(Case(name="a", run=use_up), Case(name="b", run=refuse)))
    assert [r.status for r in found] == ["measured", "skipped"]
    assert len(found[0].seconds) == 3


def test_prepared_states_are_used_once():
    """What cannot be run twice, like a backward pass, is prepared for every run."""
    fresh = []

    def prepare():
        fresh.append(True)
        return len(fresh)

    used = []
    case = Case(name="a", run=used.append, prepare=prepare)
    clock = CpuClock()
    timed = clock.ready(case)
    for _ in range(4):
        clock.sample(timed)
    assert len(used) == len(set(used)) == len(fresh)
    assert len(timed.seconds) == 4


def test_seconds_are_those_of_one_of_a_runs_things():
    def work(_):
        for _ in range(4):
            torch.ones(300, 300) @ torch.ones(300, 300)

    once, shared = runner().measure(
        group(Case(name="a", run=work), Case(name="b", run=work, count=4), rounds=9)
    )
    assert shared.median == pytest.approx(once.median / 4, rel=0.6)
    assert shared.median < once.median / 2


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpus_are_known_by_the_drivers_name(driver, name):
    found = named_gpu(driver)
    assert (found and found.name) == name
