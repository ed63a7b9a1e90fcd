"""What is asked of a benchmark, checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from ttt_megatron.bench import models
from ttt_megatron.bench.models import Size
from ttt_megatron.bench.results import Report, read_report
from ttt_megatron.config.schema import Precision
from ttt_megatron.errors import UserError

SECTIONS = ("kernels", "inner", "meta", "latency")
# It measures again what `meta` and `latency` do, of more systems.
ON_REQUEST = ("systems",)
LENGTHS = (8192, 32768, 131072)
SMALL_LENGTHS = (256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A benchmark's settings.

    sections: all of `SECTIONS`, or what is asked for of these and `ON_REQUEST`; lengths: of
    sequences in steps, of contexts in latencies; repeats: timed runs of a kernel; step_repeats: of
    steps and latencies; budget: seconds, None is no end.
    """

    device: torch.device
    sections: tuple[str, ...]
    sizes: tuple[Size, ...]
    lengths: tuple[int, ...]
    precisions: tuple[Precision, ...]
    repeats: int
    step_repeats: int
    small: bool = False
    budget: float | None = None
    output: Path | None = None
    compare: Report | None = None


def make_options(
    *,
    device: str = "auto",
    only: Sequence[str] | None = None,
    sizes: Sequence[str] | None = None,
    recipe: str | None = None,
    lengths: Sequence[int] | None = None,
    precision: Sequence[str] | None = None,
    repeats: int = 20,
    step_repeats: int = 5,
    small: bool = False,
    budget: float | None = None,
    output: str | None = None,
    compare: str | None = None,
) -> Options:
    """Raises UserError, one sentence, for whatever cannot be measured."""
    for name, number in (("--repeats", repeats), ("--step-repeats", step_repeats)):
        if number < 1:
            raise UserError(f"{name} {number}: give a number of at least 1")
    if budget is not None and not budget > 0:
        raise UserError(f"--budget {budget:g}: give a number of seconds above 0")
    sections = _sections(only)
    if sum((small, bool(sizes), bool(recipe))) > 1:
        raise UserError(
            "--small, --sizes and --recipe each name the model: give one of them (--small has a "
            "tiny one of its own)"
        )
    on = _device(device)
    precisions = _precisions(precision or (["fp32"] if on.type == "cpu" else ["bf16"]))
    if small:
        chosen = [models.tiny_size()]
    elif recipe:
        chosen = [models.recipe_size(recipe)]
    else:
        chosen = models.named_sizes(_once(sizes or ["125m"]))
    wanted = _once(lengths or (SMALL_LENGTHS if small else LENGTHS))
    for size in chosen:
        for length in wanted:
            for one in precisions:
                models.check_length(size, length, one, on)
    folder = None if output is None else Path(output)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: that is a file; give a folder")
    return Options(
        device=on,
        sections=sections,
        sizes=tuple(chosen),
        lengths=tuple(wanted),
        precisions=precisions,
        repeats=repeats,
        step_repeats=step_repeats,
        small=small,
        budget=budget,
        output=folder,
        compare=None if compare is None else read_report(Path(compare)),
    )


def _once(values: Sequence) -> list:
    return list(dict.fromkeys(values))


def _sections(only: Sequence[str] | None) -> tuple[str, ...]:
    if only is None:
        return SECTIONS
    every = (*SECTIONS, *ON_REQUEST)
    words = [word for text in only for word in text.split(",") if word]
    for word in words:
        if word not in every:
            raise UserError(f"--only {word}: the sections are {', '.join(every)}")
    if not words:
        raise UserError(f"--only names nothing: the sections are {', '.join(every)}")
    return tuple(section for section in every if section in words)


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and there else "cpu")


def _precisions(names: Sequence[str]) -> tuple[Precision, ...]:
    known: tuple[Precision, ...] = get_args(Precision)
    for name in names:
        if name not in known:
            raise UserError(f"--precision {name}: the precisions are {', '.join(known)}")
    return tuple(name for name in known if name in names)
