"""Whose AdamW updates: the choice, what is refused, and the update through mcore either way."""

import pytest
import torch
from small_run import small_run
from torch import nn

from ttt_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.parallel.replica import replicate
from ttt_megatron.training import optimizer as outer
from ttt_megatron.training.fused import Adam, TorchAdamW, choose_adam, find_apex, mcore_adam
from ttt_megatron.training.optimizer import build_optimizer
from ttt_megatron.training.preflight import resolve_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, ffn_hidden_size=8)


class GroupAdamW(torch.optim.Optimizer):
    """AdamW written out, with the interface that Apex and TransformerEngine have in common.

    Theirs run on CUDA alone. Like them it is told `adam_w_mode` and counts updates by group.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, *, adam_w_mode):
        assert adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                first, second = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                first.lerp_(p.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                corrected = (second / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                update = first / (1 - beta1 ** group["step"]) / corrected
                p.sub_(update.add_(p, alpha=group["weight_decay"]), alpha=group["lr"])


def test_auto_is_torch_on_a_cpu_and_in_float64():
    chosen = choose_adam(OptimizerConfig(), CPU, torch.float32)
    assert (chosen.name, chosen.make) == ("torch", TorchAdamW)
    assert "run on CUDA alone, and this is cpu" in str(chosen)
    assert "float64" in str(choose_adam(OptimizerConfig(), CUDA, torch.float64))


APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from apex.optimizers.fused_adam import FusedAdam",
    "apex/optimizers/fused_adam.py": "class FusedAdam: pass",
    "apex/multi_tensor_apply.py": "class multi_tensor_applier: available = True",
}
WEB_TOOLKIT = {"apex/__init__.py": "raise SystemExit('imported')", "apex/lib/__init__.py": ""}


def test_nvidias_apex_is_found(install):
    install(APEX)
    assert find_apex().__module__ == "apex.optimizers.fused_adam"
    chosen = choose_adam(OptimizerConfig(), CUDA, torch.float32)
    assert str(chosen) == "apex (the first that is installed)"
    named = choose_adam(OptimizerConfig(fused="apex"), CUDA, torch.float32)
    assert str(named) == "apex (optimizer.fused = apex)"
    assert choose_adam(OptimizerConfig(fused="torch"), CUDA, torch.float32).make is TorchAdamW


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        ({}, "apex", "no package apex is installed"),
        (WEB_TOOLKIT, "apex", r"in .*apex is not NVIDIA's \(PyPI's is a web toolkit"),
        (
            APEX | {"apex/multi_tensor_apply.py": "class multi_tensor_applier: available = False"},
            "apex",
            "built without its CUDA kernels",
        ),
        ({}, "transformer_engine", "no package transformer_engine is installed"),
        (
            {"transformer_engine/__init__.py": "raise RuntimeError('no core')"},
            "transformer_engine",
            r"cannot be imported \(RuntimeError: no core\)",
        ),
    ],
)
def test_one_that_is_not_to_be_had_is_refused_by_name_and_passed_over_by_auto(
    install, files, wanted, message
):
    install(files)
    with pytest.raises(UserError, match=f"optimizer.fused = {wanted}, .*{message}.*set"):
        choose_adam(OptimizerConfig(fused=wanted), CUDA, torch.float32)
    chosen = choose_adam(OptimizerConfig(), CUDA, torch.float32)
    assert str(chosen) == "torch (neither TransformerEngine nor NVIDIA Apex is installed)"


@pytest.mark.parametrize("wanted", ["apex", "transformer_engine"])
def test_names_are_refused_on_a_cpu_before_anything_starts(wanted, tmp_path):
    config = small_run(tmp_path, tmp_path, optimizer__fused=wanted, training__device="auto")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="run on CUDA alone, and this is cpu"):
        resolve_run(config)


def test_cuda_graphs_are_refused_where_there_is_no_cuda_device(tmp_path):
    config = small_run(tmp_path, tmp_path, training__cuda_graphs=True, training__device="auto")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="cuda_graphs = true, and torch finds no CUDA device"):
        resolve_run(config)


def _steps(monkeypatch, adam: Adam) -> tuple[dict[str, torch.Tensor], dict]:
    """Three updates in float64, the last after the state has been saved and loaded again."""
    monkeypatch.setattr(outer, "choose_adam", lambda *_: adam)
    config = OptimizerConfig(lr=0.1, warmup_fraction=0.0, weight_decay=0.5, decay="matrices")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with process_groups():
        [ddp] = replicate([net], SHAPE, ParallelConfig())
        optimizer = build_optimizer([ddp], config, total_steps=10)
        for step in range(3):
            if step == 2:
                moments = optimizer.gathered_moments()
                fresh = build_optimizer([ddp], config, total_steps=10)
                fresh._adam.scatter(fresh._parameters(), moments)
                fresh._adam.set_updates(2)
                optimizer = fresh
            optimizer.zero_grad()
            ddp(torch.ones(2, 7, dtype=torch.float64) * (step + 1)).square().sum().backward()
            ddp.finish_grad_sync()
            assert optimizer.step(step).applied
        return {n: p.detach().clone() for n, p in net.named_parameters()}, optimizer.adam


def test_mcore_updates_with_the_chosen_one(monkeypatch):
    """Through its distributed optimizer, against torch's: one counts by group, one by tensor."""
    expected, _ = _steps(monkeypatch, Adam("torch", "for comparison", TorchAdamW))
    made = []

    class Made(GroupAdamW):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(self)

    found, adam = _steps(monkeypatch, Adam("apex", "stands in for it", Made))
    assert adam.name == "apex"
    assert [group["step"] for one in made for group in one.param_groups] == [2, 2, 3, 3]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_mcores_own_choice_is_back_afterwards():
    from megatron.core import optimizer

    before = optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER
    with mcore_adam(Adam("apex", "", GroupAdamW)):
        assert optimizer.Adam is GroupAdamW
    assert (optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER) == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_fused_update_on_cuda(dtype):
    """Against the update over lists of tensors, on the same device."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        x = nn.Parameter(torch.randn(300, 20, dtype=dtype, device="cuda"))
        groups = [{"params": [x]}]
        made = (
            TorchAdamW(groups, adam_w_mode=True, lr=0.1)
            if fused
            else torch.optim.AdamW([x], lr=0.1)
        )
        for step in range(3):
            x.grad = x.detach() * (step + 1)
            made.step()
        results.append(x.detach())
    torch.testing.assert_close(results[0], results[1])
