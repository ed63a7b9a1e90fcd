"""Compile every Triton kernel at the tiles it ships with, on a machine without a GPU.

    python tools/compile_kernels.py                      compile all, print, compare
    python tools/compile_kernels.py --only swa_attention/forward
    python tools/compile_kernels.py --update             write the tables kept beside the kernels

Spills are instructions: in all / in the innermost loops.

Exit 1 where a kernel spills registers without a reason, where one that multiplies matrices does
not reach the tensor cores, where one needs more shared memory than the chip has, or where the
figures are not those kept in the table.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ttt_kernels
from ttt_kernels.compile_case import CompileCase

SHARED_MEMORY_LIMIT = {"sm_90": 232448}
CAPABILITY = {"sm_90": 90}
TENSOR_CORE_INSTRUCTION = {"sm_90": "HGMMA"}
SPILLING = ("LDL", "STL")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case: counts of instructions, and bytes of shared memory.

    `loop_spills` are those of `spills` that lie in innermost loops, which run once a tile; the
    others run once a program or a head.
    """

    registers: int
    spills: int
    loop_spills: int
    shared_memory: int
    tensor_core_instructions: int
    num_warps: int
    num_stages: int


def operations() -> dict[str, Path]:
    """Names and folders of the operations that have kernels to compile."""
    folders = {}
    for module in pkgutil.iter_modules(ttt_kernels.__path__):
        folder = Path(ttt_kernels.__path__[0], module.name)
        if module.ispkg and (folder / "compile_cases.py").exists():
            folders[module.name] = folder
    return folders


def cases_of(operation: str) -> list[CompileCase]:
    """The cases an operation ships."""
    module = importlib.import_module(f"ttt_kernels.{operation}.compile_cases")
    cases: list[CompileCase] = module.compile_cases()
    return cases


def _binary(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _output_of(name: str, *arguments: str) -> str:
    return subprocess.run(
        [_binary(name), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _source(case: CompileCase) -> Any:
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    multiples = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible}
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=multiples)


def count(code: list[str], *instructions: str) -> int:
    """Lines of machine code with one of these instructions."""
    pattern = re.compile(rf"\b(?:{'|'.join(instructions)})\b")
    return sum(bool(pattern.search(line)) for line in code)


def innermost_loops(code: list[str]) -> list[list[str]]:
    """The lines of machine code of each loop that has no loop within.

    Waits for memory are placed behind the end of the program, and jump back: they are no loops.
    """
    end = max((i for i, line in enumerate(code) if re.search(r"\bEXIT\b", line)), default=0)
    labels = {m[1]: i for i, line in enumerate(code) if (m := re.match(r"\s*(\.L\w+):", line))}
    loops = []
    for i, line in enumerate(code[:end]):
        target = re.search(r"\bBRA\b.*?(\.L\w+)", line)
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i + 1))
    inner = [
        (start, stop)
        for start, stop in loops
        if not any(start <= a and b < stop for a, b in loops if (a, b) != (start, stop))
    ]
    return [code[start:stop] for start, stop in inner]


def compile_case(case: CompileCase, target: str) -> Compiled:
    """Compile one case and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(
        _source(case), target=GPUTarget("cuda", CAPABILITY[target], 32), options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output_of("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _output_of("nvdisasm", "-c", str(cubin)).splitlines()
    found = re.search(r"\bREG:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        registers=int(found[1]),
        spills=count(code, *SPILLING),
        loop_spills=sum(count(loop, *SPILLING) for loop in innermost_loops(code)),
        shared_memory=kernel.metadata.shared,
        tensor_core_instructions=count(code, TENSOR_CORE_INSTRUCTION[target]),
        num_warps=case.num_warps,
        num_stages=case.num_stages,
    )


def faults(case: CompileCase, result: Compiled, target: str) -> list[str]:
    """What keeps the case from being shipped, a sentence each."""
    found = []
    if result.spills and not case.spills_because:
        found.append(f"{result.spills} spilling instructions and no reason given")
    if case.tensor_cores and not result.tensor_core_instructions:
        found.append(f"no {TENSOR_CORE_INSTRUCTION[target]}: products miss the tensor cores")
    limit = SHARED_MEMORY_LIMIT[target]
    if result.shared_memory > limit:
        found.append(f"{result.shared_memory} bytes of shared memory, more than {limit}")
    return found


def differences(result: Compiled, kept: dict[str, Any] | None) -> list[str]:
    """Where the figures are not those of the table."""
    if kept is None:
        return ["not in the table: run with --update"]
    now = figures(result)
    return [
        f"{key} {kept.get(key)} in the table, {now[key]} now"
        for key in now
        if kept.get(key) != now[key]
    ]


def figures(result: Compiled) -> dict[str, int]:
    """The result as the table keeps it: without the spills in loops where there are no spills."""
    return {k: v for k, v in asdict(result).items() if k != "loop_spills" or result.spills}


def table_path(folder: Path, target: str) -> Path:
    """Where an operation's table is kept."""
    return folder / f"compiled_{target}.json"


def read_table(folder: Path, target: str) -> dict[str, Any]:
    """An operation's table; empty where none was written."""
    path = table_path(folder, target)
    if not path.exists():
        return {"triton": None, "kernels": {}}
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def write_table(
    folder: Path,
    target: str,
    version: str,
    results: dict[str, tuple[CompileCase, Compiled]],
    shipped: Iterable[str],
) -> None:
    """Put the results into the table and drop what is no longer shipped."""
    kernels = read_table(folder, target)["kernels"]
    for name, (case, result) in results.items():
        kernels[name] = figures(result)
        if result.spills:
            kernels[name]["spills_because"] = case.spills_because
    names = set(shipped)
    table = {"triton": version, "kernels": {n: kernels[n] for n in sorted(kernels) if n in names}}
    path = table_path(folder, target)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(table, indent=1) + "\n")
    beside.replace(path)


def _line(name: str, result: Compiled, seconds: float, notes: list[str]) -> str:
    tile = f"w{result.num_warps} s{result.num_stages}"
    spills = f"{result.spills}/{result.loop_spills}" if result.spills else "0"
    columns = (
        f"{result.registers:>5} {spills:>9} {result.shared_memory:>8}"
        f" {result.tensor_core_instructions:>5} {tile:>7} {seconds:>6.1f}"
    )
    return f"{name:<52} {columns}" + "".join(f"\n    {note}" for note in notes)


def check_operation(operation: str, folder: Path, arguments: argparse.Namespace) -> bool:
    """Compile an operation's cases; True if all may be shipped."""
    import triton

    target = arguments.target
    table = read_table(folder, target)
    comparable = table["triton"] == triton.__version__
    fine, results = True, {}
    cases = cases_of(operation)
    for case in cases:
        name = f"{operation}/{case.name}"
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        start = time.monotonic()
        result = compile_case(case, target)
        notes = faults(case, result, target)
        fine = fine and not notes
        if not arguments.update:
            changed = differences(result, table["kernels"].get(case.name))
            fine = fine and not (comparable and changed)
            notes += changed
        results[case.name] = (case, result)
        sys.stdout.write(_line(name, result, time.monotonic() - start, notes) + "\n")
        sys.stdout.flush()
    if results and not comparable and not arguments.update:
        sys.stdout.write(
            f"{operation}: the table is of Triton {table['triton']}, this is"
            f" {triton.__version__}: differences are shown and pass\n"
        )
    if arguments.update and results:
        write_table(folder, target, triton.__version__, results, [c.name for c in cases])
    arguments.compiled += len(results)
    return fine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="sm_90", choices=sorted(CAPABILITY))
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", help="compile the cases whose name contains a NAME"
    )
    parser.add_argument("--update", action="store_true", help="write the tables")
    parser.set_defaults(compiled=0)
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.stderr.write("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing\n")
        return 2
    try:
        import triton  # noqa: F401
    except ImportError:
        sys.stderr.write("Triton is not installed: pip install 'triton>=3.6,<3.10'\n")
        return 2
    columns = f"{'regs':>5} {'spills':>9} {'shared B':>8} {'MMA':>5} {'tile':>7} {'s':>6}"
    sys.stdout.write(f"{'kernel':<52} {columns}\n")
    fine = True
    for operation, folder in operations().items():
        fine = check_operation(operation, folder, arguments) and fine
    if not arguments.compiled:
        sys.stderr.write(f"No kernel is called {' or '.join(arguments.only)}\n")
        return 2
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
