"""Makes Triton's interpreter quick enough to visit several tiles in a test."""

import os

import pytest

_patched = set()


@pytest.fixture(autouse=True)
def _patch_triton_once(monkeypatch):
    """A third of the interpreter's time goes into patching `triton.language` at every call.

    The launch of a kernel has patched it already when one of the kernel's functions is called;
    what Triton's own functions need besides is never undone, so once is enough.
    """
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def call(self, *arguments, **constants):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(module)
        return self.rewrite()(*arguments, **constants)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
