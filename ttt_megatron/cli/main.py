"""The command line: finds the subcommand, imports it alone, runs it, turns errors into exits."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ttt_megatron import __version__
from ttt_megatron.errors import PassingError, UserError

# A static table, so that --help imports no subcommand and with it no torch.
# Each module has NAME, HELP, EPILOG, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "prepare": ("ttt_megatron.cli.prepare", "Tokenise text into the shards that runs read."),
    "train": ("ttt_megatron.cli.train", "Train a model, or go on where a run stopped."),
    "submit": ("ttt_megatron.cli.submit", "Train recipes as jobs of a Slurm cluster."),
    "status": ("ttt_megatron.cli.status", "Show how far submitted jobs are."),
    "logs": ("ttt_megatron.cli.logs", "Show or follow a job's log."),
    "cancel": ("ttt_megatron.cli.cancel", "Cancel jobs, and those that wait for them."),
    "evaluate": (
        "ttt_megatron.cli.evaluate",
        "Measure losses by position and context, needles, leakage.",
    ),
    "compare": ("ttt_megatron.cli.compare", "Put evaluations side by side."),
    "sweep": ("ttt_megatron.cli.sweep", "Train runs that differ in a few settings."),
    "report": ("ttt_megatron.cli.report", "Put runs and sweeps into one document."),
    "dashboard": ("ttt_megatron.cli.dashboard", "Draw a run's course as one page."),
    "upload": ("ttt_megatron.cli.upload", "Upload to MLflow what runs have kept for it."),
    "generate": ("ttt_megatron.cli.generate", "Read a prompt and continue it."),
    "read": ("ttt_megatron.cli.read", "Read a document once and save what was learnt from it."),
    "import": (
        "ttt_megatron.cli.import_checkpoint",
        "Bring a checkpoint of another implementation in.",
    ),
    "export": ("ttt_megatron.cli.export", "Write a checkpoint for transformers to load."),
    "serve": ("ttt_megatron.cli.serve", "Serve an exported model over HTTP, with sessions."),
    "config": ("ttt_megatron.cli.config", "Print a recipe, resolved, or the reference of keys."),
    "bench": ("ttt_megatron.cli.bench", "Measure speed and memory, kernels to whole steps."),
    "plan": ("ttt_megatron.cli.plan", "Estimate memory, time and transfers of a run."),
    "baselines": (
        "ttt_megatron.cli.baselines",
        "Make recipes of the systems a TTT-E2E recipe is compared with.",
    ),
    "parameters": ("ttt_megatron.cli.parameters", "Count a model's parameters."),
}
EXIT_USER_ERROR = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of <sysexits.h>
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (default: the process's arguments) and returns the exit status.

    0 is success, 2 an error that the user can fix, 75 one that may pass by itself, 130 an
    interrupt; subcommands may return others.
    """
    parser = _main_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    try:
        if arguments.command not in COMMANDS:
            raise UserError(_unknown_command(arguments.command))
        status = _run(arguments.command, arguments.arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_TRY_AGAIN if isinstance(error, PassingError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader left, as `head` does. What is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _main_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ttt-megatron",
        usage="ttt-megatron [-h] [--version] COMMAND ...",
        description="Trains, evaluates and runs TTT-E2E language models.",
        epilog=f"commands:\n{table}\n\n`ttt-megatron COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ttt-megatron {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _unknown_command(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "the commands are " + ", ".join(COMMANDS) + "."
    return f"there is no command {name}; {hint}"


def command_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of subcommand `name`, which `module` implements."""
    parser = argparse.ArgumentParser(
        prog=f"ttt-megatron {name}",
        description=module.HELP,
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _run(name: str, argv: Sequence[str]) -> int:
    module = importlib.import_module(COMMANDS[name][0])
    # Intermixed, so that `train RECIPE --option x key=value` reads the override too.
    status: int = module.run(command_parser(name, module).parse_intermixed_args(argv))
    return status


if __name__ == "__main__":
    sys.exit(main())
