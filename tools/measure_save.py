"""How long a checkpoint keeps training from going on, written at once and in the background.

    python tools/measure_save.py [--processes 2] [--hidden 768] [--layers 12] [--saves 3]

Trains a model on random text twice, the second time with training.async_save, and prints for each
the seconds that training stopped for a checkpoint (the last is left out: the end of a run waits for
it), and the seconds of a step with and without a checkpoint being written beside it. On the
machine's temporary folder, which needs room for five checkpoints.
"""

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ttt_megatron.config import RunConfig, from_dict
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.parallel.launcher import launch
from ttt_megatron.training.preflight import resolve_run

SEQUENCE_LENGTH = 128
STEPS_A_SAVE = 6


def make_data(folder: Path) -> Path:
    """Prepares documents of random letters."""
    source = folder / "text"
    source.mkdir()
    letters = random.Random(0).choices("abcdefgh ", k=20_000)
    (source / "one.txt").write_text("".join(letters))
    output = folder / "data"
    prepare(PrepareOptions(inputs=(str(source),), output=str(output), validation=0, workers=1))
    return output


def run_config(options: argparse.Namespace, data: Path, output: Path, background: bool) -> Any:
    """A run that saves every few steps."""
    sizes = {
        "num_layers": options.layers,
        "num_suffix_layers": max(1, options.layers // 4),
        "hidden_size": options.hidden,
        "num_heads": options.hidden // 64,
        "ffn_hidden_size": 8 * options.hidden // 3,
        "window_size": SEQUENCE_LENGTH,
    }
    training = {
        "steps": STEPS_A_SAVE * (options.saves + 1),
        "global_batch_size": options.processes,
        "micro_batch_size": 1,
        "save_interval": STEPS_A_SAVE,
        "async_save": background,
        "keep_last": 1,
        "eval_sequences": 0,
        "output": str(output),
    }
    values = {
        "model": sizes,
        "inner": {"chunk_size": SEQUENCE_LENGTH // 2, "lr": 0.1},
        "data": {"path": str(data), "sequence_length": SEQUENCE_LENGTH},
        "training": training,
        "parallel": {"data": options.processes},
        "tracking": {"mlflow": False, "progress": False},
    }
    return resolve_run(from_dict(values))


def measured(config: RunConfig) -> dict[str, Any]:
    """One rank's run: parameters, seconds stopped a save, and seconds of its steps by kind."""
    from ttt_megatron.parallel.groups import process_groups
    from ttt_megatron.training.callbacks import Callback
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.run import build_trainer
    from ttt_megatron.training.trainer import Trainer

    stops: list[float] = []
    steps: dict[str, list[float]] = {"alone": [], "beside": []}
    saved: list[int] = []

    class Watch(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            begun = (record.step - 1) // STEPS_A_SAVE
            if record.step > 1:  # the first step warms up
                steps["beside" if len(saved) < begun else "alone"].append(record.seconds)

        def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
            saved.append(trainer.progress.step)
            stops.append(trainer.seconds_stopped)

    with process_groups(config.training.device, config.parallel) as groups:
        trainer = build_trainer(config, groups)
        parameters = sum(p.numel() for p in trainer.parts.named_parameters().values())
        trainer.callbacks = [Watch()]
        trainer.fit()
    return {"parameters": parameters, "stops": stops[:-1], **steps}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder)
        for title, background in (("at once", False), ("in the background", True)):
            config = run_config(options, data, folder / title, background)
            found = launch(measured, (config,), options.processes)
            told = ", ".join(f"{stop:.2f}" for stop in found["stops"])
            print(f"{found['parameters'] / 1e6:.0f}M parameters, {title}: stopped {told} s")
            for kind in ("alone", "beside"):
                if found[kind]:
                    median = statistics.median(found[kind])
                    print(f"  step {kind}: {median:.2f} s, {len(found[kind])} steps", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
