"""How much memory a process has in use."""

import psutil
import torch


def memory_in_use() -> float:
    """Bytes: the peak of the GPU's allocator, or this process's resident memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(psutil.Process().memory_info().rss)
