"""Whose RMSNorm the prefix uses: the choice, the trial, and what the model does with it."""

import pytest
import torch
from meta_case import batch, engine_gradients, learner, oracle_gradients, worst_error

from ttt_kernels.rms_norm.reference import rms_norm_reference
from ttt_megatron.errors import UserError
from ttt_megatron.training.fused_norm import (
    Norm,
    choose_norm,
    find_apex_norm,
    find_transformer_engine_norm,
    try_out,
)
from ttt_megatron.training.fused_packages import NotAvailableError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# Packages with the interfaces of theirs, and definitions for kernels: theirs run on CUDA alone.
APEX = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
        import torch.nn.functional as F
        def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6):
            assert input.dtype == weight.dtype
            return F.rms_norm(input, normalized_shape, weight, eps)
        """,
    "fused_layer_norm_cuda.py": "",
}
TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch.py": """
        import torch
        import torch.nn.functional as F

        class _Normalise(torch.autograd.Function):
            @staticmethod
            def forward(ctx, layer, x, weight):
                ctx.layer = layer
                ctx.save_for_backward(x)
                return F.rms_norm(x, weight.shape, weight, layer.eps)

            @staticmethod
            def backward(ctx, dy):
                # Like TransformerEngine's, it reads the layer's weight when it runs.
                x, weight = ctx.saved_tensors[0].detach(), ctx.layer.weight.detach()
                leaves = [x.requires_grad_(), weight.requires_grad_()]
                with torch.enable_grad():
                    out = F.rms_norm(x, weight.shape, weight, ctx.layer.eps)
                return None, *torch.autograd.grad(out, leaves, dy)

        class RMSNorm(torch.nn.Module):
            def __init__(self, normalized_shape, eps=1e-5, device=None):
                super().__init__()
                self.eps = eps
                self.weight = torch.nn.Parameter(torch.empty(normalized_shape, device=device))

            def forward(self, x):
                assert x.dtype == self.weight.dtype
                return _Normalise.apply(self, x, self.weight)
        """,
}


FOUND = {
    "apex": (APEX, find_apex_norm),
    "transformer_engine": (TRANSFORMER_ENGINE, find_transformer_engine_norm),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_one_passes_its_trial(name, dtype, install):
    files, find = FOUND[name]
    install(files)
    try_out(find()(), CPU, dtype)


@pytest.mark.parametrize("name", FOUND)
def test_the_prefix_normalises_with_it_and_gradients_stay(name, install):
    """Two micro-batches forwards before either goes backwards, as in a pipeline."""
    files, find = FOUND[name]
    install(files)
    calls = []

    def make():
        norm = find()()
        return lambda *arguments: calls.append(0) or norm(*arguments)

    model, plain = learner(), learner()
    Norm(name, "here", make).install(model.model)
    losses = [model(*batch(seed=seed)).loss for seed in (1, 2)]
    blocks = model.model.num_prefix_layers
    assert len(calls) == 2 * blocks * 6
    sum(losses).backward()
    sum(plain(*batch(seed=seed)).loss for seed in (1, 2)).backward()
    for (key, a), (_, e) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-10, atol=1e-12, msg=key)


def test_the_oracle_keeps_the_definition(install):
    install(APEX)
    model = learner()
    Norm("apex", "here", lambda: lambda *_: pytest.fail("used")).install(model.model)
    _, found = oracle_gradients(model, batch())
    assert worst_error(found, engine_gradients(learner(), batch())) < 1e-10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, g, eps: rms_norm_reference(x, g, 0.0), "value is .* off the definition's"),
        (lambda x, g, eps: rms_norm_reference(x, g.detach(), eps), "RuntimeError"),
        (
            lambda x, g, eps: rms_norm_reference(x, 0.5 * g + 0.5 * g.detach(), eps),
            "gain's gradient is .* off",
        ),
        (
            lambda x, g, eps: rms_norm_reference(0.5 * x + 0.5 * x.detach(), g, eps),
            "gradient is .* off",
        ),
        (lambda x, g, eps: rms_norm_reference(x, g, eps)[None], "the shape|failed"),
        (lambda x, g, eps: rms_norm_reference(x, g, eps) * torch.nan, "value is nan off"),
    ],
)
def test_a_wrong_one_fails_its_trial(wrong, message):
    with pytest.raises(NotAvailableError, match=message):
        try_out(wrong, CPU, torch.float32)


def test_nothing_installed_leaves_the_own_one():
    chosen = choose_norm("auto", CUDA, torch.float32)
    assert chosen.make is None
    assert str(chosen) == (
        "ttt_kernels (transformer_engine's is not to be had: no package transformer_engine is "
        "installed; apex's is not to be had: no package apex is installed)"
    )
    assert str(choose_norm("auto", CPU, torch.float32)) == (
        "ttt_kernels (those of TransformerEngine and Apex run on CUDA alone, and this is cpu)"
    )
    assert choose_norm("ttt_kernels", CUDA, torch.float64).make is None


@pytest.mark.parametrize("name", FOUND)
def test_one_asked_for_by_name_that_is_not_to_be_had_is_refused(name, install):
    for device, dtype, message in (
        (CUDA, torch.float32, f"no package {name} is installed"),
        (CPU, torch.float32, "run on CUDA alone, and this is cpu"),
        (CUDA, torch.float64, "know no float64"),
    ):
        with pytest.raises(UserError, match=f"training.fused_norm = {name}, .*{message}; set"):
            choose_norm(name, device, dtype)
    install(
        {"apex/__init__.py": "", "transformer_engine/__init__.py": "raise RuntimeError('core')"}
    )
    message = {"apex": "is not NVIDIA's", "transformer_engine": "RuntimeError: core"}[name]
    with pytest.raises(UserError, match=message):
        choose_norm(name, CUDA, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_installed_is_right(name, dtype):
    pytest.importorskip(name)
    assert choose_norm(name, CUDA, dtype).name == name
