"""Memory: how much there is, and the most that a run takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ttt_megatron.bench.live_bytes import LiveBytes


def available_bytes(device: torch.device) -> float:
    """What can still be allocated; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + reserved)
    status = Path("/proc/meminfo")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    return float("inf")


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that live within a run, above those that live before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    found: list[int] = []
    with LiveBytes() as live, live.peak_above_start(found):
        run()
    return found[0]
