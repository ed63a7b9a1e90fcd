"""Loss of the same last tokens under growing context."""

import json

import numpy as np
import pytest
import torch
from tiny_learner import tiny_learner

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.context_length import (
    ContextCurves,
    check_contexts,
    context_report,
    doubling_contexts,
    losses_by_context,
)
from ttt_megatron.evaluation.context_plot import draw_by_context
from ttt_megatron.evaluation.statistics import BucketSums

BOS, LENGTH, LAST = 0, 40, 6
CONTEXTS = (8, 20, 40)


@pytest.fixture(scope="module")
def learner():
    return tiny_learner(window=5)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(1, 19, (5, LENGTH + 1), generator=generator)
    drawn[:, 0] = BOS
    return list(drawn)


@pytest.fixture(scope="module")
def measured(learner, documents):
    return {
        name: losses_by_context(
            learner, documents, CONTEXTS, LAST, inner_steps=steps, batch=2, bos_id=BOS
        )
        for name, steps in (("on", True), ("off", False))
    }


@pytest.mark.parametrize("steps", [True, False])
def test_sums_are_those_of_each_end_read_alone(learner, documents, measured, steps):
    sums = measured["on" if steps else "off"]
    assert sums.counts.tolist() == [[LAST] * 3] * 5
    for row, document in enumerate(documents):
        for column, context in enumerate(CONTEXTS):
            inputs = document[LENGTH - context : LENGTH].clone()
            inputs[0] = BOS
            targets = document[LENGTH - context + 1 :]
            with torch.no_grad():
                output = learner(
                    inputs[None], targets[None], torch.ones(1, context).bool(), inner_steps=steps
                )
            expected = float(output.token_nll[0, -LAST:].sum())
            assert sums.nll[row, column] == pytest.approx(expected, rel=1e-11)


def test_without_inner_steps_context_beyond_all_windows_changes_nothing(measured):
    # Two windows of 5 see 9 tokens back from the first of the last 6: 20 tokens hold them all.
    off, on = measured["off"].nll, measured["on"].nll
    assert np.allclose(off[:, 1], off[:, 2], rtol=1e-12)
    assert (np.abs(on[:, 1] - on[:, 2]) > 1e-6).all()


def test_differences_are_paired_by_document():
    generator = np.random.default_rng(0)
    counts = np.full((30, 2), 10)
    hard = generator.normal(40, 15, (30, 1))
    curves = ContextCurves(
        (64, 128),
        {
            "on": BucketSums(hard + generator.normal(0, 0.1, (30, 2)), counts),
            "reference": BucketSums(hard + 5 + generator.normal(0, 0.1, (30, 2)), counts),
        },
    )
    assert curves.reference == "reference"
    gap = curves.difference("on", 1)
    assert gap.mean == pytest.approx(-0.5, abs=0.02)
    assert gap.standard_error < 0.01 < 0.1 < curves.mean("on", 1).standard_error
    assert curves.gain("on", 1).mean == pytest.approx(0, abs=0.02)


def test_report_and_picture(measured, tmp_path):
    curves = ContextCurves(CONTEXTS, measured)
    assert curves.reference == "on"
    report = context_report(curves, LAST, list("abcde"), {"name": "x"})
    values = json.loads(report.to_json())
    assert values["contexts"] == list(CONTEXTS)
    assert values["curves"]["on"]["means"][2]["mean"] == pytest.approx(
        measured["on"].nll[:, 2].sum() / (5 * LAST)
    )
    assert report.finite_metrics()["context/off-minus-on/8"] == curves.difference("off", 0).mean
    assert "| 40 | " in report.markdown()
    path = tmp_path / "context.png"
    draw_by_context(curves, path, "test", window_size=8)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_contexts():
    assert doubling_contexts(1024, 128) == [256, 512, 1024]
    assert doubling_contexts(1500, 300) == [512, 1024, 1500]
    assert doubling_contexts(64, 32) == [64]
    with pytest.raises(UserError, match="context of 8 tokens cannot hold the --last 9"):
        check_contexts((64, 8), 9)
    with pytest.raises(UserError, match="--last 0"):
        check_contexts((64,), 0)
