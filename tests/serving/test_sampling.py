"""What each sampling setting leaves in, and that a seed decides."""

import pytest
import torch

from ttt_megatron.errors import UserError
from ttt_megatron.serving.sampling import Sampler, SamplingSettings

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 5.0, 1.0]], dtype=torch.float64)


def probabilities(**settings):
    return Sampler(SamplingSettings(**settings)).probabilities(LOGITS)


def test_plain_sampling_is_the_softmax():
    torch.testing.assert_close(probabilities(), LOGITS.softmax(-1))
    torch.testing.assert_close(probabilities(temperature=0.5), (2 * LOGITS).softmax(-1))


def test_top_k_keeps_the_likeliest():
    kept = probabilities(top_k=2)
    assert (kept > 0).tolist() == [[False, True, True, False], [False, False, True, True]]
    torch.testing.assert_close(kept[0, 1:3], LOGITS[0, 1:3].softmax(-1))
    torch.testing.assert_close(probabilities(top_k=9), LOGITS.softmax(-1))


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # Row 0 has 0.657, 0.242, 0.089, 0.012 and row 1 has 0.969, 0.018, 0.007, 0.007, sorted.
    assert (probabilities(top_p=0.6) > 0).sum(-1).tolist() == [1, 1]
    assert (probabilities(top_p=0.7) > 0).sum(-1).tolist() == [2, 1]
    assert (probabilities(top_p=0.98) > 0).sum(-1).tolist() == [3, 2]
    torch.testing.assert_close(probabilities(top_p=0.7).sum(-1), torch.ones(2).double())


def test_greedy_takes_the_likeliest_and_leaves_out_ids_beyond_the_vocabulary():
    greedy = SamplingSettings(temperature=0)
    assert Sampler(greedy)(LOGITS).tolist() == [[1], [2]]
    assert Sampler(greedy, vocab_size=2)(LOGITS).tolist() == [[1], [0]]
    drawn = Sampler(SamplingSettings(), vocab_size=2)
    assert max(int(drawn(LOGITS).max()) for _ in range(50)) == 1


def test_the_repetition_penalty_moves_seen_tokens_down_whatever_their_sign():
    sampler = Sampler(SamplingSettings(temperature=0, repetition_penalty=2.0))
    logits = torch.tensor([[-1.0, -1.5, -4.0]])
    sampler.observe(torch.tensor([[0, 0]]), 3)
    assert sampler(logits).tolist() == [[1]]
    assert sampler(logits).tolist() == [[0]]
    assert sampler(torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [[2]]
    assert sampler(torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [[0]]


def test_a_seed_decides_and_frequencies_follow_the_probabilities():
    def draw(seed):
        sampler = Sampler(SamplingSettings(top_k=3), seed=seed)
        return torch.cat([sampler(LOGITS) for _ in range(2000)], dim=1)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    share = torch.bincount(draw(5)[0], minlength=4) / 2000
    torch.testing.assert_close(share.double(), probabilities(top_k=3)[0], atol=0.04, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        SamplingSettings(**settings)
