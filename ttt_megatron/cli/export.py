"""`ttt-megatron export`: a checkpoint as a folder that transformers loads."""

import argparse
import sys
import time
from pathlib import Path

NAME = "export"
HELP = "Write a checkpoint as a folder that transformers loads and that keeps learning."
EPILOG = """examples:
  ttt-megatron export runs/demo exported/demo
  ttt-megatron export runs/3b/checkpoints/step-00052000 exported/3b --dtype bfloat16
  ttt-megatron export runs/3b exported/3b --register ttt-3b
  ttt-megatron generate exported/demo --prompt 'Call me'

The checkpoint may come from any parallel layout. The folder holds safetensors, configuration,
tokenizer, a model card and the model's code; AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True) needs torch, transformers and safetensors, and nothing of this project.
It is compared with the checkpoint, logits in float32, before it appears. With --register, a folder
that holds this very checkpoint already is registered as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's (its newest)")
    add("output", metavar="FOLDER", help="what to write; must not exist, or be empty")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the stored weights; fast weights are float32 while reading (default: %(default)s)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, as 500MB or 5GB (default: %(default)s)",
    )
    add(
        "--register",
        metavar="NAME",
        help="also upload it to its run's MLflow store, as a version of the registered model NAME",
    )
    add("--no-verify", action="store_true", help="do not compare with the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Exports; raises UserError for whatever the user can fix."""
    from ttt_megatron.exchange.register import find_registry, is_export_of

    source, output = Path(args.checkpoint), Path(args.output)
    registry = find_registry(source, args.register) if args.register is not None else None
    if registry is None or not is_export_of(output, source):
        _export(args, source, output)
    if registry is not None:
        done = registry.register(args.register, output)
        print(f"registered  {done.name} version {done.version} at {done.uri}, run {done.run_id}")
    return 0


def _export(args: argparse.Namespace, source: Path, output: Path) -> None:
    from ttt_megatron.exchange.export import ExportSettings, export_checkpoint

    start = time.perf_counter()

    def report(doing: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {doing}", file=sys.stderr, flush=True)

    done = export_checkpoint(
        source,
        output,
        ExportSettings(
            dtype=args.dtype, max_shard_size=args.max_shard_size, verify=not args.no_verify
        ),
        report,
    )
    files = "1 file" if done.weight_files == 1 else f"{done.weight_files} files"
    print(f"{done.folder}: {done.parameters:,} parameters in {args.dtype}, ", end="")
    print(f"{done.weight_bytes / 1e6:,.1f} MB of weights in {files}")
    print(f"verified: {done.comparison}" if done.comparison else "not verified (--no-verify)")
    print(f"hash of weights and settings: {done.hash}")
