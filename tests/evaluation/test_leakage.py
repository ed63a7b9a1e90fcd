"""The checks for leakage pass for the model and fail for ones that leak."""

import json

import numpy as np
import pytest
import torch

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.evaluation.leakage import (
    Reading,
    check_causality,
    check_content,
    check_isolation,
    probe_positions,
)
from ttt_megatron.evaluation.leakage_plot import draw_leakage
from ttt_megatron.evaluation.leakage_report import LeakageResults, leakage_report
from ttt_megatron.meta.learner import Learner

BOS, LENGTH, CHUNK, WINDOW = 0, 48, 4, 6
MODEL = ModelConfig(
    vocab_size=23,
    num_layers=2,
    num_suffix_layers=1,
    hidden_size=16,
    num_heads=2,
    ffn_hidden_size=24,
    window_size=WINDOW,
    init_std=0.25,
)


class LooksAhead(Learner):
    """Reads every token one position early."""

    def forward(self, tokens, targets, mask, *args, **options):
        ahead = torch.cat((tokens[:, 1:], tokens[:, -1:]), dim=1)
        return super().forward(ahead, targets, mask, *args, **options)


class StepsFirst(Learner):
    """Tells every chunk the sum of its own targets, as an inner step before its loss would."""

    def forward(self, tokens, targets, mask, *args, **options):
        output = super().forward(tokens, targets, mask, *args, **options)
        told = targets.unflatten(1, (-1, CHUNK)).sum(-1, keepdim=True).expand(-1, -1, CHUNK)
        output.token_nll = output.token_nll + told.flatten(1)
        return output


class MixesRows(Learner):
    """Adds to every row's losses what the other rows of the batch hold."""

    def forward(self, tokens, targets, mask, *args, **options):
        output = super().forward(tokens, targets, mask, *args, **options)
        output.token_nll = output.token_nll + tokens.double().mean(dim=0) * (len(tokens) > 1)
        return output


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(1, 23, (6, LENGTH + 1), generator=generator)
    drawn[:, 0] = BOS
    return list(drawn)


def reading(kind=Learner, inner_steps=True):
    learner = kind(MODEL, InnerConfig(chunk_size=CHUNK), dtype=torch.float64).eval()
    return Reading(learner=learner, inner_steps=inner_steps, bos_id=BOS, batch=3)


@pytest.mark.parametrize("inner_steps", [True, False])
def test_nothing_before_a_changed_token_changes(documents, inner_steps):
    positions = probe_positions(LENGTH, CHUNK)
    assert positions == [12, 23, 24, 25, 46]
    for check in check_causality(reading(inner_steps=inner_steps), documents, positions):
        assert check.before <= 1e-12
        assert check.holds
        assert check.after.mean > 1e-4


def test_a_model_that_looks_ahead_is_found_out(documents):
    checks = check_causality(reading(LooksAhead), documents, probe_positions(LENGTH, CHUNK))
    assert not any(check.holds for check in checks)
    assert all(check.before > 1e-4 for check in checks)


def test_a_model_that_learns_from_a_chunk_before_predicting_it_is_found_out(documents):
    # Targets 8 to 11 are tokens 9 to 12: the chunk of those is told of a change within it.
    inside, first = check_causality(reading(StepsFirst), documents, (11, 9))
    assert not inside.holds
    assert first.holds


@pytest.mark.parametrize("inner_steps", [True, False])
def test_documents_of_a_batch_leave_one_another_alone(documents, inner_steps):
    found = check_isolation(reading(inner_steps=inner_steps), documents, 20)
    assert found.beside <= 1e-12
    assert found.behind.documents == 6
    assert found.behind.tokens == 120


def test_rows_that_mix_are_found_out(documents):
    assert check_isolation(reading(MixesRows), documents, 20).beside > 0.1


def test_behind_another_document_is_the_loss_in_one_row(documents):
    right = reading()
    found = check_isolation(right, documents, 20)
    row = torch.cat((documents[1][:21], documents[0][:21]))
    behind = right.losses([row])[0][-20:]
    alone = right.losses([documents[0][:21]])[0]
    assert abs(behind - alone).max() > 1e-3
    rows = [torch.cat((a[:21], b[:21])) for a, b in zip(documents[1:], documents, strict=False)]
    rows.append(torch.cat((documents[0][:21], documents[5][:21])))
    gaps = [
        right.losses([both])[0][-20:] - right.losses([one[:21]])[0]
        for both, one in zip(rows, documents, strict=True)
    ]
    assert found.behind.mean == pytest.approx(np.mean(gaps))


def test_content_beyond_all_windows_counts_only_with_inner_steps(documents):
    options = {"last": 6, "kept": 2 * WINDOW, "chunk_size": CHUNK}
    off = check_content(reading(inner_steps=False), documents, **options)
    on = check_content(reading(), documents, **options)
    assert off.kept == on.kept == 2 * WINDOW
    assert off.changed == on.changed == LENGTH - 6 - 2 * WINDOW
    assert abs(off.shuffled.mean) <= 1e-12
    assert abs(off.foreign.mean) <= 1e-12
    assert off.foreign.standard_error <= 1e-12
    assert on.foreign.standard_error > 1e-6
    assert on.shuffled.standard_error > 1e-6
    near = check_content(reading(inner_steps=False), documents, last=6, kept=0, chunk_size=CHUNK)
    assert near.foreign.standard_error > 1e-6
    last = np.concatenate([x[-6:] for x in reading().losses(documents)])
    assert on.right.mean == pytest.approx(last.mean())


def test_two_chunks_are_never_left_in_order(documents):
    on = check_content(
        reading(), documents, last=6, kept=LENGTH - 6 - 2 * CHUNK, chunk_size=CHUNK, seed=0
    )
    assert on.changed == 2 * CHUNK
    # All documents' halves were swapped: with one in order its difference would be zero.
    assert on.shuffled.standard_error > 0


def test_report_and_picture(documents, tmp_path):
    results = {
        name: LeakageResults(
            causality=check_causality(read, documents, (12, 24)),
            isolation=check_isolation(read, documents, 20),
            content=[check_content(read, documents, last=6, kept=0, chunk_size=CHUNK)],
        )
        for name, read in (("on", reading()), ("ahead", reading(LooksAhead)))
    }
    report = leakage_report(results, 6, list("abcdef"), {"name": "x"})
    values = json.loads(report.to_json())
    assert values["ways"]["on"]["holds"] is True
    assert values["ways"]["ahead"]["holds"] is False
    text = report.markdown()
    assert text.count("no leak") == text.count("LEAKS") == 2
    assert report.finite_metrics()["leakage/on/largest_change_before"] <= 1e-12
    path = tmp_path / "leakage.png"
    draw_leakage(results, path, "test")
    assert path.read_bytes().startswith(b"\x89PNG")
