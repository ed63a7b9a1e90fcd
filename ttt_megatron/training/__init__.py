"""Optimizer, trainer, checkpoints and callbacks."""

from ttt_megatron.parallel.jit_fuser import compile_late

# Whichever of these modules is imported first may be the one that imports megatron-core.
compile_late()
