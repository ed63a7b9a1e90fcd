"""The stand-in for megatron-core's `jit` must be all of it, compile the same, and be in use."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttt_megatron.parallel import jit_fuser


def _python(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_it_has_the_names_of_what_it_replaces():
    [folder] = importlib.util.find_spec("megatron").submodule_search_locations
    source = (Path(folder) / "core" / "jit.py").read_text()
    original: dict[str, object] = {}
    exec(source, original)
    names = {name for name, value in original.items() if inspect.isfunction(value)}
    own = {name for name in vars(jit_fuser) if not name.startswith("_")}
    assert names - {"is_torch_min_version"} <= own
    assert original["jit_fuser"] is torch.compile
    assert "jit_fuser" in own


@pytest.mark.parametrize("package", ["parallel", "training"])
def test_it_is_in_place_before_any_module_imports_megatron_core(package):
    _python(
        f"import sys, ttt_megatron.{package}\n"
        "assert 'torch' not in sys.modules\n"
        "assert sys.modules['megatron.core.jit'].__name__ == 'ttt_megatron.parallel.jit_fuser'"
    )


def test_no_run_imports_the_compiler_to_start():
    _python(
        "import sys, ttt_megatron.training.run, megatron.core.fusions.fused_bias_swiglu as fused\n"
        "assert 'torch._inductor' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "from ttt_megatron.parallel.jit_fuser import jit_fuser\n"
        "assert fused.jit_fuser is jit_fuser"
    )


def test_a_function_is_compiled_by_its_first_call(monkeypatch):
    compiled = []

    def compiling(function):
        compiled.append(function)
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compiling)

    def twice(x):
        """Twice as much."""
        return 2 * x

    late = jit_fuser.jit_fuser(twice)
    assert late.__doc__ == "Twice as much."
    assert compiled == []
    assert [late(3), late(4)] == [7, 9]
    assert compiled == [twice]


def test_compiling_can_be_turned_off():
    def function():
        pass

    try:
        jit_fuser.disable_jit_fuser()
        assert jit_fuser.jit_fuser(function) is function
    finally:
        jit_fuser.enable_jit_fuser()
    assert jit_fuser.jit_fuser(function) is not function
