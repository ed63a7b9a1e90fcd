"""What context parallelism sends, and what a rank holds: the formulas of the documentation."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from context_case import Case
from ranks import launch

from ttt_megatron.parallel.context import context_parts, own_tokens
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_schedule import one_forward_one_backward
from ttt_megatron.parallel.context_tasks import PartPasses, zigzag_order

MICRO_BATCHES = 3
CASES = {
    "window within a part": Case(micro_batches=MICRO_BATCHES, length=64),
    "window over parts": Case(
        model={"window_size": 41, "num_kv_heads": 2}, micro_batches=MICRO_BATCHES, length=64
    ),
    "full attention": Case(
        model={"window_size": None, "num_suffix_layers": 3}, micro_batches=MICRO_BATCHES, length=64
    ),
    "plain": Case(inner={"mode": "off"}, micro_batches=MICRO_BATCHES, length=64),
}
# Float64 sequences of two a micro-batch.
ELEMENT, BATCH = 8, 2


@dataclass
class Costs:
    """Bytes sent in a step, and bytes held of a micro-batch between its two passes."""

    sent: dict[str, int] = field(default_factory=dict)
    prefix_output: int = 0
    history: int = 0
    keys_and_values: int = 0


def _measure(case: Case, links: ContextLinks | None) -> Costs:
    size = links.size if links else 1
    learner, costs = case.build(), Costs()
    [part] = context_parts(links, case.length // size, case.model_config.window_size)

    def forward(index: int) -> torch.Tensor:
        data = case.data()[index]
        own = data if links is None else tuple(own_tokens(x, links)[0] for x in data)
        loss = learner(*own, None, part).loss
        run = getattr(loss.grad_fn, "run", None)
        if run is not None:
            costs.prefix_output = run.prefix_output.nbytes
            costs.keys_and_values = run.state.kv.nbytes
            costs.history = sum(g.nbytes for chunk in run.history for g in chunk.gradient)
        return loss

    if links is None:
        forward(0)
        return costs
    ahead = links.size - 1 - links.rank
    one_forward_one_backward(MICRO_BATCHES, ahead, forward, lambda _, loss: loss.backward())
    links.settle()
    costs.sent = _sent(links)
    return costs


def _sent(links: ContextLinks) -> dict[str, int]:
    sent = {}
    for direction in ("forward", "backward"):
        for kind in ("halo", "state"):
            sent[f"{direction} {kind}"] = links.bytes_sent(direction, kind)
    return sent


def _sent_in_zigzag(case: Case, links: ContextLinks) -> dict[str, int]:
    """Bytes sent where every rank holds two parts."""
    parts = context_parts(links, case.length // links.num_parts, case.model_config.window_size)

    def batch(index: int, part: int) -> tuple[torch.Tensor, ...]:
        return tuple(own_tokens(x, links)[links.own_parts.index(part)] for x in case.data()[index])

    passes = PartPasses(
        learner=case.build(),
        parts=dict(zip(links.own_parts, parts, strict=True)),
        batch=batch,
        inner_lr=None,
        scale=1.0,
        measure=lambda output, part: None,
    )
    passes.run(zigzag_order(MICRO_BATCHES, links.size, links.rank), links)
    return _sent(links)


def _on_all_ranks() -> tuple[dict[tuple[int, str], list[Costs]], dict[str, list[dict[str, int]]]]:
    """Costs by number of parts and case, of every rank; two pairs of ranks hold two parts each.

    And bytes sent by four ranks that hold eight parts.
    """
    dist.init_process_group("gloo")
    try:
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
        found = {}
        for size, group in groups.items():
            for name, case in CASES.items():
                links = context_links(group)
                gathered: list[Costs] = [Costs()] * 4
                dist.all_gather_object(gathered, _measure(case, links))
                found[size, name] = gathered[:size]
                if size == 2:
                    assert gathered[2:] == gathered[:2]
        zigzag = {}
        for name, case in CASES.items():
            sent = _sent_in_zigzag(case, context_links(dist.group.WORLD, zigzag=True))
            zigzag[name] = [{}] * 4
            dist.all_gather_object(zigzag[name], sent)
        return found, zigzag
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def launched():
    return launch(_on_all_ranks, (), 4)


@pytest.fixture(scope="module")
def costs(launched):
    return launched[0]


def _shape(case: Case) -> tuple[int, int, int, int]:
    """Bytes of a token's keys and values, attention layers of the prefix and of the suffix, F."""
    config, meta = case.model_config, case.inner.get("mode") != "off"
    width = (config.num_kv_heads or config.num_heads) * config.hidden_size // config.num_heads
    suffix = config.num_suffix_layers if meta else 1
    fast = 3 * config.hidden_size * config.ffn_hidden_size * config.num_suffix_layers
    layers = config.num_layers + 1 - suffix if meta else config.num_layers
    return 2 * width * ELEMENT, layers, suffix - 1, fast if meta else 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_sent(costs, size, name):
    case = CASES[name]
    entry, prefix_layers, later_layers, fast = _shape(case)
    window, part = case.model_config.window_size, case.length // size
    reach = case.length if window is None else window - 1
    sequences = BATCH * MICRO_BATCHES
    for rank, found in enumerate(costs[size, name]):
        before, after = rank * part, (size - 1 - rank) * part
        expected = {
            "forward halo": sequences * prefix_layers * entry * min(reach, after),
            "backward halo": sequences * prefix_layers * entry * min(reach, before),
            "forward state": 0,
            "backward state": 0,
        }
        if fast and rank < size - 1:
            later = later_layers * entry * min(reach, before + part)
            expected["forward state"] = sequences * (fast * ELEMENT + later)
        if fast and rank > 0:
            later = later_layers * entry * min(reach, before)
            expected["backward state"] = sequences * (fast * ELEMENT + later)
        assert found.sent == expected


@pytest.mark.parametrize("name", CASES)
def test_bytes_sent_in_zigzag(launched, name):
    """The same, part by part, but for what goes from one part of a rank to the other."""
    case = CASES[name]
    entry, prefix_layers, later_layers, fast = _shape(case)
    window, part = case.model_config.window_size, case.length // 8
    reach = case.length if window is None else window - 1
    sequences = BATCH * MICRO_BATCHES
    expected = [dict.fromkeys(launched[1][name][0], 0) for _ in range(4)]
    for later, earlier in ((i, j) for i in range(8) for j in range(i)):
        ranks = [min(p, 7 - p) for p in (earlier, later)]
        if ranks[0] == ranks[1]:
            continue
        seen = max(0, min(part, reach - (later - earlier - 1) * part))
        state = 0
        if fast and later == earlier + 1:
            state = fast * ELEMENT + later_layers * entry * min(reach, later * part)
        for rank, direction in zip(ranks, ("forward", "backward"), strict=True):
            expected[rank][f"{direction} halo"] += sequences * prefix_layers * entry * seen
            expected[rank][f"{direction} state"] += sequences * state
    assert launched[1][name] == expected


@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part(costs, size, name):
    case = CASES[name]
    entry, _, later_layers, fast = _shape(case)
    whole = _measure(case, None)
    window, part = case.model_config.window_size, case.length // size
    chunk = 4
    assert whole.history == BATCH * fast * ELEMENT * (case.length // chunk - 1)
    for rank, found in enumerate(costs[size, name]):
        before = rank * part if window is None else min(rank * part, window - 1)
        steps = part // chunk - (rank == size - 1)
        assert found.prefix_output * size == whole.prefix_output
        assert found.history == BATCH * fast * ELEMENT * steps
        assert found.keys_and_values == BATCH * later_layers * entry * (part + before)
