"""Run two steps of every recipe, made small, on the CPU: `make recipes`.

    python tools/try_recipes.py                       # all of recipes/, minutes
    python tools/try_recipes.py '125m/*' '*/extend-mamba2-*'

Every recipe keeps its keys; shapes, lengths, batch and steps are tiny, and a stage starts from the
run that it names, made as small before it. Memory settings are those of the layout for 8 GPUs where
there is one. All run in one process. Ends with status 1, naming what failed.
"""

import argparse
import contextlib
import io
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from ttt_megatron.config import RunConfig, load_recipe
from ttt_megatron.config.layouts import LAYOUTS_FILE, layout_beside
from ttt_megatron.config.recipe import named_keys
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.errors import UserError
from ttt_megatron.planning.report import TextTable

RECIPES = Path(__file__).parents[1] / "recipes"
STEPS = 2
_NO_RUNS = ("base.yaml", LAYOUTS_FILE)
_CHUNK = 8
TOKENS = 257
_KEPT_OF_LAYOUTS = ("inner.memory_policy", "inner.two_level", "training.recompute_prefix")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a recipe went: the losses of its steps, or what went wrong."""

    recipe: str
    seconds: float
    losses: list[float]
    problem: str | None = None


def runs() -> dict[str, Path]:
    """All recipes of runs by their names below recipes/, without `.yaml`."""
    found = sorted(RECIPES.rglob("*.yaml"))
    return {
        str(path.relative_to(RECIPES).with_suffix("")): path
        for path in found
        if path.name not in _NO_RUNS and path.relative_to(RECIPES).parts[0] != "sweeps"
    }


def with_starts(
    wanted: Sequence[str], outputs: dict[str, str], starts: dict[str, str]
) -> list[str]:
    """The wanted runs, each behind the one it starts from; by run: output, what it starts from."""
    makers = {output: name for name, output in outputs.items()}
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        start = makers.get(starts.get(name, ""))
        if start is not None and start not in ordered:
            add(start)
        ordered[name] = None

    for name in wanted:
        add(name)
    return list(ordered)


def small(path: Path, folder: Path) -> RunConfig:
    """The recipe with tiny shapes, reading `folder/data`, its outputs below `folder`."""
    config = load_recipe(path)
    model, pattern = config.model, len(config.model.mixers.split(","))
    everywhere = model.num_suffix_layers == model.num_layers
    layers = max(3, pattern)
    suffix = layers if everywhere else min(model.num_suffix_layers, 1)
    chunks = min(16, max(2, config.data.sequence_length // config.inner.chunk_size // 4))
    settings = {
        "model.vocab_size": TOKENS,
        "model.num_layers": layers,
        "model.num_suffix_layers": suffix,
        "model.hidden_size": 32,
        "model.num_heads": 2,
        "model.ffn_hidden_size": 48,
        "model.prime_ffn_hidden_size": model.prime_ffn_hidden_size and 16,
        "model.window_size": model.window_size and 2 * _CHUNK,
        "model.mamba2.head_dim": 16,
        "model.mamba2.state_size": 8,
        "model.ttt_kvb.chunk_size": _CHUNK,
        "inner.chunk_size": _CHUNK,
        "data.path": folder / "data",
        "data.sequence_length": chunks * _CHUNK,
        "parallel.data": 1,
        "training.steps": STEPS,
        "training.global_batch_size": 2,
        "training.micro_batch_size": 1,
        "training.device": "cpu",
        "training.cuda_graphs": False,
        "training.eval_sequences": 0,
        "training.output": folder / config.training.output,
        "tracking.mlflow": False,
        "tracking.progress": False,
    }
    if config.training.init_from is not None:
        settings["training.init_from"] = folder / config.training.init_from
    words = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    words = [word.replace("=False", "=false").replace("=True", "=true") for word in words]
    layout = layout_beside(path, 8, config.training.precision, "h100")
    kept = layout.overrides if layout is not None else []
    return load_recipe(path, words + [one for one in kept if one.startswith(_KEPT_OF_LAYOUTS)])


def try_recipes(wanted: Sequence[str], folder: Path) -> Iterator[Trial]:
    """Trains the recipes one after the other, and what they start from; each told of as it ends."""
    from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics
    from ttt_megatron.training.run import run_training

    paths = runs()
    named = {name: named_keys(path) for name, path in paths.items()}
    outputs = {name: str(keys.get("training.output")) for name, keys in named.items()}
    starts = {name: str(keys.get("training.init_from")) for name, keys in named.items()}
    _make_data(folder)
    for name in with_starts(wanted, outputs, starts):
        begun, losses, problem = time.perf_counter(), [], None
        try:
            config = small(paths[name], folder)
            run_training(config)
            rows = read_metrics(Path(config.training.output) / METRICS_FILE)
            losses = [row["loss"] for row in rows if row["loss"] is not None]
            if len(losses) != STEPS:
                problem = f"{len(losses)} of {STEPS} steps have a finite loss"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        yield Trial(
            recipe=name, seconds=time.perf_counter() - begun, losses=losses, problem=problem
        )


def _make_data(folder: Path) -> None:
    words = random.Random(3).choices(("sea", "whale", "ship", "harpoon", "night"), k=3000)
    (folder / "text.txt").write_text(" ".join(words))
    options = PrepareOptions(
        inputs=(str(folder / "text.txt"),), output=str(folder / "data"), validation=0, workers=1
    )
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(options)


def table(trials: Sequence[Trial]) -> TextTable:
    """A row a recipe."""
    rows = [["recipe", "loss, step 1", "step 2", "seconds", ""]]
    for one in trials:
        losses = [f"{loss:.4f}" for loss in one.losses][:STEPS]
        losses += ["-"] * (STEPS - len(losses))
        rows.append([one.recipe, *losses, f"{one.seconds:.1f}", "FAILED" if one.problem else "ok"])
    return TextTable("recipes, made small, two steps each", rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Tries them; 0 if all went well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN")
    args = parser.parse_args(argv)
    wanted = [name for name in runs() if any(fnmatch(name, p) for p in args.patterns)]
    if not wanted:
        raise UserError(f"no recipe is called {' or '.join(args.patterns)}; see recipes/")
    trials = []
    with TemporaryDirectory(prefix="recipes-") as folder:
        for trial in try_recipes(wanted, Path(folder)):
            trials.append(trial)
            print(f"{trial.recipe}: {trial.problem or 'ok'}", file=sys.stderr, flush=True)
    print(table(trials))
    failed = [one for one in trials if one.problem]
    for one in failed:
        print(f"failed: {one.recipe}: {one.problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
