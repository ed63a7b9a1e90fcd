"""What a model's mixers cannot be."""

import difflib
from collections.abc import Iterator

from ttt_megatron.config.schema import ATTENTION_MIXERS, MIXERS, RunConfig


def mixer_problems(config: RunConfig) -> Iterator[str]:
    """What models with other mixers than windowed attention in every block cannot be."""
    model, parallel = config.model, config.parallel
    given = [kind.strip() for kind in model.mixers.split(",")]
    for kind in given:
        if kind not in MIXERS:
            near = difflib.get_close_matches(kind, MIXERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(MIXERS)}"
            yield f"model.mixers = {model.mixers} names {kind!r}, which is no mixer; {hint}"
            return
    suffix = model.mixer_kinds[model.num_layers - model.num_suffix_layers :]
    for kind in suffix:
        if kind != "attention":
            yield (
                f"model.mixers = {model.mixers} puts {kind} into the last "
                f"model.num_suffix_layers = {model.num_suffix_layers} blocks, whose chunks read "
                "windowed attention; set num_suffix_layers=0, or another order of mixers"
            )
            break
    others = [kind for kind in given if kind != "attention"]
    if others and parallel.context > 1:
        yield (
            f"parallel.context = {parallel.context} passes a window's keys between parts of a "
            f"sequence, and model.mixers = {model.mixers} asks for more; set parallel.context=1"
        )
    recurrent = [kind for kind in others if kind not in ATTENTION_MIXERS]
    if recurrent and parallel.tensor > 1:
        yield (
            f"parallel.tensor = {parallel.tensor} cuts attention by heads, and {recurrent[0]} of "
            f"model.mixers = {model.mixers} is not cut; set parallel.tensor=1"
        )
