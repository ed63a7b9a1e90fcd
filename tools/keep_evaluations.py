"""Copies runs without their weights: what `ttt-megatron report` needs of them, and no more.

    python tools/keep_evaluations.py reproduction/runs/stage2-* --output docs/reproduction/kept
    ttt-megatron report docs/reproduction/kept/stage2-* --output report

Of each run the results of its evaluations, the figures of its steps, and of its newest checkpoint
the settings; kilobytes in all. Runs that have not been evaluated are left out and named.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, INFO, RECIPE
from ttt_megatron.training.manifest import write_manifest
from ttt_megatron.training.metrics_file import METRICS_FILE
from ttt_megatron.training.preflight import find_resumable

EVALUATION = "evaluation"


def keep(run: Path, output: Path) -> bool:
    """Copies one run into `output`, in the place of an older copy; False if there is nothing yet.

    Raises UserError if all of its checkpoints are damaged.
    """
    results = sorted((run / EVALUATION).glob("*.json"))
    checkpoint = find_resumable(run, quick=True)
    if not results or checkpoint is None:
        return False
    target, beside = output / run.name, output / f".{run.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    settings = beside / CHECKPOINTS / checkpoint.name
    settings.mkdir(parents=True)
    (beside / EVALUATION).mkdir()
    for path in results:
        shutil.copy(path, beside / EVALUATION / path.name)
    shutil.copy(run / METRICS_FILE, beside / METRICS_FILE)
    for name in (RECIPE, INFO):
        shutil.copy(checkpoint / name, settings / name)
    write_manifest(settings)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    return True


def main() -> int:
    """Copies the runs that are named; 2 after an error."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        for run in options.runs:
            print(f"{run}: {'kept' if keep(run, options.output) else 'not evaluated yet'}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
