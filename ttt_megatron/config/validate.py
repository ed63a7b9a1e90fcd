"""What no run can have: each impossible value is refused in one sentence before anything starts."""

from collections.abc import Iterator
from dataclasses import fields

from ttt_megatron.config.addresses import without_secrets
from ttt_megatron.config.faults import fault_problems
from ttt_megatron.config.mixer_rules import mixer_problems
from ttt_megatron.config.schema import (
    Float8Config,
    InnerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
)
from ttt_megatron.errors import UserError

_POSITIVE = (
    "model.vocab_size",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.ffn_hidden_size",
    "model.prime_ffn_hidden_size",
    "model.window_size",
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "model.embedding_init_std",
    "model.prime_init_std",
    "model.mamba2.head_dim",
    "model.mamba2.state_size",
    "model.mamba2.expand",
    "model.mamba2.conv_kernel",
    "model.gated_delta.expand_v",
    "model.gated_delta.conv_kernel",
    "model.ttt_kvb.chunk_size",
    "model.ttt_kvb.num_heads",
    "model.ttt_kvb.expansion",
    "model.ttt_kvb.rate",
    "inner.chunk_size",
    "inner.lr",
    "inner.segment_chunks",
    "data.sequence_length",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.zero_stage",
    "fp8.history",
    "parallel.data",
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.timeout_minutes",
    "training.steps",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.save_interval",
    "training.keep_last",
    "training.log_interval",
)
_NOT_NEGATIVE = (
    "model.num_suffix_layers",
    "model.ttt_kvb.clip",
    "inner.clip",
    "inner.lr_start",
    "data.seed",
    "optimizer.end_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "training.seed",
    "training.milestone_interval",
    "training.eval_interval",
    "training.eval_sequences",
)
_FRACTIONS = ("inner.lr_warmup_fraction", "optimizer.warmup_fraction")
_NOT_EMPTY = ("name", "training.output", "training.init_from", "tracking.experiment")


def validate(config: RunConfig, source: str = "configuration") -> None:
    """Raises UserError at the first impossible value, naming `source`, the keys and the values."""
    for problem in _problems(config):
        raise UserError(f"{source}: {problem}.")


def _problems(config: RunConfig) -> Iterator[str]:
    # Ranges come first: the relations below divide by sizes.
    yield from _ranges(config)
    yield from _model(config.model)
    yield from mixer_problems(config)
    yield from _inner(config.inner, config.model, config.data.sequence_length)
    yield from _optimizer(config.optimizer)
    yield from _engine(config)
    yield from _fused(config)
    yield from _graphs(config)
    yield from _batch(config.training, config.parallel.data)
    yield from _tensor(config.parallel, config.model, config.inner.chunk_size)
    yield from _context(config)
    yield from _pipeline(config)
    yield from _float8(config)
    yield from _tracking(config.tracking)
    yield from fault_problems(config.faults)
    if config.parallel.overlap_param_gather and not config.parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather = true needs parallel.overlap_grad_reduce = true; "
            "set both or neither"
        )


def _tracking(tracking: TrackingConfig) -> Iterator[str]:
    uri = tracking.tracking_uri
    if uri is not None and without_secrets(uri) != uri:
        yield (
            "tracking.tracking_uri holds a user name, password or token, and recipes are kept with "
            "every run: give the address alone, and who logs in by MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; or all in MLFLOW_TRACKING_URI"
        )


def _value(config: RunConfig, name: str) -> float | str | None:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    assert value is None or isinstance(value, float | int | str)
    return value


def _ranges(config: RunConfig) -> Iterator[str]:
    def numbers(names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
        for name in names:
            value = _value(config, name)
            if value is not None:
                assert not isinstance(value, str)
                yield name, value

    for name, value in numbers(_POSITIVE):
        if value <= 0:
            hint = "; to run without inner steps set inner.mode=off" if name == "inner.lr" else ""
            yield f"{name} = {value} must be greater than 0{hint}"
    for name, value in numbers(_NOT_NEGATIVE):
        if value < 0:
            yield f"{name} = {value} must not be negative"
    for name, value in numbers(_FRACTIONS):
        if not 0 <= value <= 1:
            yield f"{name} = {value} is a share of the steps and must lie between 0 and 1"
    for name in _NOT_EMPTY:
        if _value(config, name) == "":
            yield f"{name} is empty; give it a value"


def _model(model: ModelConfig) -> Iterator[str]:
    width, heads, kv_heads = model.hidden_size, model.num_heads, model.num_kv_heads
    if width % heads:
        yield (
            f"model.num_heads = {heads} does not divide model.hidden_size = {width}; "
            "choose a number of heads that does"
        )
    elif (width // heads) % 2:
        yield (
            f"model.hidden_size = {width} over model.num_heads = {heads} gives heads of the odd "
            f"width {width // heads}, and rotary embedding turns pairs; choose an even width a head"
        )
    if kv_heads is not None and heads % kv_heads:
        yield (
            f"model.num_kv_heads = {kv_heads} does not divide model.num_heads = {heads}; "
            "choose a divisor, or null for as many as query heads"
        )
    if model.num_suffix_layers > model.num_layers:
        yield (
            f"model.num_suffix_layers = {model.num_suffix_layers} is more than "
            f"model.num_layers = {model.num_layers}; the suffix is part of the model, shorten it"
        )


def _inner(inner: InnerConfig, model: ModelConfig, sequence_length: int) -> Iterator[str]:
    chunk = inner.chunk_size
    if sequence_length % chunk:
        yield (
            f"inner.chunk_size = {chunk} does not divide data.sequence_length = {sequence_length}; "
            "the loss is a mean over whole chunks, choose a divisor"
        )
    if inner.mode != "off":
        if model.num_suffix_layers == 0:
            yield (
                f"inner.mode = {inner.mode} needs prime MLPs, and model.num_suffix_layers = 0 "
                "gives none; set inner.mode=off or a suffix"
            )
        elif model.window_size is not None and model.window_size < chunk:
            yield (
                f"model.window_size = {model.window_size} is less than inner.chunk_size = {chunk}, "
                "so a chunk would not see itself whole before its inner step; widen the window "
                "or shorten the chunk"
            )
    if inner.segment_chunks is not None:
        chunks = sequence_length // chunk
        if not inner.two_level:
            yield (
                f"inner.segment_chunks = {inner.segment_chunks} has no effect without "
                "inner.two_level = true; set that, or leave segment_chunks out"
            )
        elif inner.segment_chunks > chunks:
            yield (
                f"inner.segment_chunks = {inner.segment_chunks} is more than the {chunks} chunks "
                f"of inner.chunk_size = {chunk} in data.sequence_length = {sequence_length}; "
                "choose fewer, or null for the square root"
            )


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if not 0 <= beta < 1:
            yield f"optimizer.{name} = {beta} must be at least 0 and less than 1"
    if optimizer.end_lr > optimizer.lr:
        yield (
            f"optimizer.end_lr = {optimizer.end_lr} is above optimizer.lr = {optimizer.lr}, and "
            "the cosine only falls; lower end_lr (equal values give a constant rate)"
        )
    if optimizer.warmup_fraction == 1:
        yield (
            "optimizer.warmup_fraction = 1.0 leaves no step for the cosine after the warm-up; "
            "choose less than 1"
        )


def _engine(config: RunConfig) -> Iterator[str]:
    """What the optimizer's engine cannot do."""
    engine, stage, parallel = config.optimizer.engine, config.optimizer.zero_stage, config.parallel
    if stage == 3:
        yield (
            "optimizer.zero_stage = 3 is not possible: the inner loop runs the model on detached "
            "weights, which the hooks that gather stage 3's parameters never see; choose 1 or 2"
        )
    elif stage > 3:
        yield f"optimizer.zero_stage = {stage} is no stage of ZeRO; choose 1 or 2"
    if engine == "megatron":
        if stage == 2:
            yield (
                "optimizer.zero_stage = 2 needs optimizer.engine = deepspeed, as megatron-core's "
                "distributed optimizer is stage 1; set that, or zero_stage = 1"
            )
        return
    for name in ("tensor", "context", "pipeline"):
        if (size := getattr(parallel, name)) > 1:
            yield (
                f"optimizer.engine = deepspeed is for data-parallel runs, and parallel.{name} = "
                f"{size}; set parallel.{name} = 1, or optimizer.engine = megatron"
            )
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name):
            yield (
                f"parallel.{name} = true tells megatron-core how to communicate, and "
                "optimizer.engine = deepspeed runs without it; leave it out, or set "
                "optimizer.engine = megatron"
            )
    if config.training.precision == "fp64":
        yield (
            "optimizer.engine = deepspeed updates parameters in float32, and training.precision = "
            "fp64 asks for float64; set training.precision = fp32, or optimizer.engine = megatron"
        )


def _fused(config: RunConfig) -> Iterator[str]:
    """Where Apex's and TransformerEngine's AdamW and RMSNorm cannot be asked for."""
    fused, training = config.optimizer.fused, config.training
    if training.fused_norm not in ("auto", "ttt_kernels"):
        asked = f"training.fused_norm = {training.fused_norm}"
        own = "set training.fused_norm = auto"
        if training.precision == "fp64":
            yield f"{asked} knows no float64, and training.precision = fp64; {own}"
        if training.device == "cpu":
            yield f"{asked} runs on CUDA alone, and training.device = cpu; {own}"
    if fused in ("auto", "torch"):
        return
    if config.optimizer.engine == "deepspeed":
        yield (
            f"optimizer.fused = {fused} needs optimizer.engine = megatron, as DeepSpeed is given "
            "torch's AdamW; set that, or optimizer.fused = auto"
        )
    if training.precision == "fp64":
        yield (
            f"optimizer.fused = {fused} knows no float64, and training.precision = fp64; set "
            "optimizer.fused = auto"
        )
    if training.device == "cpu":
        yield (
            f"optimizer.fused = {fused} runs on CUDA alone, and training.device = cpu; set "
            "optimizer.fused = auto"
        )


def _graphs(config: RunConfig) -> Iterator[str]:
    """What passes over chunks cannot be captured as CUDA graphs."""
    if not config.training.cuda_graphs:
        return
    asked = "training.cuda_graphs = true captures the passes of inner steps on CUDA"
    parallel, off = config.parallel, "leave cuda_graphs out"
    if config.training.device == "cpu":
        yield f"{asked}, and training.device = cpu; set device=cuda, or {off}"
    if config.inner.mode not in ("meta", "first_order"):
        yield f"{asked}, and inner.mode = {config.inner.mode} trains without them; {off}"
    if parallel.tensor > 1:
        yield (
            f"{asked}, and with parallel.tensor = {parallel.tensor} they communicate, which is "
            f"not captured; set parallel.tensor=1, or {off}"
        )
    if parallel.context_order == "zigzag":
        yield (
            f"{asked}, and parallel.context_order = zigzag has the host queue weights' gradients "
            f"within them; set context_order=1f1b, or {off}"
        )


def _batch(training: TrainingConfig, data_parallel: int) -> Iterator[str]:
    held = training.micro_batch_size * data_parallel
    if training.global_batch_size % held:
        yield (
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size = {training.micro_batch_size} times "
            f"parallel.data = {data_parallel}, that is {held}; change one of the three"
        )


def _tensor(parallel: ParallelConfig, model: ModelConfig, chunk_size: int) -> Iterator[str]:
    """What does not divide among tensor-parallel processes; the vocabulary may not be known yet."""
    parts = parallel.tensor
    kv_heads = "num_heads" if model.num_kv_heads is None else "num_kv_heads"
    widths = ["num_heads", kv_heads, "ffn_hidden_size"]
    if model.num_suffix_layers and model.prime_ffn_hidden_size is not None:
        widths.append("prime_ffn_hidden_size")
    for name in widths:
        if getattr(model, name) % parts:
            yield (
                f"parallel.tensor = {parts} does not divide model.{name} = "
                f"{getattr(model, name)}; choose a number of processes that does"
            )
    if not parallel.sequence_parallel:
        return
    if parts == 1:
        yield (
            "parallel.sequence_parallel = true shares tokens among tensor-parallel processes, and "
            "parallel.tensor = 1 gives one; set parallel.tensor, or leave sequence_parallel out"
        )
    elif chunk_size % parts:
        # Whole chunks make a sequence, so its length divides as well.
        yield (
            f"parallel.tensor = {parts} does not divide inner.chunk_size = {chunk_size}, whose "
            "tokens parallel.sequence_parallel = true shares out; change one of them"
        )


def _context(config: RunConfig) -> Iterator[str]:
    """What does not make equally many whole chunks for every context-parallel process."""
    size, chunk = config.parallel.context, config.inner.chunk_size
    length, zigzag = config.data.sequence_length, config.parallel.context_order == "zigzag"
    if zigzag and size == 1:
        yield (
            "parallel.context_order = zigzag orders the parts of sequences, and "
            "parallel.context = 1 makes none; set parallel.context, or leave context_order out"
        )
    if zigzag and config.parallel.pipeline > 1:
        yield (
            f"parallel.context_order = zigzag takes whole models, and parallel.pipeline = "
            f"{config.parallel.pipeline} cuts them; set context_order=1f1b, or pipeline=1"
        )
    parts = 2 * size if zigzag else size
    # A chunk that does not divide the length is told of already.
    if length % chunk == 0 and length % (parts * chunk):
        twice = ", twice for context_order = zigzag," if zigzag else ""
        yield (
            f"parallel.context = {size}{twice} does not divide the {length // chunk} chunks of "
            f"inner.chunk_size = {chunk} in data.sequence_length = {length}; "
            "choose a number of processes that does, or another length"
        )


def _pipeline(config: RunConfig) -> Iterator[str]:
    """What does not make a pipeline: too few blocks for its stages, or too few micro-batches."""
    parallel, model, training = config.parallel, config.model, config.training
    turns, size = parallel.virtual_pipeline, parallel.pipeline
    if size == 1:
        if turns > 1:
            yield (
                f"parallel.virtual_pipeline = {turns} needs pipeline-parallel processes, and "
                "parallel.pipeline = 1 is one; set parallel.pipeline, or leave "
                "virtual_pipeline out"
            )
        return
    prefix = model.num_layers - model.num_suffix_layers
    if prefix < turns * size - 1:
        stages = f"parallel.pipeline = {size}"
        stages += f" times parallel.virtual_pipeline = {turns}" if turns > 1 else ""
        yield (
            f"{stages} makes more stages than the {prefix} blocks before the suffix "
            "can fill: all stages but the last, which holds the suffix, need a block"
        )
    if turns > 1:
        count = training.global_batch_size // (training.micro_batch_size * parallel.data)
        if count % size:
            yield (
                f"parallel.virtual_pipeline = {turns} takes micro-batches in groups of "
                f"parallel.pipeline = {size}, and {count} make a step of a replica; change "
                "training.global_batch_size or training.micro_batch_size"
            )


def _float8(config: RunConfig) -> Iterator[str]:
    """Settings of float8 that have no effect or exclude each other, and widths that do not fit."""
    fp8, model, default = config.fp8, config.model, Float8Config()
    if config.training.precision != "fp8":
        for field in fields(Float8Config):
            if (value := getattr(fp8, field.name)) != getattr(default, field.name):
                yield (
                    f"fp8.{field.name} = {value} has no effect with training.precision = "
                    f"{config.training.precision}; set training.precision = fp8, or leave it out"
                )
        return
    if fp8.recipe == "delayed" and fp8.scaling == "row":
        yield (
            "fp8.scaling = row gives every token a scale, and a token has no history for "
            "fp8.recipe = delayed; set fp8.recipe=current or fp8.scaling=tensor"
        )
    if fp8.recipe == "current" and fp8.history != default.history:
        yield (
            f"fp8.history = {fp8.history} has no effect with fp8.recipe = current; set "
            "fp8.recipe=delayed, or leave history out"
        )
    lack = transformer_engine_lacks(config)
    if fp8.backend == "transformer_engine" and lack is not None:
        yield f"fp8.backend = transformer_engine {lack}; set fp8.backend=torch"
    yield from float8_widths(model, config.parallel.tensor)


def transformer_engine_lacks(config: RunConfig) -> str | None:
    """Why TransformerEngine cannot multiply as a recipe asks, in one clause; None if it can."""
    if config.training.device == "cpu":
        return "runs on CUDA alone, and training.device = cpu"
    if config.fp8.scaling == "row":
        return "has no scales by rows, and fp8.scaling = row"
    if config.training.cuda_graphs:
        return "rounds weights call by call, which training.cuda_graphs = true would not repeat"
    if config.parallel.context_order == "zigzag":
        return "cannot put weights' gradients off, as parallel.context_order = zigzag does"
    return None


def float8_widths(model: ModelConfig, parts: int) -> Iterator[str]:
    """Widths over so many tensor-parallel parts that are no multiples of 16, a sentence each."""
    shares = f" over parallel.tensor = {parts}" if parts > 1 else ""
    head_dim = model.hidden_size // model.num_heads
    kv_heads = "num_heads" if model.num_kv_heads is None else "num_kv_heads"
    attention = f"model.num_heads and model.{kv_heads} heads of {head_dim}{shares}"
    heads, kv = model.num_heads // parts, getattr(model, kv_heads) // parts
    widths = (
        (f"model.hidden_size = {model.hidden_size}", model.hidden_size),
        (f"{attention}: the queries' width", heads * head_dim),
        (f"{attention}: the width of queries, keys and values", (heads + 2 * kv) * head_dim),
        (
            f"model.ffn_hidden_size = {model.ffn_hidden_size}{shares}",
            model.ffn_hidden_size // parts,
        ),
    )
    for name, width in widths:
        if width % 16:
            yield (
                f"{name} is {width} to a process, and training.precision = fp8 takes multiples of "
                "16; choose another width, or bf16"
            )
