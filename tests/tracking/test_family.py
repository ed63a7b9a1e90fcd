"""Stages of one training find one another by tags, whoever is uploaded first."""

import itertools

import pytest

from ttt_megatron.tracking import journal
from ttt_megatron.tracking.family import PARENT


def _by_name(run):
    return {found.data.tags["mlflow.runName"]: found for found in run.runs()}


def _end(status="FINISHED"):
    return {"kind": journal.STATUS, "status": status, "time": 9}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_stages_have_one_parent_named_after_the_first(make_run, order):
    first = make_run("stage-1")
    second = make_run("stage-2", base=first)
    third = make_run("stage-3", base=second)
    for number in order:
        (first, second, third)[number].upload()
    runs = first.runs()
    assert len(runs) == 4
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    assert parent.data.tags["mlflow.runName"] == "stage-1"
    assert {r.data.tags[PARENT] for r in runs if r is not parent} == {parent.info.run_id}


def test_a_run_alone_has_no_parent(make_run):
    run = make_run("alone")
    run.upload()
    (found,) = run.runs()
    assert PARENT not in found.data.tags


def test_the_parent_runs_while_a_stage_does(make_run):
    first = make_run("stage-1")
    second = make_run("stage-2", base=first)
    first.append(_end("RUNNING"), _end())
    first.upload()
    second.append(_end("RUNNING"))
    second.upload()

    def status():
        return next(r.info.status for r in first.runs() if PARENT not in r.data.tags)

    assert status() == "RUNNING"
    second.append(_end())
    second.upload()
    assert status() == "FINISHED"


def test_a_stage_after_a_sweeps_point_is_shown_below_it(make_run):
    sweep = make_run("sweep").upload()
    point = make_run("point", parent=sweep)
    later = make_run("later", base=point)
    point.upload()
    later.upload()
    runs = _by_name(point)
    assert set(runs) == {"sweep", "point", "later"}
    assert runs["point"].data.tags[PARENT] == sweep
    assert runs["later"].data.tags[PARENT] == runs["point"].info.run_id
