"""The order of passes with two parts a rank: complete, in turn, and free of circular waits.

And no gradient that was put off is lost.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import pairwise

import pytest
import torch.distributed as dist
from context_case import SPLITS, Case

from ttt_kernels import WeightGradients, putting_off
from ttt_megatron.parallel.context import context_parts, own_tokens
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_tasks import SHARES, PartPass, PartPasses, zigzag_order

KINDS = ("prefix_forward", "suffix_forward", "suffix_backward", "prefix_backward")
WEIGHTS = {"none": (), "suffix": ("suffix_weights",), "both": ("suffix_weights", "prefix_weights")}


def waits_for(one: PartPass, num_parts: int) -> list[PartPass]:
    """Passes, on whatever rank, that must at least have begun."""

    def of(kind: str, part: int) -> list[PartPass]:
        return [PartPass(kind, one.micro_batch, part)] if 0 <= part < num_parts else []

    part = one.part
    return {
        "prefix_forward": of("prefix_forward", part - 1),
        "suffix_forward": of("prefix_forward", part) + of("suffix_forward", part - 1),
        "suffix_backward": of("suffix_forward", part) + of("suffix_backward", part + 1),
        "prefix_backward": of("suffix_backward", part) + of("prefix_backward", part + 1),
        "suffix_weights": of("suffix_backward", part),
        "prefix_weights": of("prefix_backward", part),
    }[one.kind]


@pytest.mark.parametrize(("split", "debts"), [("none", 1), ("suffix", 1), ("both", 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 20])
def test_order(size, micro_batches, split, debts):
    kinds = KINDS + WEIGHTS[split]
    orders = [zigzag_order(micro_batches, size, rank, SPLITS[split], debts) for rank in range(size)]
    graph: dict[PartPass, list[PartPass]] = {}
    for rank, order in enumerate(orders):
        parts = (rank, 2 * size - 1 - rank)
        assert Counter(order) == Counter(
            PartPass(kind, index, part)
            for kind in kinds
            for index in range(micro_batches)
            for part in parts
        )
        for kind in KINDS:
            for part in parts:
                turns = [p.micro_batch for p in order if (p.kind, p.part) == (kind, part)]
                assert turns == list(range(micro_batches))
        live = owed = 0
        splits = [name.replace("weights", "backward") for name in WEIGHTS[split]]
        for one in order:
            live += (one.kind == "prefix_forward") - (one.kind == "prefix_backward")
            owed += (one.kind in splits) - (one.kind in WEIGHTS[split])
            assert live <= 4 * size
            assert owed <= debts
        graph |= {one: waits_for(one, 2 * size) for one in order}
        for before, one in pairwise(order):
            graph[one].append(before)
    number = 2 * len(kinds) * size * micro_batches
    assert len(list(TopologicalSorter(graph).static_order())) == number


def test_recomputation_is_no_pass():
    with pytest.raises(ValueError, match="recomputation"):
        zigzag_order(2, 2, 0, replace(SHARES, recompute=0.1))


@pytest.fixture(scope="module")
def links() -> Iterator[ContextLinks]:
    """One rank's, which holds both parts of every sequence."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield context_links(dist.group.WORLD, zigzag=True)
    dist.destroy_process_group()


def passes_of(case: Case, links: ContextLinks) -> PartPasses[None]:
    parts = context_parts(links, case.length // 2, case.model_config.window_size)
    batches = case.data()
    return PartPasses(
        learner=case.build(),
        parts=dict(enumerate(parts)),
        batch=lambda index, part: tuple(own_tokens(x, links)[part] for x in batches[index]),
        inner_lr=None,
        scale=1.0,
        measure=lambda output, part: None,
    )


def test_a_forgotten_gradient_is_an_error(links):
    order = zigzag_order(1, 1, 0, SPLITS["both"])
    for kind, half in (("suffix_weights", "suffix"), ("prefix_weights", "prefix")):
        short = [one for one in order if (one.kind, one.part) != (kind, 1)]
        with pytest.raises(RuntimeError, match=rf"never formed.*\('{half}', 0, 1\)"):
            passes_of(Case(), links).run(short, links)


def test_weights_before_their_backward_pass_are_an_error(links):
    order = zigzag_order(1, 1, 0)
    early = next(one for one in order if one.kind == "suffix_weights")
    backward = PartPass("suffix_backward", early.micro_batch, early.part)
    order.remove(early)
    order.insert(order.index(backward), early)
    with pytest.raises(RuntimeError, match="after those put off were formed"):
        passes_of(Case(), links).run(order, links)


@pytest.mark.parametrize(("policy", "kv_heads"), [("recompute", 4), ("save_all", 2)])
def test_what_is_put_off_takes_the_memory_the_formula_says(policy, kv_heads):
    """docs/context-parallelism.md, "Memory"; elements a token."""
    case = Case(
        model={"num_kv_heads": kv_heads, "num_suffix_layers": 3},
        inner={"memory_policy": policy},
    )
    model, learner = case.model_config, case.build()
    [(tokens, targets, mask)] = case.data()
    prefix, suffix = WeightGradients(), WeightGradients()
    with putting_off(prefix):
        entered = learner.run_prefix(tokens)
    with putting_off(suffix):
        loss = learner.run_suffix(entered, targets, mask).loss
    loss.backward()
    width, k = model.hidden_size, kv_heads * model.hidden_size // model.num_heads
    attention, mlp = 4 * width + 2 * k, 2 * width + 3 * model.ffn_hidden_size
    later, blocks = model.num_suffix_layers - 1, model.num_layers - model.num_suffix_layers
    head = width + model.vocab_size
    # The last chunk takes no inner step: its products are of values alone.
    chunk = case.build().inner.chunk_size
    pairs = 2 * case.length - chunk
    elements = pairs * (later * attention + (later + 1) * mlp + head)
    assert suffix.nbytes == elements * len(tokens) * 8
    elements = case.length * (blocks * (attention + mlp) + attention)
    assert prefix.nbytes == elements * len(tokens) * 8
