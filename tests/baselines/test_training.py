"""Every baseline is trained, resumed, evaluated and decoded from by the same commands."""

import pytest
import torch

from ttt_megatron.cli.main import main
from ttt_megatron.config import from_dict
from ttt_megatron.config.schema import MIXERS
from ttt_megatron.errors import UserError
from ttt_megatron.model.parameters import count_parameters
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.weights import build_learner, load_learner


def settings_of(mixers, data, output, steps=3):
    return {
        "model": {
            "vocab_size": 264,
            "num_layers": 2,
            "num_suffix_layers": 0,
            "hidden_size": 64,
            "num_heads": 2,
            "ffn_hidden_size": 48,
            "window_size": 16,
            "mixers": mixers,
        },
        "inner": {"chunk_size": 8, "mode": "off"},
        "data": {"path": str(data), "sequence_length": 64},
        "optimizer": {"lr": 1e-2},
        "training": {
            "steps": steps,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "save_interval": 2,
            "eval_sequences": 0,
            "device": "cpu",
            "output": str(output),
        },
        "tracking": {"mlflow": False, "progress": False},
    }


def test_a_run_says_whose_recurrences_it_has(trained_run, tmp_path, capsys):
    base = settings_of("mamba2,gated_delta", trained_run.data, tmp_path / "run", steps=1)
    reason = "plain PyTorch (flash-linear-attention runs on CUDA alone, and this is cpu)"
    for wanted, expected in (
        ("auto", {"Mamba2's recurrence": reason, "GatedDeltaNet's recurrence": reason}),
        ("plain", {"recurrences": "plain PyTorch (training.mixer_kernels = plain)"}),
    ):
        config = from_dict({**base, "training.mixer_kernels": wanted})
        with process_groups("cpu", config.parallel) as groups:
            found = build_trainer(config, groups).implementations
        assert expected.items() <= found.items()
    with pytest.raises(UserError, match="mixer_kernels = flash-linear-attention, and Mamba2 has"):
        run_training(from_dict({**base, "training.mixer_kernels": "flash-linear-attention"}))


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_no_engine_lets_rates_decay(engine, trained_run, tmp_path):
    """A decay of 0.3 a step, beside which Adam's own steps of 0.001 are small."""
    settings = settings_of("mamba2,gated_delta", trained_run.data, tmp_path / "run")
    settings["optimizer"] = {
        "lr": 1e-3,
        "end_lr": 1e-3,
        "warmup_fraction": 0.0,
        "weight_decay": 300.0,
        "engine": engine,
    }
    run_training(from_dict(settings))
    before = build_learner(from_dict(settings)).named_parameters()
    after = dict(load_learner(tmp_path / "run")[0].named_parameters())
    own = 0
    for name, value in before:
        if name.endswith(("A_log", "dt_bias", ".D")):
            own += 1
            assert (after[name] - value).abs().max() < 0.01, name
        elif "linear" in name:
            assert after[name].norm() < 0.6 * value.norm(), name
    assert own == 5


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind != "attention"])
def test_a_run_trains_resumes_and_generates(kind, trained_run, tmp_path, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    mixers = f"{kind},attention"
    run_training(from_dict(settings_of(mixers, trained_run.data, once)))
    run_training(from_dict(settings_of(mixers, trained_run.data, twice)))
    (newest,) = (twice / "checkpoints").glob("step-00000003")
    newest.rename(tmp_path / "gone")
    run_training(from_dict(settings_of(mixers, trained_run.data, twice)))
    parameters = [dict(load_learner(path)[0].named_parameters()) for path in (once, twice)]
    first = build_learner(from_dict(settings_of(mixers, trained_run.data, once)))
    for name, start in first.named_parameters():
        assert torch.equal(parameters[0][name], parameters[1][name]), name
        assert not torch.equal(parameters[0][name], start), name
    capsys.readouterr()
    assert main(["generate", str(once), "--prompt", "whale", "--tokens", "5", "--greedy"]) == 0
    assert main(["evaluate", str(once), "--length", "40", "--documents", "2"]) == 0
    assert "off" in capsys.readouterr().out
    report = tmp_path / "report"
    assert main(["report", str(once), "--output", str(report)]) == 0
    total = sum(value.numel() for value in parameters[0].values())
    assert f"| {total:,} |" in (report / "report.md").read_text()
    assert main(["export", str(once), str(tmp_path / "out")]) == 2
    assert "only models of windowed attention" in capsys.readouterr().err


def test_models_are_counted_as_they_are_built(capsys):
    for mixers in ("full", "mamba2,attention", "gated_delta", "swa_ttt_kvb,ttt_kvb"):
        config = from_dict(settings_of(mixers, "", "x"))
        total = sum(p.numel() for p in build_learner(config).parameters())
        words = [
            f"{a}.{b}={v}"
            for a, s in settings_of(mixers, "", "x").items()
            if isinstance(s, dict)
            for b, v in s.items()
            if a in ("model", "inner")
        ]
        assert main(["parameters", *words, "recipes/quickstart.yaml"]) == 0
        assert f"{total:,}" in capsys.readouterr().out
        if mixers == "full":
            assert count_parameters(config.model).total == total
