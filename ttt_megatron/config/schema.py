"""Every setting of a run, as frozen dataclasses. Knows no torch.

The sentence in a field's metadata feeds `--help` and the configuration reference.
"""

from dataclasses import dataclass, field
from typing import Literal

from ttt_megatron.config.faults import FaultsConfig
from ttt_megatron.config.mixers import GatedDeltaConfig, Mamba2Config, TTTKVBConfig
from ttt_megatron.config.setting import setting

InnerMode = Literal["meta", "first_order", "naive", "off"]
MemoryPolicy = Literal["recompute", "save_activations", "save_all"]
ContextOrder = Literal["1f1b", "zigzag"]
FusedAdam = Literal["auto", "torch", "apex", "transformer_engine"]
MixerKernels = Literal["auto", "flash-linear-attention", "plain"]
FusedNorm = Literal["auto", "ttt_kernels", "apex", "transformer_engine"]
Precision = Literal["fp32", "bf16", "fp64", "fp8"]
Float8Backend = Literal["torch", "transformer_engine", "auto"]
Float8Recipe = Literal["current", "delayed"]
Float8Scaling = Literal["tensor", "row"]


ATTENTION_MIXERS = ("attention", "full")
"""Mixers that are softmax attention; they differ in their window."""
MIXERS = (*ATTENTION_MIXERS, "mamba2", "gated_delta", "ttt_kvb", "swa_ttt_kvb")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and initialisation of the network."""

    vocab_size: int | None = setting(
        None, "Rows of the embedding; None takes the prepared data's tokenizer."
    )
    num_layers: int = setting(12, "Blocks in all.")
    num_suffix_layers: int = setting(
        3, "Last blocks that hold a prime MLP; 0 is a plain transformer."
    )
    hidden_size: int = setting(768, "Width of the residual stream.")
    num_heads: int = setting(12, "Query heads.")
    num_kv_heads: int | None = setting(
        None, "Key and value heads (grouped-query attention); None equals num_heads."
    )
    ffn_hidden_size: int = setting(1664, "Width of the static SwiGLU MLP.")
    prime_ffn_hidden_size: int | None = setting(
        None,
        "Width of the prime MLP, whose weights are the fast weights; None equals ffn_hidden_size.",
    )
    window_size: int | None = setting(
        8192, "Keys a query sees, itself included; None is full attention."
    )
    mixers: str = setting(
        "attention",
        "What mixes tokens, block by block and from the start again: attention (over "
        "window_size), full (attention over everything), mamba2, gated_delta, ttt_kvb, "
        "swa_ttt_kvb (attention, then ttt_kvb); with commas between, as in attention,full.",
    )
    rope_theta: float = setting(500_000.0, "Base of the rotary frequencies.")
    norm_eps: float = setting(1e-6, "Epsilon inside the root of RMSNorm.")
    post_norm: bool = setting(
        True,
        "Normalise what attention and static MLP add to the stream; false for weights of models "
        "that do not, such as Llama's (the prime MLP keeps its norm).",
    )
    qk_norm: bool = setting(
        True, "Normalise queries and keys per head; false for weights of models that do not."
    )
    tie_embeddings: bool = setting(True, "Use the embedding as the output head.")
    init_std: float = setting(0.02, "Standard deviation of the matrices at initialisation.")
    embedding_init_std: float | None = setting(None, "The embedding's; None equals init_std.")
    prime_init_std: float | None = setting(None, "The prime MLPs'; None equals init_std.")
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    gated_delta: GatedDeltaConfig = field(default_factory=GatedDeltaConfig)
    ttt_kvb: TTTKVBConfig = field(default_factory=TTTKVBConfig)

    @property
    def mixer_kinds(self) -> list[str]:
        """What mixes tokens in each block, first to last."""
        pattern = [kind.strip() for kind in self.mixers.split(",")]
        return [pattern[index % len(pattern)] for index in range(self.num_layers)]


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """The inner loop: one clipped SGD step on the fast weights after every chunk."""

    mode: InnerMode = setting(
        "meta",
        "meta: train through the inner steps; first_order: the same, inner gradients held "
        "constant; naive: train without inner steps, evaluate with them; off: no inner steps "
        "anywhere.",
    )
    chunk_size: int = setting(1024, "Tokens read between two inner steps.")
    lr: float = setting(1.0, "Inner learning rate, fully warmed.")
    clip: float = setting(1.0, "L2 norm the inner gradient is clipped to, per sequence; 0 is off.")
    lr_start: float = setting(1.0, "Inner learning rate before its warm-up.")
    lr_warmup_fraction: float = setting(
        0.0,
        "Share of the outer steps over which the inner learning rate rises from lr_start to lr.",
    )
    memory_policy: MemoryPolicy = setting(
        "recompute",
        "What the forward sweep keeps for the reverse sweep: nothing, activations, "
        "or those and their adjoints.",
    )
    two_level: bool = setting(
        False, "Keep fast weights at segment starts only and rerun the forward sweep per segment."
    )
    segment_chunks: int | None = setting(
        None, "Chunks a segment with two_level; None is the square root of the chunk count."
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut into sequences."""

    path: str = setting("", "Folder written by `ttt-megatron prepare`.")
    sequence_length: int = setting(8192, "Tokens a sequence.")
    packing: Literal["concatenate", "spans"] = setting(
        "concatenate",
        "concatenate: documents one after the other, cut anywhere, the cuts shuffled; spans: "
        "sequences within one document, from documents long enough to hold one.",
    )
    seed: int = setting(0, "Seed of the shuffle.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Outer AdamW and its schedule."""

    lr: float = setting(3e-3, "Peak learning rate.")
    end_lr: float = setting(1e-5, "Learning rate at the end of the cosine.")
    warmup_fraction: float = setting(0.1, "Share of the steps over which the rate rises from 0.")
    beta1: float = setting(0.9, "Decay of Adam's first moment.")
    beta2: float = setting(0.95, "Decay of Adam's second moment.")
    eps: float = setting(1e-8, "Adam's epsilon, outside the root.")
    weight_decay: float = setting(0.1, "Decoupled weight decay, times the learning rate.")
    decay: Literal["all", "matrices"] = setting(
        "all", "Parameters that decay; A_log, dt_bias and D of Mamba 2 and Gated DeltaNet never do."
    )
    clip_grad: float = setting(1.0, "Global norm the outer gradient is clipped to; 0 is off.")
    fused: FusedAdam = setting(
        "auto",
        "Whose AdamW updates: NVIDIA Apex's or TransformerEngine's, where a build has it, or "
        "torch's; auto takes the first to be had of TransformerEngine, Apex, torch. A run says "
        "which.",
    )
    engine: Literal["megatron", "deepspeed"] = setting(
        "megatron",
        "What reduces gradients and shares out the optimizer's state: megatron-core, in every "
        "layout, or DeepSpeed, where all processes are data-parallel.",
    )
    zero_stage: int = setting(
        1,
        "What data-parallel processes share out: 1 the optimizer's state, 2 (DeepSpeed) gradients "
        "as well.",
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes share the work, and how."""

    data: int = setting(1, "Data-parallel processes.")
    tensor: int = setting(
        1, "Tensor-parallel processes: each holds a part of every matrix, fast weights included."
    )
    sequence_parallel: bool = setting(
        False, "Tensor-parallel processes also share out the tokens between the matrices."
    )
    context: int = setting(
        1, "Context-parallel processes: each holds a contiguous part of every sequence."
    )
    context_order: ContextOrder = setting(
        "1f1b",
        "Order of the passes under context parallelism. 1f1b: one part a process, forwards and "
        "backwards in turn; zigzag: two parts a process, what others wait for first.",
    )
    pipeline: int = setting(
        1,
        "Pipeline-parallel processes: each holds consecutive blocks, the last one the suffix.",
    )
    virtual_pipeline: int = setting(
        1,
        "Stages each pipeline process holds and takes in turn (interleaved 1F1B), for shorter "
        "waits at more transfers.",
    )
    elastic: bool = setting(
        False,
        "Under torchrun: as many data-parallel processes as its number gives, whatever "
        "parallel.data says, and a smaller micro-batch where that is needed to share the batch.",
    )
    overlap_grad_reduce: bool = setting(
        False, "Reduce gradients while the backward pass still runs."
    )
    overlap_param_gather: bool = setting(
        False, "Gather updated parameters while the next forward pass runs."
    )
    timeout_minutes: float = setting(
        30.0,
        "Longest wait of a process for the others, after which the run ends and names those it "
        "waited for.",
    )

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.context * self.pipeline * self.data


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The outer loop."""

    steps: int = setting(1000, "Outer steps.")
    global_batch_size: int = setting(8, "Sequences a step, over all processes.")
    micro_batch_size: int = setting(8, "Sequences a process holds at once.")
    precision: Precision = setting(
        "fp32",
        "Compute dtype; parameters and fast weights are float32 (fp64: everything float64). fp8: "
        "static linear maps in float8, the rest in fp8.compute.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where to compute.")
    seed: int = setting(1, "Seed of the initialisation.")
    fused_norm: FusedNorm = setting(
        "auto",
        "Whose RMSNorm the prefix uses: NVIDIA Apex's or TransformerEngine's, where a build has "
        "it, or ttt_kernels'; auto takes the first to be had of TransformerEngine, Apex, "
        "ttt_kernels. A run says which.",
    )
    mixer_kernels: MixerKernels = setting(
        "auto",
        "Whose kernels run the recurrences of Mamba 2 and Gated DeltaNet: flash-linear-attention's "
        "(CUDA) or plain PyTorch; auto takes the former where a trial finds them right. A run says "
        "which.",
    )
    recompute_prefix: bool = setting(False, "Recompute prefix blocks in the backward pass.")
    init_from: str | None = setting(
        None, "Checkpoint or run folder whose weights start this run, with a fresh schedule."
    )
    output: str = setting("runs/default", "Folder of checkpoints, plots and logs.")
    save_interval: int = setting(500, "Steps between checkpoints; the last step is always saved.")
    keep_last: int = setting(2, "Checkpoints kept, the newest first.")
    async_save: bool = setting(False, "Go on training while a checkpoint's files are written.")
    milestone_interval: int = setting(
        0, "Checkpoints at multiples of this stay for good; 0 is none."
    )
    log_interval: int = setting(10, "Steps between log lines.")
    eval_interval: int = setting(0, "Steps between evaluations; 0 evaluates at the end only.")
    eval_sequences: int = setting(
        16, "Validation sequences an evaluation during training reads; 0 is none."
    )
    cuda_graphs: bool = setting(
        False,
        "Replay the passes over a chunk as CUDA graphs, one a shape: no launches to wait for, at "
        "the memory of one more set of fast weights, gradients and cached keys.",
    )
    trace: bool = setting(
        False, "Write a Chrome/Perfetto trace of every process into trace/ of the output folder."
    )


@dataclass(frozen=True, kw_only=True)
class Float8Config:
    """Static linear maps in float8, with training.precision = fp8."""

    backend: Float8Backend = setting(
        "torch",
        "What multiplies: torch's own scaled products, TransformerEngine's layers, or (auto) the "
        "latter where they can be had.",
    )
    recipe: Float8Recipe = setting(
        "current",
        "Where scales come from. current: the tensor at hand; delayed: the largest values of past "
        "steps.",
    )
    scaling: Float8Scaling = setting(
        "tensor", "One scale a tensor, or one a row (token or output feature)."
    )
    history: int = setting(16, "Steps whose largest values make a delayed scale.")
    compute: Literal["bf16", "fp32"] = setting("bf16", "Compute dtype of everything else.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run is followed."""

    mlflow: bool = setting(True, "Log to MLflow.")
    tracking_uri: str | None = setting(
        None, "MLflow store; None takes MLFLOW_TRACKING_URI, else SQLite beside the run's folder."
    )
    offline: bool = setting(
        False, "Only keep the journal; `ttt-megatron upload` sends it to MLflow later."
    )
    experiment: str = setting("ttt-megatron", "MLflow experiment.")
    parent_run: str | None = setting(
        None, "Id of the MLflow run that this one is shown under; sweeps set it."
    )
    progress: bool = setting(True, "Show a progress bar.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: what a recipe describes."""

    name: str = setting("run", "Name of the run.")
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fp8: Float8Config = field(default_factory=Float8Config)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
