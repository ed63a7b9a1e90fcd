"""The same run on another number of processes."""

import math
from dataclasses import replace

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.errors import UserError


def fit_to_world(config: RunConfig, world_size: int) -> RunConfig:
    """The run with as many replicas as `world_size` processes make.

    The global batch stays, and with it what is learnt; micro-batches become smaller where the
    share of a replica is no multiple of them.

    Raises UserError if the processes make no whole number of replicas, or these cannot share the
    batch evenly.
    """
    parallel, training = config.parallel, config.training
    own = parallel.world_size // parallel.data
    if world_size % own:
        raise UserError(
            f"torchrun started {world_size} processes, and a replica of the recipe's parallel "
            f"section takes {own}: start a multiple of that"
        )
    replicas = world_size // own
    if training.global_batch_size % replicas:
        raise UserError(
            f"torchrun started {world_size} processes, that is {replicas} replicas, which cannot "
            f"share training.global_batch_size={training.global_batch_size} evenly: start a "
            f"number that divides it"
        )
    micro = math.gcd(training.global_batch_size // replicas, training.micro_batch_size)
    fitted = replace(
        config,
        parallel=replace(parallel, data=replicas),
        training=replace(training, micro_batch_size=micro),
    )
    validate(fitted, f"the run on {world_size} processes")
    return fitted
