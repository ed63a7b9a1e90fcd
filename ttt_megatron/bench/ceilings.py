"""How fast the machine can multiply and move: what floors are worked out from."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ttt_kernels.work import Work
from ttt_megatron.planning.hardware import NAMED, Hardware

# Rates that PyTorch's own products and copies reach on this chip: bf16 FLOP/s and bytes/s.
_KNOWN = {"h200": (790e12, 4.3e12)}
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_RUNS = 7


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """FLOP/s by precision and bytes/s.

    flops: what floors count with; peak: the vendor's, which MFU counts with (where nobody states
    one, the former); source: where they come from, in words.
    """

    flops: dict[str, float]
    peak: dict[str, float]
    bytes_per_second: float
    source: str

    def product_rate(self, precision: str) -> float:
        """FLOP/s of the ceiling. Models in fp8 are held against bf16's, in which they do attention,
        the head and everything fast."""
        return self.flops["bf16" if precision == "fp8" else precision]

    def peak_rate(self, precision: str) -> float:
        """FLOP/s of the vendor's peak, likewise."""
        return self.peak["bf16" if precision == "fp8" else precision]

    def floor(self, work: Work, precision: str) -> float:
        """Seconds: the larger of FLOPs at the ceiling of products and bytes at that of memory."""
        return max(work.flops / self.product_rate(precision), work.bytes / self.bytes_per_second)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def named_gpu(device_name: str) -> Hardware | None:
    """The known GPU that the driver's name speaks of."""
    words = device_name.lower()
    found = [gpu for name, gpu in NAMED.items() if name != "cpu" and name.split("-")[0] in words]
    return found[0] if found else None


def measure_ceilings(device: torch.device, precisions: list[str]) -> Ceilings:
    """Times large products and a copy here and now; a known GPU's figures go before them."""
    # Some operations of every run are in float32.
    wanted = ["fp32", *("bf16" if p == "fp8" else p for p in precisions)]
    measured = {p: _product_rate(device, p) for p in dict.fromkeys(wanted)}
    if "bf16" in measured:
        # What multiplies bf16 slowly may multiply it in float32.
        measured["bf16"] = max(measured["bf16"], measured["fp32"])
    copied = _copy_rate(device)
    if device.type != "cuda":
        source = "a product and a copy measured in this run"
        return Ceilings(flops=measured, peak=measured, bytes_per_second=copied, source=source)
    gpu = named_gpu(torch.cuda.get_device_name(device))
    source = "products and a copy measured in this run"
    if gpu is None:
        return Ceilings(flops=measured, peak=measured, bytes_per_second=copied, source=source)
    peak = {p: gpu.flops(p) for p in measured}
    if gpu.name in _KNOWN:
        known, copied = _KNOWN[gpu.name]
        measured |= {"bf16": known} if "bf16" in measured else {}
        source = f"{gpu.name}: 790 TFLOP/s in bf16 and 4.3 TB/s; other precisions measured here"
    return Ceilings(flops=measured, peak=peak, bytes_per_second=copied, source=source)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The quickest of a few runs: a ceiling is what the machine can do when left alone."""
    run()
    found = []
    for _ in range(_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.process_time() if device.type == "cpu" else time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.process_time() if device.type == "cpu" else time.perf_counter()
        found.append(end - start)
    return min(found)


def _product_rate(device: torch.device, precision: str) -> float:
    size = (8192 if precision == "bf16" else 4096) if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(_DTYPES[precision]) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: torch.mm(a, b), device)


def _copy_rate(device: torch.device) -> float:
    size = 1 << (31 if device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2.0 * size / _seconds(lambda: target.copy_(source), device)
