"""How long a checkpoint keeps training from going on, written at once and in the background.

    python tools/measure_save.py [--processes 2] [--hidden 768] [--layers 12] [--saves 3]
    python tools/measure_save.py --interval 50 --hidden 256 --layers 4 --length 512 --saves 8

Trains a model on random text twice, the second time with training.async_save. A checkpoint is saved
before every second interval of steps, so that an interval with a checkpoint and one without are
neighbours in the same run; all time counts, from the end of the step before the checkpoint to the
end of the interval's last step. Prints for each kind of saving the seconds that training stopped,
the seconds of a step beside a checkpoint that is being written, and what a checkpoint adds to the
time of an interval. On the machine's temporary folder, which needs room for five checkpoints.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ttt_megatron.config import RunConfig, from_dict
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.parallel.launcher import launch
from ttt_megatron.training.preflight import resolve_run


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
    """A run that saves before every second interval, after two to warm up.

    It ends one step after a pair: the end of a run saves too, and waits for it.
    """
    sizes = {
        "num_layers": options.layers,
        "num_suffix_layers": max(1, options.layers // 4),
        "hidden_size": options.hidden,
        "num_heads": options.hidden // 64,
        "ffn_hidden_size": 8 * options.hidden // 3,
        "window_size": 128,
    }
    training = {
        "steps": 2 * options.interval * (options.saves + 1) + 1,
        "global_batch_size": options.processes,
        "micro_batch_size": 1,
        "save_interval": 2 * options.interval,
        "async_save": background,
        "keep_last": 1,
        "eval_sequences": 0,
        "output": str(output),
    }
    values = {
        "model": sizes,
        "inner": {"chunk_size": 64, "lr": 0.1},
        "data": {"path": str(data), "sequence_length": options.length},
        "training": training,
        "parallel": {"data": options.processes},
        "tracking": {"mlflow": False, "progress": False},
    }
    return resolve_run(from_dict(values))


def measured(config: RunConfig, interval: int) -> dict[str, Any]:
    """One rank's run.

    Returns its parameters, the seconds stopped for each save, those of the steps while a
    checkpoint was being written, and those of the intervals with a checkpoint and without.
    """
    from ttt_megatron.parallel.groups import process_groups
    from ttt_megatron.training.callbacks import Callback
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.run import build_trainer
    from ttt_megatron.training.trainer import Trainer

    stops: list[float] = []
    beside: list[float] = []
    ends: dict[int, float] = {}
    saved: list[int] = []

    class Watch(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            ends[record.step] = time.perf_counter()
            if len(saved) < (record.step - 1) // (2 * interval):
                beside.append(record.seconds)

        def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
            saved.append(trainer.progress.step)
            stops.append(trainer.seconds_stopped)

    with process_groups(config.training.device, config.parallel) as groups:
        trainer = build_trainer(config, groups)
        parameters = sum(p.numel() for p in trainer.parts.named_parameters().values())
        trainer.callbacks = [Watch()]
        trainer.fit()
    last = config.training.steps - 1 - interval
    saves = range(2 * interval, last + 1, 2 * interval)
    return {
        "parameters": parameters,
        "stops": stops[: len(saves)],
        "beside": beside,
        "with": [ends[step + interval] - ends[step] for step in saves],
        "without": [ends[step + 2 * interval] - ends[step + interval] for step in saves],
    }


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:4]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes")
    parser.add_argument("--hidden", type=int, default=768, help="model width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12, help="blocks")
    parser.add_argument("--length", type=int, default=128, help="tokens of a process's sequence")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints that are measured")
    parser.add_argument("--interval", type=int, default=6, help="steps from save to save")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder)
        for title, background in (("at once", False), ("in the background", True)):
            config = run_config(options, data, folder / title, background)
            report(title, options, launch(measured, (config, options.interval), options.processes))
    return 0


def report(title: str, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Prints what came of one run."""
    told = ", ".join(f"{stop:.2f}" for stop in found["stops"])
    print(f"{found['parameters'] / 1e6:.0f}M parameters, {title}: stopped {told} s")
    without = statistics.median(found["without"])
    print(f"  step without a save: {without / options.interval:.3f} s")
    if found["beside"]:
        print(f"  step beside a save: {statistics.median(found['beside']):.3f} s")
    shares = [a / b - 1 for a, b in zip(found["with"], found["without"], strict=True)]
    pairs = ", ".join(f"{share:+.1%}" for share in shares)
    print(
        f"  a save adds to an interval of {options.interval} steps: "
        f"{statistics.median(shares):+.1%} ({pairs})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
