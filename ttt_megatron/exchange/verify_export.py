"""Does an exported folder compute what its checkpoint does? Both read the same tokens."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ttt_megatron.config.schema import Precision, RunConfig
from ttt_megatron.data.tokenizer import Tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.session import Session
from ttt_megatron.training.weights import build_learner

TOLERANCE = 1e-5
_CHUNKS = 2.5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """tokens read, inner steps taken, the largest difference of logits and the largest logit."""

    tokens: int
    inner_steps: int
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest logit, or as it is where that is below 1."""
        return self.difference / max(self.largest, 1.0)

    def __str__(self) -> str:
        return (
            f"logits over {self.tokens:,} tokens and {self.inner_steps} inner steps differ from "
            f"the checkpoint's by at most {self.difference:.1e} (largest logit {self.largest:.3g})"
        )


@torch.no_grad()
def compare_with_checkpoint(
    folder: Path, config: RunConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> Comparison:
    """Reads 2.5 chunks of random tokens with both, in float32 (float64 for a float64 run).

    `weights` are the exported ones by their names in the model, `folder` what was written of
    them. The export reads in pieces that are no chunks. Raises UserError if they differ.
    """
    wide = torch.float64 if config.training.precision == "fp64" else torch.float32
    tokens = _tokens(int(_CHUNKS * config.inner.chunk_size) + 1, tokenizer)
    expected, steps = _read_by_learner(config, weights, tokens, tokenizer.bos_id)
    model = load_exported_model(folder, wide)
    cache, actual = None, []
    for piece in tokens.split(max(1, int(0.7 * config.inner.chunk_size)), dim=1):
        output = model(piece, cache=cache)
        cache = output.cache
        actual.append(output.logits)
    found = Comparison(
        tokens=tokens.shape[1],
        inner_steps=steps,
        difference=float((torch.cat(actual, dim=1) - expected).abs().max()),
        largest=float(expected.abs().max()),
    )
    del model, cache
    gc.collect()
    # A comparison with NaN is false.
    if not found.relative <= TOLERANCE or steps != 2 * (steps > 0):
        raise UserError(
            f"the export is not what the checkpoint is: {found}; nothing was written, please report"
        )
    return found


def load_exported_model(folder: Path, dtype: torch.dtype) -> Any:
    """The exported model as anyone loads it, without a progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, local_files_only=True
        ).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokens(count: int, tokenizer: Tokenizer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(tokenizer.vocab_size, (1, count), generator=generator)
    tokens[:, 0] = tokenizer.bos_id
    return tokens


def _read_by_learner(
    config: RunConfig, weights: Mapping[str, Tensor], tokens: Tensor, bos_id: int
) -> tuple[Tensor, int]:
    precision: Precision = "fp64" if config.training.precision == "fp64" else "fp32"
    plain = replace(config, training=replace(config.training, precision=precision))
    learner: Learner = build_learner(plain).eval()
    learner.model.load_state_dict(weights)
    session = Session(learner, bos_id=bos_id)
    return session.read(tokens), session.steps_taken
