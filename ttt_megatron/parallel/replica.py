"""The learner as megatron-core sees it: a module with a Transformer configuration, in its DDP."""

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from ttt_megatron.config.schema import ModelConfig, ParallelConfig
from ttt_megatron.model.slots import Slots
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.parallel.tensor_layers import tensor_parallel_slots


class Replica(MegatronModule):
    """A data-parallel copy of the learner, or this rank's part of one; calls go through to it."""

    def __init__(self, config: TransformerConfig, learner: nn.Module) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.learner = learner

    def set_input_tensor(self, input_tensor: Any) -> None:
        """The schedules hand over the previous pipeline stage's output; there is one stage."""

    def forward(self, *args: Any) -> Any:
        """The learner's forward."""
        return self.learner(*args)


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """What mcore's layers, DDP and schedules want to know of the model."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads or model.num_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        # A rank's gradient of these gains covers its own heads: finalize_model_grads sums them.
        qk_layernorm=True,
        # Layers are made on the CPU and left to the learner to fill.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Hooks accumulate into main_grad; the fused path needs CUDA kernels of its own.
        gradient_accumulation_fusion=False,
    )


def layer_slots(model: ModelConfig, parallel: ParallelConfig) -> Slots:
    """The layers for this rank of a run whose process groups stand, on the CPU.

    The model's vocabulary size must be known.
    """
    if parallel.tensor == 1:
        return Slots()
    assert model.vocab_size is not None
    return tensor_parallel_slots(transformer_config(model, parallel), model.vocab_size)


def replicate(
    learner: nn.Module,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    bucket_size: int | None = None,
) -> DistributedDataParallel:
    """Wraps a learner, already on its device, in mcore's DDP, ready for a distributed optimizer.

    Its parameters become views of one contiguous buffer; gradients arrive in `main_grad`, averaged
    over the data × context ranks. `bucket_size` (parameters a bucket; None is mcore's choice)
    matters only where communication overlaps computation.
    """
    config = transformer_config(model, parallel)
    replica = Replica(config, learner)
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        bucket_size=bucket_size,
        # Parameters are float32 (float64 in tests), so their gradients already have that dtype.
        grad_reduce_in_fp32=False,
    )
    with megatron_scope():
        ddp = DistributedDataParallel(config, ddp_config, replica)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = ddp.no_sync
    return ddp


def learner_of(ddp: DistributedDataParallel) -> Any:
    """The learner inside."""
    return ddp.module.learner


def wait_for_parameters(ddp: DistributedDataParallel) -> None:
    """Waits for parameter gathers still under way.

    mcore's own hooks wait as each submodule is called, which a functional call on detached weights
    does not trigger. Before a forward pass this makes sure of every parameter.
    """
    if ddp.ddp_config.overlap_param_gather:
        # Each group sends off the one before it: the last holds the parameters used first.
        for group in reversed(ddp.bucket_groups):
            group.finish_param_sync()


def settle_parameters(ddp: DistributedDataParallel) -> None:
    """Makes every rank's parameters current before a checkpoint or an evaluation reads them."""
    if ddp.ddp_config.overlap_param_gather:
        ddp.start_param_sync(force_sync=True)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The one dtype of a module's parameters."""
    return next(module.parameters()).dtype
