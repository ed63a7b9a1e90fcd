"""`ttt-megatron serve`: an exported model behind an OpenAI-compatible API."""

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

from ttt_megatron.errors import UserError

NAME = "serve"
HELP = "Serve an exported model over HTTP, with sessions that keep what they learnt."
EPILOG = """examples:
  ttt-megatron export runs/demo exported/demo
  ttt-megatron serve exported/demo --session-dir sessions --memory 8GiB

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "def read(path):", "max_tokens": 50, "session": "ann"}'
  curl http://127.0.0.1:8000/v1/sessions/ann

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.completions.create(model="demo", prompt="Chapter 2", extra_body={"session": "ann"})

A session reads each prompt after what it read and wrote before; without one, a request starts
afresh. SIGTERM and Ctrl-C save all sessions to --session-dir, and the next start finds them there.
There is no authentication: listen on other than the local host only behind a proxy that has."""

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that `ttt-megatron export` wrote")
    add("--host", default="127.0.0.1", metavar="H", help="listen here (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="P", help="default: %(default)s; 0 is any free")
    add("--model-name", metavar="NAME", help="what requests call it (default: the folder's name)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of weights and products; auto is the export's (default: %(default)s)",
    )
    add("--no-inner-steps", action="store_true", help="keep the weights as trained")
    add(
        "--memory",
        default="4GiB",
        metavar="SIZE",
        help="for sessions and requests, weights apart (default: %(default)s)",
    )
    add("--session-dir", type=Path, metavar="DIR", help="where sessions are kept on disk")
    add(
        "--states-dir", type=Path, metavar="DIR", help="adapted states that sessions may start from"
    )
    add(
        "--save-every-request",
        action="store_true",
        help="write a session's file before its request counts as answered",
    )
    add("--max-batch", type=int, default=16, metavar="N", help="requests answered at a time (16)")
    add("--max-queue", type=int, default=256, metavar="N", help="how many more may wait (256)")
    add(
        "--max-wait",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds a request may wait for memory (default: %(default)s)",
    )
    add("--max-prompt-tokens", type=int, default=1_000_000, metavar="N", help="(1000000)")
    add("--max-body", default="64MiB", metavar="SIZE", help="of a request (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; raises UserError for whatever the user can fix."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {missing[0]}: pip install 'ttt-megatron[serve]'")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: give a number from 0 to 65535")
    from ttt_megatron.service.options import ServiceOptions, parse_bytes

    options = ServiceOptions(
        memory=parse_bytes(args.memory, "memory"),
        session_dir=args.session_dir,
        states_dir=args.states_dir,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        max_wait=args.max_wait,
        max_prompt_tokens=args.max_prompt_tokens,
        max_body_bytes=parse_bytes(args.max_body, "max-body"),
        save_every_request=args.save_every_request,
    )
    if args.states_dir is not None and not args.states_dir.is_dir():
        raise UserError(f"--states-dir {args.states_dir} is no folder: give one")

    from ttt_megatron.service.server import bind, serve

    # Before loading, which may take minutes.
    bound = bind(args.host, args.port)

    from ttt_megatron.service.served_model import load_served_model
    from ttt_megatron.service.service import Service

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    served = load_served_model(
        args.model,
        name=args.model_name,
        device=args.device,
        dtype=args.dtype,
        inner_steps=not args.no_inner_steps,
    )
    service = Service(served, options)
    steps = "inner steps on" if served.learns else "no inner steps"

    def ready(url: str) -> None:
        print(
            f"serving {served.name} at {url} ({served.model.device.type}, "
            f"{str(served.model.dtype).removeprefix('torch.')}, {steps}; "
            f"{len(service.pool.all())} sessions found)",
            file=sys.stderr,
            flush=True,
        )

    problems = serve(service, bound, ready)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0
