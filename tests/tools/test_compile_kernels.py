"""The gate that compiles kernels without a GPU, and the tables it holds them to."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import compile_kernels
from compile_kernels import Compiled, differences, faults, innermost_loops

from ttt_kernels.swa_attention.compile_cases import OUTSIDE_LOOPS

TARGET = "sm_90"
OPERATIONS = compile_kernels.operations()


def kept(operation, name):
    """The table's entry of a case, and the same as a result of compiling it."""
    entry = compile_kernels.read_table(OPERATIONS[operation], TARGET)["kernels"][name]
    figures = {k: v for k, v in entry.items() if k != "spills_because"}
    return entry, Compiled(**{"loop_spills": 0, **figures})


def case_of(operation, name):
    return next(c for c in compile_kernels.cases_of(operation) if c.name == name)


def test_kernels_compile_to_what_the_table_says():
    tensor_cores = {
        "linear_cross_entropy/pair_gradient": False,
        "swa_attention/forward/sequence/d64": True,
        "swa_attention/dq/sequence/d64": True,
    }
    done = subprocess.run(
        [sys.executable, compile_kernels.__file__, "--only", *tensor_cores],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [x for x in done.stdout.splitlines()[1:] if x.startswith(tuple(tensor_cores))]
    assert {x.split()[0]: int(x.split()[4]) > 0 for x in lines} == tensor_cores
    # Another Triton than the table's may differ, and says so.
    assert len(lines) == done.stdout.count("\n") - 1 or "differences are shown" in done.stdout


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tables_hold_every_shipped_kernel_and_no_other(operation):
    table = compile_kernels.read_table(OPERATIONS[operation], TARGET)["kernels"]
    cases = {c.name: c for c in compile_kernels.cases_of(operation)}
    assert set(table) == set(cases)
    for name, case in cases.items():
        entry, result = kept(operation, name)
        assert faults(case, result, TARGET) == []
        assert differences(result, entry) == []
        assert entry.get("spills_because", "") == (case.spills_because if result.spills else "")
        if case.spills_because == OUTSIDE_LOOPS:
            assert result.loop_spills == 0


def test_what_keeps_a_kernel_from_being_shipped():
    name = "pair_dq/full/d128"
    case, (_, result) = case_of("swa_attention", name), kept("swa_attention", name)
    assert result.spills > 0
    assert faults(replace(case, spills_because=""), result, TARGET) == [
        f"{result.spills} spilling instructions and no reason given"
    ]
    single = case_of("swa_attention", "dkv/fp32/d64"), kept("swa_attention", "dkv/fp32/d64")[1]
    assert faults(replace(single[0], tensor_cores=True), single[1], TARGET) == [
        "no HGMMA: products miss the tensor cores"
    ]
    limit = compile_kernels.SHARED_MEMORY_LIMIT[TARGET]
    assert faults(case, replace(result, shared_memory=limit), TARGET) == []
    assert faults(case, replace(result, shared_memory=limit + 1), TARGET) == [
        f"{limit + 1} bytes of shared memory, more than {limit}"
    ]


def test_differences_from_the_table():
    entry, result = kept("swa_attention", "pair_dq/full/d128")
    assert differences(result, None) == ["not in the table: run with --update"]
    assert differences(replace(result, registers=200, loop_spills=7), entry) == [
        f"registers {result.registers} in the table, 200 now",
        f"loop_spills {result.loop_spills} in the table, 7 now",
    ]


def test_a_table_keeps_what_was_not_compiled_and_drops_what_is_not_shipped(tmp_path):
    cases = {n: case_of("swa_attention", n) for n in ("dq/chunk/d64", "pair_dq/full/d128")}
    results = {n: (cases[n], kept("swa_attention", n)[1]) for n in cases}
    compile_kernels.write_table(tmp_path, TARGET, "3.9.0", results, cases)
    first = json.loads((tmp_path / "compiled_sm_90.json").read_text())
    assert first == compile_kernels.read_table(tmp_path, TARGET)
    assert first["kernels"]["pair_dq/full/d128"] == kept("swa_attention", "pair_dq/full/d128")[0]
    name = "dq/chunk/d64"
    moved = {name: (cases[name], replace(results[name][1], registers=99))}
    compile_kernels.write_table(tmp_path, TARGET, "3.9.0", moved, cases)
    second = compile_kernels.read_table(tmp_path, TARGET)["kernels"]
    assert second[name]["registers"] == 99
    assert second["pair_dq/full/d128"] == first["kernels"]["pair_dq/full/d128"]
    compile_kernels.write_table(tmp_path, TARGET, "3.9.0", moved, [name])
    assert set(compile_kernels.read_table(tmp_path, TARGET)["kernels"]) == {name}


CODE = """
        /*0000*/                   STL [R1], R2 ;
.L_x_1:
        /*0010*/                   LDL R3, [R1] ;
.L_x_2:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   LDL R4, [R1+0x4] ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/                   STL.64 [R1+0x8], R6 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/              @!P0 BRA `(.L_x_4) ;
        /*00a0*/                   BRA `(.L_x_3) ;
"""


def test_spills_in_innermost_loops_alone_count_as_such():
    lines = CODE.splitlines()
    loops = innermost_loops(lines)
    assert len(loops) == 1
    assert compile_kernels.count(loops[0], "LDL", "STL") == 1
    assert compile_kernels.count(loops[0], "HGMMA") == 1
    assert compile_kernels.count(lines, "LDL", "STL") == 4


def test_arguments_and_surroundings_that_compile_nothing(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compile_kernels.main(["--only", "no such kernel", "nor this"]) == 2
    assert capsys.readouterr().err == "No kernel is called no such kernel or nor this\n"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_kernels.main([]) == 2
    assert "unset it" in capsys.readouterr().err
