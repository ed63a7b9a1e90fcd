"""What a model's mixers cannot be."""

import difflib
from collections.abc import Iterator

from ttt_megatron.config.schema import ATTENTION_MIXERS, MIXERS, ModelConfig, RunConfig


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
    if "mamba2" in given:
        yield from _mamba2(model)
    if {"ttt_kvb", "swa_ttt_kvb"} & set(given):
        yield from _ttt_kvb(model)


def _mamba2(model: ModelConfig) -> Iterator[str]:
    settings = model.mamba2
    if settings.inner_size(model) % settings.head_dim:
        yield (
            f"model.mamba2.head_dim = {settings.head_dim} does not divide the channels of Mamba 2, "
            f"{settings.expand} times model.hidden_size = {model.hidden_size}; choose a divisor of "
            f"{settings.inner_size(model)}"
        )


def _ttt_kvb(model: ModelConfig) -> Iterator[str]:
    settings, section = model.ttt_kvb, "model.ttt_kvb"
    heads = settings.heads(model)
    if model.hidden_size % heads:
        yield (
            f"{section}.num_heads = {heads} does not divide model.hidden_size = "
            f"{model.hidden_size}; choose a divisor"
        )
    if settings.positions == "chunk" and settings.head_dim(model) % 2:
        yield (
            f"{section}.positions = chunk turns pairs, and {heads} heads are "
            f"{settings.head_dim(model)} wide; choose {section}.num_heads for an even width"
        )
    if settings.fast_width(model) < 1:
        yield (
            f"{section}.expansion = {settings.expansion} leaves no hidden width of heads "
            f"{settings.head_dim(model)} wide; choose more"
        )
    if settings.weight_norm and settings.output_rule == "updated":
        yield (
            f"{section}.weight_norm = true normalises weights between chunks alone; choose "
            f"{section}.output_rule = previous or simplified"
        )
