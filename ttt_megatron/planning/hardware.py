"""GPUs by name, and the shares of their peak figures that a run is expected to reach."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt_megatron.errors import UserError

GIB = 2**30


def quantity(default: float, text: str) -> float:
    """A field with a default and its unit and meaning."""
    value: float = field(default=default, metadata={"help": text})
    return value


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and its links. Peak figures are dense ones; links count one direction."""

    name: str
    memory_gib: float = quantity(0.0, "GiB of memory, as the driver reports it")
    bf16_tflops: float = quantity(0.0, "peak TFLOP/s of dense bf16 matrix products")
    fp8_tflops: float = quantity(0.0, "peak TFLOP/s of dense fp8 matrix products; 0: it has none")
    fp32_tflops: float = quantity(0.0, "peak TFLOP/s in float32")
    fp64_tflops: float = quantity(0.0, "peak TFLOP/s in float64")
    memory_gbs: float = quantity(0.0, "GB/s of memory bandwidth")
    nvlink_gbs: float = quantity(0.0, "GB/s a GPU within a node, one direction")
    network_gbs: float = quantity(0.0, "GB/s a GPU between nodes, one direction")
    gpus_per_node: int = quantity(8, "GPUs that share NVLink")  # type: ignore[assignment]
    matmul_efficiency: float = quantity(0.60, "share of peak that matrix products reach")
    attention_efficiency: float = quantity(0.40, "share of peak that attention reaches")
    memory_efficiency: float = quantity(0.75, "share of memory bandwidth that is reached")
    link_efficiency: float = quantity(0.75, "share of a link's bandwidth that is reached")
    usable_memory: float = quantity(0.94, "share of the memory that tensors can fill")
    reserved_gib: float = quantity(2.0, "GiB of CUDA context, communication and library buffers")

    def flops(self, precision: str) -> float:
        """Peak FLOP/s in a compute dtype: fp64, fp32, bf16 or fp8."""
        peak: float = getattr(self, f"{precision}_tflops")
        return peak * 1e12

    @property
    def memory_bytes(self) -> float:
        """Bytes that tensors can fill, the reserved ones left out."""
        return (self.memory_gib * self.usable_memory - self.reserved_gib) * GIB


def _gpu(
    name: str,
    memory_gib: float,
    tflops: tuple[float, float, float, float],
    memory_gbs: float,
    nvlink_gbs: float,
    network_gbs: float,
) -> Hardware:
    """`tflops` are bf16, fp8, fp32 and fp64, dense."""
    bf16, fp8, fp32, fp64 = tflops
    return Hardware(
        name=name,
        memory_gib=memory_gib,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        fp32_tflops=fp32,
        fp64_tflops=fp64,
        memory_gbs=memory_gbs,
        nvlink_gbs=nvlink_gbs,
        network_gbs=network_gbs,
    )


# Vendor figures of the SXM boards; the network is one 400 Gb/s adapter a GPU (A100: 200 Gb/s).
# fp64 is that of the tensor cores. The A100 has no fp8.
_GPUS = (
    _gpu("h100", 79.6, (989, 1979, 67, 67), 3350, 450, 50),
    _gpu("h200", 140.4, (989, 1979, 67, 67), 4800, 450, 50),
    _gpu("a100-80", 80.0, (312, 0, 19.5, 19.5), 2039, 300, 25),
    _gpu("b200", 178.0, (2250, 4500, 75, 37), 8000, 900, 50),
    # One core of a server; "links" are copies through its memory.
    dataclasses.replace(
        _gpu("cpu", 8.0, (0.1, 0.1, 0.1, 0.05), 10, 5, 1), usable_memory=0.9, reserved_gib=0.5
    ),
)
NAMED = {gpu.name: gpu for gpu in _GPUS}
_ALIASES = {"h100-sxm": "h100", "a100": "a100-80"}


def find_hardware(name: str, changes: Sequence[str] = ()) -> Hardware:
    """The named GPU with `key=value` changes; raises UserError for an unknown name or key."""
    wanted = name.lower()
    hardware = NAMED.get(_ALIASES.get(wanted, wanted))
    if hardware is None:
        raise UserError(
            f"--gpu {name}: known GPUs are {', '.join(NAMED)}; take the nearest one and change its "
            "figures with --hardware key=value."
        )
    known = {item.name: item for item in dataclasses.fields(Hardware) if item.name != "name"}
    for change in changes:
        key, _, text = change.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise UserError(f"--hardware {change}: there is no {key}; {hint}")
        values: dict[str, Any] = {key: _number(change, key, text)}
        hardware = dataclasses.replace(hardware, **values)
    return hardware


def _number(change: str, key: str, text: str) -> float:
    """The value of a change, of the field's type."""
    try:
        number = int(text) if key == "gpus_per_node" else float(text)
    except ValueError:
        number = -1
    if not 0 < number < float("inf") and not (key == "reserved_gib" and number == 0):
        raise UserError(f"--hardware {change}: the value must be a number above 0.")
    return number
