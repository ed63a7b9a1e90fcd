"""The learner as megatron-core sees it: modules with a Transformer configuration, in its DDP."""

from collections.abc import Sequence
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
from torch import Tensor, nn

from ttt_megatron.config.schema import ModelConfig, ParallelConfig
from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.meta.part import WHOLE, Part
from ttt_megatron.model.slots import Slots
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.parallel.tensor_layers import tensor_parallel_slots


class Replica(MegatronModule):
    """A data-parallel copy of the learner, or this rank's part of one; calls go through to it.

    Of a learner that is a pipeline stage, `number` tells it from others on the same rank.
    """

    def __init__(
        self, config: TransformerConfig, learner: nn.Module, number: int | None = None
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.learner = learner
        self.vp_stage = number
        self._stream: Tensor | None = None
        model: Any = getattr(learner, "model", None)
        self.pre_process = model is None or model.stage.is_first
        self.post_process = model is None or model.stage.is_last
        self.share_embeddings_and_output_weights = False
        if self.pre_process != self.post_process and model.config.tie_embeddings:
            self._share_embedding()

    def _share_embedding(self) -> None:
        """First and last stage hold a tied embedding each: their gradients are to be summed."""
        self.share_embeddings_and_output_weights = True
        weight: Any = self.shared_embedding_or_output_weight()
        # A bucket of its own, so that both stages spread its state over replicas the same way.
        weight.shared_embedding = True
        # The gradient's norm counts the first stage's alone.
        weight.shared = not self.pre_process

    def shared_embedding_or_output_weight(self) -> nn.Parameter:
        """The embedding of a first or last stage."""
        learner: Any = self.learner
        weight: nn.Parameter = learner.model.embedding.weight
        return weight

    def set_input_tensor(self, input_tensor: Any) -> None:
        """What the schedule received from the previous pipeline stage, for the next forward."""
        self._stream = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, *args: Any) -> Any:
        """The learner's forward; of a stage but the last, the stream [b, T, H] that leaves it."""
        if self.pre_process and self.post_process:
            return self.learner(*args)
        return self._run_stage(*args)

    def _run_stage(
        self, tokens: Tensor, targets: Tensor, mask: Tensor, inner_lr: float, part: Part = WHOLE
    ) -> LearnerOutput | Tensor:
        """From the stream that was set, of as many elements in whatever shape."""
        learner: Any = self.learner
        stream, self._stream = self._stream, None
        if stream is not None:
            stream = stream.view(len(tokens), -1, learner.model.config.hidden_size)
        left: Tensor = learner.run_prefix(tokens, part, stream=stream)
        if not self.post_process:
            return left
        output: LearnerOutput = learner.run_suffix(left, targets, mask, inner_lr, part)
        return output


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype = torch.float32
) -> TransformerConfig:
    """What mcore's layers, DDP and schedules want to know of the model.

    dtype is that of the stream that goes from one pipeline stage to the next.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads or model.num_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        pipeline_dtype=dtype,
        # Batched, the interleaved schedule's messages get mixed up between two gloo processes.
        batch_p2p_comm=False,
        # A rank's gradient of these gains covers its own heads: finalize_model_grads sums them.
        qk_layernorm=model.qk_norm,
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
    learners: Sequence[nn.Module],
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    bucket_size: int | None = None,
) -> list[DistributedDataParallel]:
    """Wraps learners, already on their device, in mcore's DDP, ready for a distributed optimizer.

    They are this rank's pipeline stages, mostly one. Its parameters become views of one contiguous
    buffer; gradients arrive in `main_grad`, averaged over the data × context ranks. `bucket_size`
    (parameters a bucket; None is mcore's choice) matters only where communication overlaps
    computation.
    """
    dtype = getattr(learners[0], "compute_dtype", torch.float32)
    config = transformer_config(model, parallel, dtype)
    several = len(learners) > 1
    replicas = [
        Replica(config, learner, number if several else None)
        for number, learner in enumerate(learners)
    ]
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        bucket_size=bucket_size,
        # Parameters are float32 (float64 in tests), so their gradients already have that dtype.
        grad_reduce_in_fp32=False,
    )
    with megatron_scope():
        chunks = [
            DistributedDataParallel(config, ddp_config, replica, disable_bucketing=number > 0)
            for number, replica in enumerate(replicas)
        ]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
    return chunks


def is_second_copy(parameter: nn.Parameter) -> bool:
    """Whether another pipeline stage holds this parameter too, and stands for it."""
    return bool(getattr(parameter, "shared", False))


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
