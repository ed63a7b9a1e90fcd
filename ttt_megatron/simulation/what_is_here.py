"""What of a run is on this machine already: data, weights to start from, the run itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.training.checkpoint_folder import read_config, read_info
from ttt_megatron.training.initial_weights import refuse_other_weights
from ttt_megatron.training.preflight import check_data, find_resumable
from ttt_megatron.training.resume import refuse_changes, refuse_other_data


@dataclass(frozen=True, kw_only=True)
class WhatIsHere:
    """`tokens` is the data's vocabulary, None without data; `unchecked` what was not there."""

    tokens: int | None
    vocabulary: list[str]
    """The override that a recipe needs which leaves its vocabulary to the data."""
    unchecked: list[str]

    @classmethod
    def of(cls, config: RunConfig) -> "WhatIsHere":
        """Raises UserError for data that is here and that the run cannot train on."""
        unchecked, tokens = [], None
        if config.data.path and Path(config.data.path).exists():
            tokens = check_data(config)
        else:
            name = config.data.path or "data.path, which is empty"
            unchecked.append(
                f"data: there is no {name} here, so its length and vocabulary are open"
            )
        start = config.training.init_from
        if start is not None and not Path(start).exists():
            unchecked.append(f"weights: there is no {start} here, so their shapes are open")
        if not torch.cuda.is_available():
            unchecked.append("what needs CUDA: kernels, fused AdamW and norms, float8 products")
        own = config.model.vocab_size
        vocabulary = [] if tokens is None or own is not None else [f"model.vocab_size={tokens}"]
        return cls(tokens=tokens, vocabulary=vocabulary, unchecked=unchecked)

    def check_starts(self, config: RunConfig, shapes: Mapping[str, torch.Size]) -> None:
        """Raises UserError if a run in the output folder has other settings or read other data than
        is here, or else if the weights to start from are here and are not those of a model of these
        whole shapes."""
        checkpoint = find_resumable(Path(config.training.output), quick=True)
        if checkpoint is not None:
            refuse_changes(read_config(checkpoint), config, str(checkpoint))
            if self.tokens is not None:
                refuse_other_data(read_info(checkpoint), config.data.path)
        elif (start := config.training.init_from) is not None and Path(start).exists():
            refuse_other_weights(shapes, start)
