"""Processes, process groups and megatron-core's wrappers around the learner."""

import warnings

from ttt_megatron.parallel.jit_fuser import compile_late

# Said on every machine without TransformerEngine, for every process, about choices mcore makes
# by itself; none asks the user for anything.
for _message in (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.*` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)

compile_late()
