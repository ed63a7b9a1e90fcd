"""Scores of a model that copies whatever its window shows, and nothing else."""

import json
import random
from dataclasses import replace

import pytest
from induction_head import induction_learner

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.data.tokenizer import ByteTokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.attention_reach import AttentionReach, attention_reach
from ttt_megatron.evaluation.needle import (
    NeedleCell,
    NeedleSettings,
    mean_score,
    measure_needles,
    score_by_reach,
)
from ttt_megatron.evaluation.needle_plot import draw_needles
from ttt_megatron.evaluation.needle_prompt import NEAR, REMOVED, PromptBuilder
from ttt_megatron.evaluation.needle_report import NeedleResults, needle_report
from ttt_megatron.evaluation.needle_scores import Answerer
from ttt_megatron.evaluation.needle_text import KINDS

WINDOW = 240
LENGTH = 480
REACH = AttentionReach(WINDOW, 2 * WINDOW - 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("needles")
    texts = root / "text"
    texts.mkdir()
    generator = random.Random(2)
    words = ("night", "was", "long", "cold", "we", "sailed", "past", "island", "black", "rock")
    for number in range(6):
        sentences = (" ".join(generator.choices(words, k=9)) + "." for _ in range(40))
        (texts / f"{number}.txt").write_text(" ".join(sentences))
    options = PrepareOptions(
        inputs=(str(texts),), output=str(root / "data"), validation=0.5, workers=1
    )
    prepare(options)
    return open_dataset(root / "data", "validation")


@pytest.fixture(scope="module")
def builder(dataset):
    return PromptBuilder(ByteTokenizer(), dataset, answers=4)


@pytest.fixture(scope="module")
def answerer():
    learner = induction_learner(WINDOW, chunk_size=128)
    return Answerer(learner=learner, tokenizer=ByteTokenizer(), inner_steps=True)


SETTINGS = {
    "exact": NeedleSettings(
        kinds=(1, 3), lengths=(LENGTH,), depths=(0.0, 0.9), samples=2, answer_tokens=40
    ),
    "choice": NeedleSettings(
        kinds=(3,), lengths=(LENGTH,), depths=(0.0, 0.9), samples=8, score="choice", answers=4
    ),
}


@pytest.fixture(scope="module", params=["exact", "choice"])
def measured(request, answerer, builder):
    settings = SETTINGS[request.param]
    seen = []
    cells = measure_needles(
        answerer, builder, settings, batch=8, on_progress=lambda *done: seen.append(done)
    )
    assert sum(prompts for prompts, _ in seen) == settings.prompts
    return settings, NeedleResults(cells=cells, reach=REACH)


def test_what_the_window_shows_is_found_and_nothing_else(measured):
    settings, results = measured
    chance = 0.0 if settings.score == "exact" else 1 / settings.answers
    for kind in settings.kinds:
        assert results.find(kind, LENGTH, NEAR).mean.mean == 1
        assert results.find(kind, LENGTH, 0.9).mean.mean == 1
        assert results.find(kind, LENGTH, 0.9).inside(REACH) == 1
        assert results.find(kind, LENGTH, 0.0).inside(REACH) == 0
    places = [(kind, place) for kind in settings.kinds for place in (0.0, REMOVED)]
    scores = [x for kind, place in places for x in results.find(kind, LENGTH, place).scores]
    # Where nothing tells of the value, one is as likely as another: four standard errors.
    room = 4 * (chance * (1 - chance) / len(scores)) ** 0.5
    assert abs(sum(scores) / len(scores) - chance) <= room


def test_inside_and_outside_are_counted_apart(measured):
    settings, results = measured
    for kind in settings.kinds:
        found = score_by_reach(results.of(kind), REACH)
        assert found.share_inside == 0.5
        assert found.inside.mean == 1
        assert found.inside.documents == found.outside.documents == settings.samples
        assert found.outside.mean < 0.5
        # About 390 tokens back, which a second window upon the first could reach.
        assert found.beyond.documents == 0
        short = score_by_reach(results.of(kind), AttentionReach(WINDOW, 300))
        assert short.beyond.documents == settings.samples
        everything = score_by_reach(results.of(kind), AttentionReach(None, None))
        assert everything.share_inside == 1
        assert everything.outside.documents == 0


def test_a_samples_depths_are_no_independent_draws():
    """Half of the samples are found at every depth: four depths tell no more than one."""
    scores = (1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    cells = [
        NeedleCell(kind=2, length=n, place=depth, scores=scores, distances=(n,) * len(scores))
        for n in (400, 800)
        for depth in (0.0, 0.25, 0.5, 0.75)
    ]
    found = score_by_reach(cells, REACH).outside
    assert (found.mean, found.documents, found.tokens) == (0.5, 12, 48)
    assert found.standard_error == pytest.approx(mean_score(scores * 2).standard_error)
    # The same number of prompts, each drawn for itself, tells more.
    assert found.standard_error > 1.9 * mean_score(scores * 8).standard_error
    # Of another kind, the samples are others.
    other = [replace(cell, kind=3, scores=(0.0,) * 6) for cell in cells]
    assert score_by_reach(cells + other, REACH).outside.documents == 24


def test_report_and_picture(measured, tmp_path):
    settings, results = measured
    report = needle_report({"on": results}, settings, {"checkpoint": "here"})
    values = json.loads(report.to_json())
    assert values["ways"]["on"]["window"] == WINDOW
    assert len(values["ways"]["on"]["cells"]) == 4 * len(settings.kinds)
    assert report.finite_metrics()["needle/on/S-NIAH-3/480/near"] == 1
    assert "1.00 ± 0.00*" in report.markdown()
    path = tmp_path / "needle.png"
    draw_needles({"on": results}, settings, path, "test")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [x.name for x in tmp_path.iterdir()] == ["needle.png"]


def test_a_longer_window_finds_the_far_needle(builder):
    answerer = Answerer(
        learner=induction_learner(None), tokenizer=ByteTokenizer(), inner_steps=False
    )
    settings = NeedleSettings(
        kinds=(2,), lengths=(LENGTH,), depths=(0.0, 1.0), samples=2, answer_tokens=10
    )
    cells = measure_needles(answerer, builder, settings, batch=2)
    assert {cell.place: cell.mean.mean for cell in cells} == {0.0: 1, 1.0: 1, NEAR: 1, REMOVED: 0}
    # The control `near` is the depth of 1, and so is not read again.
    assert settings.prompts == 3 * 2
    deepest = builder.build(KINDS[2], LENGTH, 1.0, 0)
    assert (builder.build(KINDS[2], LENGTH, NEAR, 0).tokens == deepest.tokens).all()


def test_batches_do_not_matter(answerer, builder):
    settings = NeedleSettings(
        kinds=(1,), lengths=(400,), depths=(0.5,), samples=2, score="choice", answers=4
    )
    one, many = (measure_needles(answerer, builder, settings, batch=b) for b in (1, 2))
    assert [cell.scores for cell in one] == [cell.scores for cell in many]


def test_settings_that_make_no_sense():
    for wrong, message in (
        ({"kinds": (4,)}, "--needles"),
        ({"depths": (1.5,)}, "--depths"),
        ({"lengths": (0,)}, "--lengths"),
        ({"samples": 0}, "--samples 0"),
        ({"answers": 1}, "--answers 1"),
        ({"answer_tokens": 0}, "--answer-tokens 0"),
    ):
        with pytest.raises(UserError, match=message):
            NeedleSettings(**{"lengths": (64,), **wrong})


def test_how_far_attention_reaches():
    small = {"num_layers": 4, "num_suffix_layers": 0, "window_size": 64}
    assert attention_reach(ModelConfig(**small)) == AttentionReach(64, 4 * 63 + 1)
    assert attention_reach(ModelConfig(**{**small, "window_size": None})).sees(10**9)
    assert attention_reach(ModelConfig(**small, mixers="attention,full")).window is None
    assert attention_reach(ModelConfig(**small, mixers="mamba2")) == AttentionReach(0, 0)
    half = attention_reach(ModelConfig(**small, mixers="mamba2,attention"))
    assert half == AttentionReach(64, 2 * 63 + 1)
    assert half.sees(64)
    assert not half.sees(65)
    assert half.could_pass_on(127)
    assert not half.could_pass_on(128)
