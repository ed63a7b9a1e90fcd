"""Every system of one tiny recipe is read, decoded with and trained; and what comes of it."""

import time
from dataclasses import replace

import pytest
import torch

from ttt_megatron.baselines.systems import SYSTEMS, as_system
from ttt_megatron.bench import models, system_memory
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.models import Size
from ttt_megatron.bench.options import SECTIONS, make_options
from ttt_megatron.bench.planned import planned_work
from ttt_megatron.bench.plot import draw
from ttt_megatron.bench.results import MEASURED, Report, Result
from ttt_megatron.bench.sections import groups_of
from ttt_megatron.bench.system_cases import DECODE, OVER_END, PREFILL, TRAIN, system_cases
from ttt_megatron.bench.system_figures import (
    COSTS,
    EXECUTED_FLOPS,
    MODEL_FLOPS,
    costs_by_model,
    mean_decoded,
)
from ttt_megatron.bench.system_groups import Place, system_groups
from ttt_megatron.bench.system_tables import system_tables
from ttt_megatron.config import from_dict
from ttt_megatron.reporting.systems import systems_section
from ttt_megatron.training.flops import model_flops_per_token

CPU = torch.device("cpu")
FLAT = Ceilings(flops={"fp32": 1e10}, peak={"fp32": 1e10}, bytes_per_second=1e9, source="a test")
CONFIG = {
    "model": {
        "vocab_size": 40,
        "num_layers": 6,
        "num_suffix_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_hidden_size": 96,
        "window_size": 8,
        "mamba2": {"head_dim": 8, "state_size": 8},
    },
    "inner": {"chunk_size": 8},
    "data": {"sequence_length": 16},
}
SIZE = Size(name="mini", config=from_dict(CONFIG))
SHORTER = Size(
    name="three", config=from_dict(CONFIG | {"model": CONFIG["model"] | {"num_layers": 3}})
)
LABELS = [system.label for name, system in SYSTEMS.items() if name != "naive"]


def run_once(group):
    """Results of a group whose cases run a single time each: the runner warms up and counts bytes
    besides, which its own tests look at."""
    for case in group.build():
        start = time.process_time()
        case.run(case.prepare())
        seconds = (time.process_time() - start) / case.count
        yield Result(
            section=group.section,
            operation=group.operation,
            shape=group.shape,
            precision=group.precision,
            name=case.name,
            way=case.way,
            status=MEASURED,
            seconds=[seconds],
            tokens=case.tokens,
            extra=case.extra,
        )


@pytest.fixture(scope="module")
def rows():
    """Results at two lengths, of all systems in turn."""
    groups = [system_groups(SIZE, n, "fp32", CPU, 1, FLAT, 1e12) for n in (8, 16)]
    assert [len(found) for found in groups] == [1, 1]
    return [result for (group,) in groups for result in run_once(group)]


def test_every_system_is_measured(rows):
    at_16 = {(r.way, r.name): r for r in rows if r.extra["context"] == 16}
    assert list(dict.fromkeys(way for way, _ in at_16)) == LABELS
    for label in LABELS:
        assert at_16[label, PREFILL].tokens == at_16[label, TRAIN].tokens == 16
        assert at_16[label, DECODE].median > 0
    updated = [way for way, name in at_16 if name == OVER_END]
    assert updated == [
        SYSTEMS[name].label for name in ("e2e", "e2e_all", "ttt_kvb", "ttt_kvb_simplified")
    ]


def test_a_decoded_token_has_its_share_of_the_update(rows):
    decode = replace(rows[0], name=DECODE, seconds=[1e-3], extra={"chunk": 10.0})
    assert mean_decoded(decode, replace(decode, seconds=[7e-3])) == pytest.approx(1.5e-3)
    assert mean_decoded(decode, replace(decode, seconds=[1e-3])) == 1e-3
    assert mean_decoded(decode, None) == 1e-3
    assert mean_decoded(None, decode) is None


def test_flops_are_executed_ones_where_the_planner_counts_the_mixers(rows):
    ((_, costs),) = costs_by_model(rows).items()
    assert set(costs[MODEL_FLOPS]) == set(LABELS)
    known = [SYSTEMS[name].label for name in ("e2e", "e2e_all", "off", "swa", "full")]
    assert list(costs[EXECUTED_FLOPS]) == known
    swa, full = (costs[EXECUTED_FLOPS][SYSTEMS[name].label] for name in ("swa", "full"))
    # The window holds 8 tokens, so that it hides nothing of the shorter sequence.
    assert swa[8] == full[8]
    assert swa[16] < full[16]


def test_full_attention_is_planned_as_such():
    config = as_system(SIZE.at(64, "fp32"), "full")
    work = planned_work(config)
    assert work is not None
    # Attention's backward pass forms the scores again, which a model's FLOPs leave out.
    forms_again = 2 * 16 * (64 + 1) / 2 * 6
    assert work.flops / 64 == pytest.approx(model_flops_per_token(config.model, 64) + forms_again)


def test_tables_and_pictures_have_every_system(rows, tmp_path):
    costs, crossings = system_tables(rows)
    assert [row[3] for row in costs.rows] == LABELS * 2
    assert [row[1] for row in crossings.rows] == LABELS[1:]
    row = dict(zip(crossings.columns, crossings.rows[3], strict=True))
    assert row["against"] == SYSTEMS["full"].label
    assert row[EXECUTED_FLOPS].startswith("not up to 16")
    report = Report(about={"device": "a test", "date": "2026-01-01"}, results=rows)
    assert draw(report, tmp_path / "bench.png")
    section = systems_section({"mini": report})
    assert section is not None
    assert len(section.panels) == len(COSTS)
    assert "| mini | fp32 | 16 | Gated DeltaNet |" in section.markdown()
    assert systems_section({"none": replace(report, results=[])}) is None


def test_what_is_no_system_of_its_own_is_said():
    found, missing = Place(size=SHORTER, length=16, precision="fp32", device=CPU).systems()
    (hybrid,) = [one for one in missing if one.way == SYSTEMS["hybrid"].label]
    assert (hybrid.status, hybrid.reason) == ("skipped", "with 3 blocks it is SWA")
    assert SYSTEMS["naive"].label not in found


def test_a_step_that_does_not_fit_is_missing_and_the_rest_is_there(monkeypatch):
    config = SIZE.at(64, "fp32")
    systems = {name: as_system(config, name) for name in ("swa", "mamba2")}
    resident = sum(system_memory.session_bytes(c) for c in systems.values())
    needed = system_memory.step_bytes(systems["swa"], CPU)
    assert system_memory.step_bytes(systems["mamba2"], CPU) is None
    assert system_memory.weight_bytes(systems["swa"]) == models.weight_bytes(systems["swa"], CPU)
    monkeypatch.setattr(
        "ttt_megatron.bench.system_cases.available_bytes", lambda _: resident + needed / 100
    )
    cases = list(system_cases(systems, 64, CPU, resident))
    steps = {one.way: one for one in cases if one.name == TRAIN}
    for step in steps.values():
        assert step.status == "out of memory"
        assert "GiB are free (estimated)" in step.reason
        assert step.extra["model_flops"] > 0
    assert {one.way for one in cases if one.name == PREFILL} == set(systems)


def test_systems_that_do_not_fit_together_are_measured_one_by_one():
    groups = system_groups(SIZE, 16, "fp32", CPU, 1, FLAT, 0.0)
    assert len(groups) == len(LABELS)
    assert groups[0].shape == "mini, TTT-E2E, context 16"


def test_systems_are_measured_on_request_alone():
    assert make_options(device="cpu", small=True).sections == SECTIONS
    options = make_options(device="cpu", small=True, only=["systems"], lengths=[256])
    (group,) = groups_of(options, FLAT)
    assert group.shape == "tiny-6, context 256"
