from dataclasses import replace

import pytest

from ttt_megatron.config import InnerConfig, OptimizerConfig
from ttt_megatron.training.schedule import inner_learning_rate, learning_rate


def test_rates_of_the_official_implementation() -> None:
    config = OptimizerConfig(lr=4e-4, end_lr=1e-5, warmup_fraction=0.1)
    rates = [learning_rate(config, step, 10) for step in range(3)]
    assert rates[:2] == [0.0, 4e-4]
    assert rates[2] == pytest.approx(3.882e-4, abs=5e-8)


def test_warm_up_is_linear_and_the_cosine_ends_at_end_lr() -> None:
    config = OptimizerConfig(lr=1.0, end_lr=0.2, warmup_fraction=0.25)
    assert [learning_rate(config, step, 16) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 10, 16) == pytest.approx(0.6)
    assert learning_rate(config, 16, 16) == pytest.approx(0.2)
    assert learning_rate(replace(config, warmup_fraction=0.0), 0, 16) == 1.0


def test_inner_rate_rises_from_the_first_step_on() -> None:
    config = InnerConfig(lr=1.0, lr_start=0.1, lr_warmup_fraction=0.1)
    assert inner_learning_rate(config, 3, 100) == pytest.approx(0.46)
    assert inner_learning_rate(config, 9, 100) == 1.0
    assert inner_learning_rate(config, 50, 100) == 1.0
    assert inner_learning_rate(replace(config, lr_warmup_fraction=0.0), 0, 100) == 1.0
