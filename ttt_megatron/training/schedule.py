"""Learning rates of the outer and the inner loop, as functions of the step."""

import math

from ttt_megatron.config.schema import InnerConfig, OptimizerConfig


def warmup_steps(fraction: float, total_steps: int) -> int:
    """Steps in `fraction` of `total_steps`, rounded to the nearest."""
    return round(fraction * total_steps)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Outer learning rate of the update after `step` earlier ones.

    Linear from 0 over the warm-up, so the very first update has rate 0 and only fills Adam's
    moments; then a cosine to `end_lr` at `total_steps`, which count from 0, warm-up included.
    """
    warmup = warmup_steps(config.warmup_fraction, total_steps)
    if step < warmup:
        return config.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def inner_learning_rate(config: InnerConfig, step: int, total_steps: int) -> float:
    """Inner learning rate during outer step `step` (from 0): linear from lr_start to lr."""
    warmup = warmup_steps(config.lr_warmup_fraction, total_steps)
    if warmup == 0:
        return config.lr
    return config.lr_start + (config.lr - config.lr_start) * min(1.0, (step + 1) / warmup)
