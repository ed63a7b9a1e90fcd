"""DeepSpeed, started inside a process whose groups already stand, and kept to what it is asked for.

Importing and starting it detects devices by environment variables, changes others, adds warning
filters, and on the CPU compiles a C++ operation. All of that is held off or undone here. DeepSpeed
is imported by the first run that asks for it, never before.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from ttt_megatron.parallel.groups import Groups

# Gradients are sent in pieces of at most this many elements, for which there is one buffer.
_BUCKET_SIZE = 50_000_000


def start_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, stage: int, groups: Groups
) -> Any:
    """DeepSpeed's engine around a float32 module on this rank's device, in ZeRO stage 1 or 2.

    All processes are replicas. The parameters become views of flat buffers, of which the optimizer
    updates this rank's part. Gradients are averaged over the ranks and neither clipped nor checked
    for being finite. Collective.
    """
    with _undisturbed(groups.device):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # What it would otherwise compile, an all-reduce for inference, nothing here calls.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_config(module, stage),
            mpu=_Replicas,
            dist_init_required=False,
        )
    return engine


def _config(module: nn.Module, stage: int) -> dict[str, Any]:
    size = sum(parameter.numel() for parameter in module.parameters())
    return {
        # The caller says which micro-batch is a step's last, and divides losses itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": 0.0,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(size, _BUCKET_SIZE),
            "compute_grad_norm": False,
        },
    }


class _Replicas:
    """The process groups, by the names DeepSpeed asks for them; it would make its own."""

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return parallel_state.get_data_parallel_world_size()

    @staticmethod
    def get_data_parallel_rank() -> int:
        return parallel_state.get_data_parallel_rank()

    @staticmethod
    def get_model_parallel_group() -> None:
        """There is no model parallelism."""

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return 1

    @staticmethod
    def get_model_parallel_rank() -> int:
        return 0


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Environment variables and warning filters are afterwards what they were."""
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = device.type
    # Torchrun sets it; a process without a launcher has none, and DeepSpeed insists.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
