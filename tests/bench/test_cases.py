"""Groups of every section at tiny shapes: everything is measured, and counted as it should be."""

import pytest
import torch

import ttt_kernels
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_kernels.work import Work
from ttt_megatron.baselines.systems import as_system
from ttt_megatron.bench import models
from ttt_megatron.bench.attention_cases import attention_groups
from ttt_megatron.bench.attention_shape import AttentionShape
from ttt_megatron.bench.baselines import full_attention_by_sdpa, sdpa_math
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.fast_weight_cases import product_group, step_group
from ttt_megatron.bench.head_cases import head_group
from ttt_megatron.bench.inner_cases import READ, REVERSE, STEP, inner_group
from ttt_megatron.bench.latency_cases import DECODE, PREFILL, latency_group
from ttt_megatron.bench.latency_cases import STEP as STEPPED
from ttt_megatron.bench.meta_cases import FULL_BY_SDPA, PLAIN, meta_group
from ttt_megatron.bench.models import E2E, FULL, SWA, Size
from ttt_megatron.bench.prefix_cases import prefix_group
from ttt_megatron.bench.row_cases import row_groups
from ttt_megatron.bench.runner import Runner
from ttt_megatron.bench.static_cases import BF16, static_group
from ttt_megatron.config import from_dict
from ttt_megatron.model.parameters import count_parameters

CPU = torch.device("cpu")
FLAT = Ceilings(
    flops={"fp32": 1e10, "bf16": 1e10}, peak={"fp32": 1e10}, bytes_per_second=1e9, source="a test"
)
SIZE = Size(
    name="mini",
    config=from_dict(
        {
            "model": {
                "vocab_size": 40,
                "num_layers": 3,
                "num_suffix_layers": 2,
                "hidden_size": 16,
                "num_heads": 2,
                "ffn_hidden_size": 24,
                "window_size": 16,
            },
            "inner": {"chunk_size": 8},
            "data": {"sequence_length": 16},
        }
    ),
)


def measured(group):
    """Results by name and way; every one of ours must have been measured."""
    results = Runner(CPU, FLAT, log=lambda _: None).measure(group)
    assert not [r.reason for r in results if r.status in ("failed", "not possible")]
    return {(r.name, r.way): r for r in results}


@pytest.mark.parametrize("past", [0, 15])
def test_attention_is_measured_beside_sdpa(past):
    shape = AttentionShape(heads=2, head_dim=8, length=8, past=past, window=16)
    passes, twice = attention_groups([shape], "fp32", CPU, 2)
    found = measured(passes)
    for name, products in (("forward", 2), ("pair backward", 15)):
        own, cached = 36, 8 * past - 28 if past else 0
        gemms = products * own + (10 if products == 15 else 2) * cached
        assert found[name, "ttt_kernels"].flops == 2 * 2 * 8 * gemms
    ratio = found["inner backward", "SDPA"].ratio
    medians = found["inner backward", "SDPA"].median, found["inner backward", "ttt_kernels"].median
    assert ratio == pytest.approx(medians[0] / medians[1])
    assert {way for _, way in measured(twice)} == {"ttt_kernels", "SDPA math", "plain PyTorch"}


def test_the_double_backward_baseline_is_attention():
    q, past = (torch.randn(1, n, 2, 8, dtype=torch.float64) for n in (8, 15))
    assert torch.allclose(
        sdpa_math(q, q, q, 12, past, past),
        swa_attention_reference(q, q, q, 12, past, past),
        atol=1e-12,
    )


def test_full_attention_by_sdpa_is_full_attention():
    q, k = (torch.randn(1, 8, n, 8, dtype=torch.float64) for n in (4, 2))
    ours = ttt_kernels.swa_attention(q, k, k, None)
    with full_attention_by_sdpa():
        theirs = ttt_kernels.swa_attention(q, k, k, None)
        with pytest.raises(ValueError, match="neither windows nor cached keys"):
            ttt_kernels.swa_attention(q, k, k, 4)
    assert not torch.equal(ours, theirs)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.equal(ttt_kernels.swa_attention(q, k, k, None), ours)


def test_other_kernels_are_measured():
    groups = [head_group(8, 40, 16, "fp32", CPU, 2), *row_groups(8, 16, 24, 2, "fp32", CPU, 2)]
    groups += [step_group(2, 16, 24, "fp32", CPU, 2), product_group(8, 16, 24, "bf16", CPU, 2)]
    for group in groups:
        for (_, way), result in measured(group).items():
            if way == "ttt_kernels":
                assert result.floor > 0
                assert result.peak_bytes is not None
                assert len(result.seconds) == 2


def test_static_linear_maps_in_float8_are_measured_beside_bf16():
    found = measured(static_group(32, 16, 48, False, CPU, 2))
    assert [name for name, way in found if way == "ttt_kernels"] == [
        "weight rounded", "forward", "backward", "pair forward", "pair backward",
    ]  # fmt: skip
    assert sum(way == BF16 and r.ratio is not None for (_, way), r in found.items()) == 4


def test_a_chunk_is_stepped_and_stepped_back_over():
    found = measured(inner_group(SIZE, "fp32", CPU, 2, FLAT))
    assert [name for name, _ in found] == [READ, STEP, REVERSE]
    read, step, reverse = found.values()
    assert step.flops < reverse.flops
    assert (read.ratio, step.ratio) == (1.0, pytest.approx(step.median / read.median))


def test_steps_of_all_models_are_measured():
    found = measured(meta_group(SIZE, 32, "fp32", CPU, 1, FLAT, 1e12))
    names = [name for name, _ in found]
    assert names == [E2E, f"{E2E}, save_all", PLAIN, SWA, FULL, FULL_BY_SDPA]
    e2e, plain = found[E2E, "ttt_kernels"], found[PLAIN, "ttt_kernels"]
    # Attention's backward pass forms the scores again, which a model's FLOPs leave out.
    assert e2e.flops > plain.flops == pytest.approx(plain.model_flops, rel=0.05)
    assert e2e.mfu == pytest.approx(e2e.model_flops / e2e.median / 1e10)
    assert e2e.peak_bytes > 2 * 4 * e2e.extra["parameters"]


def test_what_does_not_fit_is_said_and_the_rest_is_measured():
    config = SIZE.at(32, "fp32")
    others = sum(models.weight_bytes(as_system(config, kind), CPU) for kind in ("swa", "full"))
    # Room for the plain step, and too little for the inner steps' besides.
    need = models.step_bytes(as_system(config, "off"), CPU) + others + 1024
    group = meta_group(SIZE, 32, "fp32", CPU, 1, FLAT, need)
    found = Runner(CPU, FLAT, log=lambda _: None).measure(group)
    status = {r.name: r.status for r in found}
    assert status[E2E] == "out of memory"
    assert "GiB" in next(r.reason for r in found if r.name == E2E)
    assert status[PLAIN] == "measured"


def test_sessions_are_measured():
    found = measured(latency_group(SIZE, 32, "fp32", CPU, 2, FLAT))
    assert {way for _, way in found} == {E2E, SWA, FULL}
    assert found[PREFILL, E2E].tokens == 32
    assert found[PREFILL, E2E].ratio > 1
    assert found[DECODE, SWA].tokens == 1
    assert [way for name, way in found if name == STEPPED] == [E2E]


@pytest.mark.parametrize(
    ("name", "width"), [("125m", 2048), ("760m", 4096), ("1b", 5376), ("3b", 6912)]
)
def test_baselines_are_as_wide_as_the_published_ones(name, width):
    [size] = models.named_sizes([name])
    plain = as_system(size.config, "swa").model
    assert plain.ffn_hidden_size == width
    ours, theirs = count_parameters(size.config.model), count_parameters(plain)
    assert theirs.total == pytest.approx(ours.total, rel=0.02)


def test_floors_are_the_larger_of_products_and_moves():
    assert FLAT.floor(Work(10**10, 10**8), "fp32") == pytest.approx(1.0)
    assert FLAT.floor(Work(10**8, 10**9), "fp32") == pytest.approx(1.0)


def test_the_prefix_is_measured_in_every_precision_in_turn():
    size = models.tiny_size()
    found = measured(prefix_group(size, 128, ("fp32", "fp8"), CPU, 1, FLAT))
    fp32, fp8 = found["fp32", "ttt_kernels"], found["fp8", "ttt_kernels"]
    assert fp8.ratio == pytest.approx(fp8.median / fp32.median)
