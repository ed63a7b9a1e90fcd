"""A checkpoint as a folder that `transformers` loads, and that needs nothing of this project."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig

import ttt_megatron.hf
from ttt_megatron import __version__
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.output_folder import replacing
from ttt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.hf_config import CODE_FILES, hf_parameter_name, to_hf_config
from ttt_megatron.exchange.hf_tokenizer import save_hf_tokenizer
from ttt_megatron.exchange.model_card import CardFacts, model_card
from ttt_megatron.exchange.verify_export import Comparison, compare_with_checkpoint
from ttt_megatron.hf.configuration_ttt_e2e import TTTE2EConfig
from ttt_megatron.hf.state_ttt_e2e import base_hash
from ttt_megatron.tracking.state import read_tracking
from ttt_megatron.training.checkpoint_folder import (
    CHECKPOINTS,
    INFO,
    RECIPE,
    TOKENIZER,
    CheckpointInfo,
    read_config,
    read_info,
    resolve_checkpoint,
)
from ttt_megatron.training.manifest import write_manifest
from ttt_megatron.training.weights import build_learner, read_weights, refuse_other_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_HALF = 65504.0

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """dtype of the stored weights, largest file of them, and whether to compare in the end."""

    dtype: str = "float32"
    max_shard_size: str = "5GB"
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: the folder, bytes of weights in how many files, hash, comparison."""

    folder: Path
    parameters: int
    weight_bytes: int
    weight_files: int
    hash: str
    comparison: Comparison | None


@dataclass(frozen=True, kw_only=True)
class _Source:
    checkpoint: Path
    config: RunConfig
    info: CheckpointInfo
    tokenizer: Tokenizer
    weights: dict[str, Tensor]

    @property
    def run_folder(self) -> Path:
        return run_folder_of(self.checkpoint)


def export_checkpoint(
    source: Path, output: Path, settings: ExportSettings, report: Report = lambda _: None
) -> Exported:
    """Exports a checkpoint, or a run's newest, of any parallel layout; `report` tells what is done.

    The folder appears when all is written and, if wanted, verified. Raises UserError if the source
    or the output cannot be used, or the export's logits are not the checkpoint's.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: choose another folder to export to, or remove it")
    report("reading the checkpoint")
    read = _read(source)
    weights = _converted(read, DTYPES[settings.dtype])
    exported = to_hf_config(
        read.config.model,
        read.config.inner,
        bos_id=read.tokenizer.bos_id,
        dtype=settings.dtype,
    )
    with replacing(output) as folder:
        report("writing weights")
        _write_code_and_config(exported, read, folder)
        files = _write_weights(weights, folder, settings.max_shard_size)
        digest = base_hash(
            ((name, _wide(w)) for name, w in weights.items()), exported.base_settings()
        )
        comparison = None
        if settings.verify:
            report("comparing with the checkpoint")
            comparison = compare_with_checkpoint(folder, read.config, weights, read.tokenizer)
        facts = CardFacts(
            name=output.name,
            run=read.config.name,
            info=read.info,
            tracking=read_tracking(read.run_folder),
            run_folder=read.run_folder,
            recipe=(read.checkpoint / RECIPE).read_text(encoding="utf-8"),
            hash=digest,
            dtype=settings.dtype,
            version=__version__,
            parameters=sum(w.numel() for w in weights.values()),
            comparison=comparison,
        )
        (folder / "README.md").write_text(model_card(exported, facts), encoding="utf-8")
        write_manifest(folder)
    return Exported(
        folder=output,
        parameters=facts.parameters,
        weight_bytes=sum(w.numel() * w.element_size() for w in weights.values()),
        weight_files=files,
        hash=digest,
        comparison=comparison,
    )


def run_folder_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint's folder belongs to."""
    parent = checkpoint.parent
    return parent.parent if parent.name == CHECKPOINTS else parent


def _read(source: Path) -> _Source:
    if not source.is_dir():
        raise UserError(f"{source} is no folder: give a run's folder or one of its checkpoints")
    checkpoint = resolve_checkpoint(source)
    config = read_config(checkpoint)
    if set(config.model.mixer_kinds) != {"attention"}:
        raise UserError(
            f"{checkpoint}: model.mixers = {config.model.mixers}, and only models of windowed "
            "attention are exported"
        )
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    rows = config.model.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids and the model {rows} "
            "rows: it can name tokens the model does not know"
        )
    with torch.device("meta"):
        names = {name for name, _ in build_learner(config).named_parameters()}
    refuse_other_parameters(names, checkpoint)
    return _Source(
        checkpoint=checkpoint,
        config=config,
        info=read_info(checkpoint),
        tokenizer=tokenizer,
        weights=read_weights(checkpoint),
    )


def _converted(read: _Source, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by their names in the model, in a dtype that holds them, else UserError."""
    converted = {}
    for name, weight in read.weights.items():
        if not bool(weight.isfinite().all()):
            raise UserError(f"{read.checkpoint}: {name} holds NaN or infinity: export another step")
        if dtype == torch.float16 and float(weight.abs().max()) > _LARGEST_HALF:
            raise UserError(f"{read.checkpoint}: {name} is too large for float16: use bfloat16")
        converted[name.removeprefix("model.")] = weight.to(dtype)
    return converted


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _write_weights(weights: dict[str, Tensor], folder: Path, max_shard_size: str) -> int:
    named = {hf_parameter_name(name): weight for name, weight in weights.items()}
    try:
        save_torch_state_dict(
            named, folder, max_shard_size=max_shard_size, metadata={"format": "pt"}
        )
    except ValueError as error:
        raise UserError(f"--max-shard-size {max_shard_size}: {error}; give a size as 2GB") from None
    files = list(folder.glob("*.safetensors"))
    for file in files:
        file.chmod((folder / "config.json").stat().st_mode)
    return len(files)


def _rows_without_text(exported: TTTE2EConfig, tokenizer: Tokenizer) -> list[int] | None:
    """Ids the model could predict and the tokenizer has no text for; None if there are none."""
    return list(range(tokenizer.vocab_size, exported.vocab_size)) or None


def _write_code_and_config(exported: TTTE2EConfig, read: _Source, folder: Path) -> None:
    exported.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=exported.bos_token_id,
        eos_token_id=exported.eos_token_id,
        pad_token_id=exported.pad_token_id,
        suppress_tokens=_rows_without_text(exported, read.tokenizer),
        do_sample=True,
        use_cache=True,
    ).save_pretrained(folder)
    save_hf_tokenizer(read.tokenizer, folder)
    code = Path(ttt_megatron.hf.__file__).parent
    for name in CODE_FILES:
        shutil.copyfile(code / name, folder / name)
    for name in (RECIPE, INFO):
        shutil.copyfile(read.checkpoint / name, folder / name)
