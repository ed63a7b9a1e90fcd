"""What attention's kernels visit, multiply, read and write, counted as they run."""

import pytest
import torch
from attention_cases import (
    Case,
    assert_near,
    draw,
    first_order,
    given,
    pair_of,
    reference_pair,
    use_small_tiles,
    wide,
)
from triton_runs import DEVICES, ON_CUDA

from ttt_kernels.swa_attention.op import swa_attention
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_kernels.swa_attention.work import GEMMS, tiles_by_keys, tiles_by_queries

triton_tiles = pytest.importorskip("ttt_kernels.swa_attention.triton_tiles")

# One query head of one sequence, so that a kernel's tiles are those of its grid. Queries reach
# back over one tile of cached keys and a bit, and the cache holds more.
CASE = Case(1, 37, 1, 1, 16, 20, 45)
TILE = triton_tiles.Tile(16, 16, 4, 1)


class Counted:
    """Calls of a function of a kernel, in all."""

    def __init__(self, function, counts, name):
        self.function, self.counts, self.name = function, counts, name

    def __call__(self, *arguments, **constants):
        self.counts[self.name] = self.counts.get(self.name, 0) + 1
        return self.function(*arguments, **constants)


def counting(monkeypatch, module, tile):
    """Counts of tiles, products and blocks read by the kernels of a module."""
    counts = {}
    for name in (tile, "product", "add_product", "load_block"):
        function = Counted(getattr(module, name), counts, name)
        monkeypatch.setattr(module, name, function)
    return counts


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("known", [False, True])
def test_tiles_inside_the_window_and_no_tangents_of_cached_keys(known, device, monkeypatch):
    from ttt_kernels.swa_attention import triton_pair_dkv as dkv
    from ttt_kernels.swa_attention import triton_pair_dq as dq
    from ttt_kernels.swa_attention import triton_pair_forward as forward

    torch.manual_seed(0)
    use_small_tiles(monkeypatch)
    kernels = {
        "pair_forward_saved" if known else "pair_forward": counting(monkeypatch, forward, "_tile"),
        "pair_dq_known" if known else "pair_dq": counting(monkeypatch, dq, "_tile"),
        "pair_dkv_known" if known else "pair_dkv": counting(monkeypatch, dkv, "_tile"),
    }
    pairs = draw(CASE, torch.float32, device, pairs=True)
    zeros = [None, *(torch.zeros_like(x) for x in pairs[:3])]
    first_order(pair_of("known" if known else "alone", zeros), pairs, 20, pairs[0].detach())
    by_queries = tiles_by_queries(CASE.length, CASE.window, CASE.past, TILE)
    by_keys = tiles_by_keys(CASE.length, CASE.window, CASE.past, TILE, TILE)
    for name, counts in kernels.items():
        tiles = by_keys if "dkv" in name else by_queries
        products = counts["product"] + counts["add_product"]
        assert counts["_tile"] == sum(tiles)
        assert products == sum(g * n for g, n in zip(GEMMS[name], tiles, strict=True))
        # Own keys come with their tangents; queries have theirs whatever key they meet.
        blocks = (4, 4) if "dkv" in name else (4, 2)
        assert counts["load_block"] == sum(g * n for g, n in zip(blocks, tiles, strict=True))


@pytest.mark.parametrize("device", DEVICES[:1])
def test_first_order_visits_tiles_inside_the_window(device, monkeypatch):
    from ttt_kernels.swa_attention import triton_backward, triton_forward

    use_small_tiles(monkeypatch)
    forward = counting(monkeypatch, triton_forward, "_tile")
    dq, dkv = {}, {}
    for name, counts in (("_dq_tile", dq), ("_dkv_tile", dkv)):
        function = Counted(getattr(triton_backward, name), counts, name)
        monkeypatch.setattr(triton_backward, name, function)
    tensors = draw(CASE, torch.float32, device)
    tensors[3:] = [x.detach() for x in tensors[3:]]
    q, k, v, *past = tensors
    out = swa_attention(q, k, v, CASE.window, *past)
    by_queries = tiles_by_queries(CASE.length, CASE.window, CASE.past, TILE)
    assert forward["_tile"] == sum(by_queries)
    torch.autograd.grad(out, [q, k, v], q.detach())
    assert dq["_dq_tile"] == sum(by_queries)
    own = tiles_by_keys(CASE.length, CASE.window, CASE.past, TILE, TILE).own
    assert dkv["_dkv_tile"] == own  # nobody asked for cached keys' gradients


CANARY = 12345.0


def inside_canaries(x_like, kept, dtype=None):
    """Room like x, in the middle of a buffer full of canaries."""
    dtype = dtype or x_like.dtype
    count = x_like.numel()
    buffer = torch.full((count + 2048,), CANARY, dtype=dtype, device=x_like.device)
    kept.append((buffer, count))
    return buffer[1024 : 1024 + count].view(x_like.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_nothing_is_written_out_of_bounds(dtype, device, monkeypatch):
    from ttt_kernels.swa_attention import triton_path

    torch.manual_seed(0)
    if device == "cpu":
        use_small_tiles(monkeypatch)
    kept = []

    def statistics_of(q):
        b, t, n, _ = q.shape
        return inside_canaries(q.new_empty(b, n, t), kept, torch.float32)

    monkeypatch.setattr(triton_path, "_new", lambda x: inside_canaries(x, kept))
    monkeypatch.setattr(triton_path, "statistics_of", statistics_of)
    case = Case(1, 18, 2, 1, 20, 9, 8) if device == "cpu" else Case(2, 1000, 4, 2, 80, 300, 299)
    tensors = draw(case, dtype, device)
    first_order(swa_attention, tensors, case.window, torch.randn_like(tensors[0]))
    pairs = draw(case, dtype, device, pairs=True)
    first_order(pair_of("alone", None), pairs, case.window, torch.randn_like(pairs[0]))
    # Output and log-sum-exp; five gradients and δ; the same of a pair, with μ and with γ.
    assert len(kept) == 2 + 6 + 3 + 7
    for buffer, count in kept:
        assert bool((buffer[:1024] == buffer[0]).all())
        assert bool((buffer[1024 + count :] == buffer[0]).all())
        inner = buffer[1024 : 1024 + count]
        assert float(buffer[0]) == float(torch.tensor(CANARY).to(buffer.dtype))
        assert not bool((inner == buffer[0]).any())  # all of it was written


SIZES = {
    "chunk": lambda head_dim: Case(1, 1024, 8, 4, head_dim, 8192, 8191),
    "short window": lambda head_dim: Case(2, 1000, 4, 4, head_dim, 300, 299),
    "sequence": lambda head_dim: Case(1, 3001, 4, 2, head_dim, 512, None),
}


@pytest.mark.parametrize("device", [ON_CUDA])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_training_against_float64(size, dtype, head_dim, device):
    torch.manual_seed(0)
    case = SIZES[size](head_dim)
    pairs = draw(case, dtype, device, pairs=True)
    cotangent = torch.randn_like(pairs[0])
    expected = first_order(reference_pair, wide(pairs), case.window, cotangent)
    for variant in ("alone", "saved", "known"):
        actual = first_order(pair_of(variant, expected), pairs, case.window, cotangent)
        assert_near(actual, expected, dtype)
    tensors = [x[0].detach().requires_grad_() for x in pairs[:3]] + pairs[3:]
    arguments = (case.window, cotangent[0])
    actual = first_order(swa_attention, tensors, *arguments)
    assert_near(actual, first_order(swa_attention_reference, wide(tensors), *arguments), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_wider_than_128(dtype, device):
    """In float32 these run as on CPU: a program's registers do not hold them."""
    torch.manual_seed(0)
    case = Case(1, 19, 1, 1, 160, 9, 8)
    pairs = draw(case, dtype, device, pairs=True)
    cotangent = torch.randn_like(pairs[0])
    expected = first_order(reference_pair, wide(pairs), case.window, cotangent)
    assert_near(first_order(pair_of("alone", None), pairs, case.window, cotangent), expected, dtype)


@pytest.mark.parametrize("device", [ON_CUDA])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_runs_agree_bit_for_bit(head_dim, device):
    torch.manual_seed(0)
    case = Case(1, 1024, 8, 4, head_dim, 2048, 2047)
    pairs = draw(case, torch.bfloat16, device, pairs=True)
    cotangent = torch.randn_like(pairs[0])
    tensors = [x[0].detach().requires_grad_() for x in pairs[:3]] + pairs[3:]
    runs = [
        first_order(pair_of("alone", None), pairs, case.window, cotangent)
        + first_order(swa_attention, tensors, case.window, cotangent[0])
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(bool(x.isfinite().all()) for x in [*runs[0], *given(pairs)])
