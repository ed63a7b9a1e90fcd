"""The output head through Triton's row kernels, against its float64 implementation."""

import pytest
import torch
from lock_step import in_lock_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_runs import DEVICES, DTYPES, ON_CUDA, assert_near, wide

from ttt_kernels import (
    WeightGradients,
    linear_cross_entropy,
    linear_cross_entropy_pair,
    putting_off,
)
from ttt_kernels.linear_cross_entropy import triton_path, triton_rows
from ttt_kernels.linear_cross_entropy.shard import WHOLE, VocabularyShard
from ttt_kernels.triton_launch import suits_triton

KERNELS = ("loss", "hidden", "full", "pair", "pair_known")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of tokens and of the vocabulary, and several steps within a row."""
    monkeypatch.setattr(triton_path, "ELEMENTS", 48)
    monkeypatch.setattr(triton_path, "COLUMNS", 12)
    monkeypatch.setattr(triton_path, "ALIGNMENT", 4)
    monkeypatch.setattr(triton_rows, "READ_COLUMNS", 8)
    monkeypatch.setattr(triton_rows, "GRADIENT_COLUMNS", 8)


def draw(tokens, vocabulary, width, dtype, device):
    """pair [2, 1, T, H] and weight [V, H] (float32), targets, weights with a masked token."""
    pair = torch.randn(2, 1, tokens, width, device=device).to(dtype)
    weight = torch.randn(vocabulary, width, device=device)
    targets = torch.randint(vocabulary, (1, tokens), device=device)
    a, b = torch.rand(2, 1, tokens, device=device).unbind(0)
    a[:, tokens // 2 : tokens // 2 + tokens // 4] = 0
    b[a == 0] = 0
    return pair, weight, targets, a, -b


def results(kernel, pair, weight, targets, a, b, shard=WHOLE, cotangent=1.5):
    """Losses and gradients, each a tensor."""
    pair = pair.detach().requires_grad_(kernel != "loss")
    weight = weight.detach().requires_grad_(kernel not in ("loss", "hidden"))
    inputs = [x for x in (pair, weight) if x.requires_grad]
    if not kernel.startswith("pair"):
        loss, nll = linear_cross_entropy(pair[0], weight, targets, a, shard)
        found = torch.autograd.grad(loss, inputs, loss.new_tensor(cotangent)) if inputs else ()
        return [loss, nll, *(g[0] if g.dim() == 4 else g for g in found)]
    known = [torch.ones_like(pair[1])] if kernel == "pair_known" else []
    total = linear_cross_entropy_pair(pair, weight, targets, a, b, *known, shard=shard)
    return [total, *torch.autograd.grad(total, inputs, total.new_tensor(cotangent))]


def exact(kernel, pair, weight, targets, a, b):
    """The same in float64, of the weight as the products see it."""
    return results(kernel, *wide([pair, weight.to(pair.dtype)]), targets, a.double(), b.double())


def compare(kernel, pair, weight, targets, a, b):
    assert suits_triton(pair, weight)
    actual = results(kernel, pair, weight, targets, a, b)
    dtype = pair.dtype
    assert_near(actual, exact(kernel, pair, weight, targets, a, b), dtype)
    assert actual[0].dtype == torch.float32
    assert all(g.dtype == (torch.float32 if g.dim() == 2 else dtype) for g in actual[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_and_gradients(kernel, dtype, device, small_tiles):
    compare(kernel, *draw(7, 21, 6, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_in_one_tile(tokens, kernel, device):
    compare(kernel, *draw(tokens, 21, 6, torch.float32, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_layout(kernel, device, small_tiles):
    pair, weight, targets, a, b = draw(7, 21, 6, torch.float32, device)
    compare(
        kernel,
        pair.transpose(0, -1).contiguous().transpose(0, -1),
        torch.stack((weight, weight), -1)[..., 0].mT.contiguous().mT,
        torch.stack((targets, targets), -1)[..., 0],
        torch.stack((a, a), -1)[..., 0],
        b[:, :1].expand(1, 7),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["hidden", "full"])
def test_confident_tokens_keep_their_small_gradient(kernel, device, small_tiles):
    """1 − p of a sure token is lost if p is rounded before 1 is taken away."""
    weight = torch.nn.functional.normalize(torch.randn(9, 6, device=device)).bfloat16()
    hidden, ones = 16 * weight, torch.ones(1, 9, device=device)
    pair, targets = hidden.expand(2, 1, 9, 6), torch.arange(9, device=device).unsqueeze(0)
    found = results(kernel, pair, weight, targets, ones, ones, cotangent=1.0)[2][0]
    # Of logits in bfloat16, as every implementation has them.
    logits = (hidden @ weight.mT).double()
    p = torch.softmax(logits, dim=-1)
    expected = (p - torch.eye(9, device=device)) @ weight.double()
    assert p.diagonal().median() > 0.99
    rest = 1 - p.diagonal()
    assert ((found.double() - expected).norm(dim=-1) < 1.2e-2 * rest + 2e-6).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cut", [(0, 16, 21), (0, 9, 9, 19, 21)])
def test_shards_add_up_to_the_whole(cut, kernel, device, small_tiles):
    pair, weight, targets, a, b = draw(7, 21, 6, torch.float32, device)

    def run(rank, reduce):
        shard = VocabularyShard(
            cut[rank], 16, lambda x: reduce(x, torch.maximum), lambda x: reduce(x, torch.add)
        )
        own = weight[cut[rank] : cut[rank + 1]]
        return results(kernel, pair, own, targets, a, b, shard)

    shards = in_lock_step(len(cut) - 1, run)
    expected = exact(kernel, pair, weight, targets, a, b)
    losses = 1 if kernel.startswith("pair") else 2
    for one in shards:
        assert_near(one[:losses], expected[:losses], torch.float32)
    if kernel == "loss":
        return
    parts = list(zip(*(one[losses:] for one in shards), strict=True))
    joined = [sum(d_hidden) for d_hidden in parts[:1]] + [torch.cat(w) for w in parts[1:]]
    if kernel == "pair_known":
        # Each shard hands on the whole cotangent that it was given.
        joined[0][1] /= len(shards)
    assert_near(joined, expected[losses:], torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["full", "pair", "pair_known"])
def test_put_off_gradients_are_the_same(kernel, device, small_tiles):
    pair, weight, targets, a, b = draw(7, 21, 6, torch.float32, device)
    expected = exact(kernel, pair, weight, targets, a, b)
    pair, weight = pair.requires_grad_(), weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    gradients = WeightGradients()
    with putting_off(gradients):
        if kernel == "full":
            loss, _ = linear_cross_entropy(pair[0], weight, targets, a)
        else:
            known = [torch.ones_like(pair[1])] if kernel == "pair_known" else []
            loss = linear_cross_entropy_pair(pair, weight, targets, a, b, *known)
    loss.backward(loss.new_tensor(1.5))
    assert gradients.pending == 1
    gradients.form()
    found = [pair.grad[0] if kernel == "full" else pair.grad, weight.grad - 1]
    assert_near(found, expected[-2:], torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_finite_loss_of_what_is_not_finite(bad, device, small_tiles):
    pair, weight, targets, a, b = draw(7, 21, 6, torch.float32, device)
    pair[0, 0, 2, 3] = bad
    for kernel in ("loss", "hidden", "full"):
        loss, nll, *_ = results(kernel, pair, weight, targets, a + 1, b)
        assert nll.isfinite().tolist() == [[i != 2 for i in range(7)]]
        assert not loss.isfinite()
    assert not results("pair", pair, weight, targets, a + 1, b)[0].isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_a_target_in_no_shard_leaves_no_finite_loss(device, small_tiles):
    pair, weight, targets, a, b = draw(7, 21, 6, torch.float32, device)
    targets[0, 2], shard = 21, VocabularyShard(0, 21)
    for kernel in KERNELS:
        assert results(kernel, pair, weight, targets, a + 1, b, shard)[0].isnan()
    targets[0, 2] = -1
    assert results("hidden", pair, weight, targets, a + 1, b, shard)[1].isnan().sum() == 1


class LargestTensor(TorchDispatchMode):
    """The most bytes of one storage that an operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_of_tokens_times_vocabulary_is_stored(kernel, device, monkeypatch):
    monkeypatch.setattr(triton_path, "ELEMENTS", 256)
    monkeypatch.setattr(triton_path, "COLUMNS", 32)
    monkeypatch.setattr(triton_path, "ALIGNMENT", 32)
    case = draw(8, 256, 2, torch.float32, device)
    with LargestTensor() as largest:
        results(kernel, *case)
    # A tile, of a value and its tangent, or the head's weights: not 8·256 logits.
    assert 4 * 256 <= largest.nbytes <= 2 * 4 * 256 < 4 * 8 * 256 / 2


@pytest.mark.parametrize("device", [ON_CUDA])
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_runs_agree_bit_for_bit_and_store_no_logits(kernel, device):
    case = draw(1024, 32000, 512, torch.bfloat16, device)
    # Logits of about 1: those of independent normal vectors are so large that bfloat16 rounds them
    # to a few tenths, and what is compared would be that rounding.
    case = (case[0] * 512**-0.5, *case[1:])
    compare(kernel, *case)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = results(kernel, *case)
    # Tiles of the pair, the weight's copy and its gradient, products to be added.
    most = 4 * triton_path.ELEMENTS + (2 + 2 * 4) * case[1].numel()
    assert torch.cuda.max_memory_allocated() - start < most + 64 * 2**20
    second = results(kernel, *case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("device", [ON_CUDA])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_host_never_waits(kernel, device):
    case = draw(1024, 32000, 64, torch.bfloat16, device)
    results(kernel, *case, cotangent=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pair, weight, targets, a, b = case
        pair, weight = pair.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = (
            linear_cross_entropy_pair(pair, weight, targets, a, b)
            if kernel.startswith("pair")
            else linear_cross_entropy(pair[0], weight, targets, a)[0]
        )
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
