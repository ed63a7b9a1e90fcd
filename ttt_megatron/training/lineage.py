"""The stages that led to a run's weights."""

from collections.abc import Sequence
from pathlib import Path

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import read_info, resolve_checkpoint


def lineage_of_start(config: RunConfig) -> Sequence[Sequence[str]]:
    """(key, name) of the run whose weights a run starts from, and of those before it; the first
    stage first. Empty without such a run, or where it was not tracked."""
    if config.training.init_from is None:
        return ()
    try:
        return read_info(resolve_checkpoint(Path(config.training.init_from))).lineage
    except UserError:  # gone since: a run that goes on has no need of it
        return ()
