"""Sends many requests to a service at once, and counts what comes back.

    python tools/load_sessions.py http://127.0.0.1:8000 --requests 200 --sessions 50

Requests are spread over sessions (0: none has one). Prints a table: answers, errors, seconds,
tokens a second, seconds to the first text (half of them, 95 of 100), and whether every session has
read what it was sent and what it said. The exit status is 1 if anything is missing.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Outcome:
    """One request: whether it was answered, with how many tokens, and when text came first."""

    session: str | None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_text: float | None = None
    position: int | None = field(default=None)


async def ask(client: httpx.AsyncClient, number: int, session: str | None, tokens: int) -> Outcome:
    """One streamed completion."""
    body: dict[str, Any] = {
        "prompt": f"Request {number} asks for something.",
        "max_tokens": tokens,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    outcome, began = Outcome(session), time.perf_counter()
    try:
        body |= {} if session is None else {"session": session}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                outcome.error = f"{answer.status_code} {(await answer.aread()).decode()[:200]}"
                return outcome
            last = ""
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                if last != "[DONE]":
                    _take(outcome, json.loads(last), time.perf_counter() - began)
        if last != "[DONE]":
            outcome.error = outcome.error or "the stream broke off"
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__} {error}"
    return outcome


def _take(outcome: Outcome, chunk: dict[str, Any], seconds: float) -> None:
    if "error" in chunk:
        outcome.error = chunk["error"]["message"]
        return
    if outcome.first_text is None:
        outcome.first_text = seconds
    if "usage" in chunk:
        outcome.prompt_tokens = chunk["usage"]["prompt_tokens"]
        outcome.completion_tokens = chunk["usage"]["completion_tokens"]
    if "session" in chunk:
        outcome.position = chunk["session"]["position"]


async def load(url: str, requests: int, sessions: int, tokens: int) -> tuple[list[Outcome], float]:
    """All requests at once; outcomes and seconds."""
    limits = httpx.Limits(max_connections=None)
    stamp = f"load{int(time.time())}"
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        names = [f"{stamp}-{i % sessions}" if sessions else None for i in range(requests)]
        outcomes = await asyncio.gather(
            *(ask(client, i, name, tokens) for i, name in enumerate(names))
        )
        return list(outcomes), time.perf_counter() - began


def sessions_in_order(outcomes: list[Outcome]) -> tuple[int, int]:
    """How many sessions stand where the tokens of their requests lead, and how many there are."""
    read: dict[str, int] = {}
    stands: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.session is not None:
            tokens = outcome.prompt_tokens + outcome.completion_tokens
            read[outcome.session] = read.get(outcome.session, 0) + tokens
            stands[outcome.session] = max(stands.get(outcome.session, 0), outcome.position or 0)
    return sum(stands[name] == count for name, count in read.items()), len(read)


def main() -> int:
    """Sends, prints, and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    outcomes, seconds = asyncio.run(load(args.url, args.requests, args.sessions, args.tokens))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    written = sum(outcome.completion_tokens for outcome in outcomes)
    read = sum(outcome.prompt_tokens for outcome in outcomes)
    firsts = sorted(o.first_text for o in outcomes if o.first_text is not None) or [0.0]
    fine, all_sessions = sessions_in_order(outcomes)
    for name, value in {
        "answered": f"{len(outcomes) - len(errors)} of {len(outcomes)}",
        "seconds": f"{seconds:.1f}",
        "tokens read": f"{read:,} ({read / seconds:,.0f} a second)",
        "tokens written": f"{written:,} ({written / seconds:,.0f} a second)",
        "first text after": f"{statistics.median(firsts):.2f} s, 95 of 100 within "
        f"{firsts[int(0.95 * (len(firsts) - 1))]:.2f} s",
        "sessions in order": f"{fine} of {all_sessions}",
    }.items():
        print(f"{name:<18} {value}")
    for error in sorted(set(errors)):
        print(f"{errors.count(error)} times: {error}", file=sys.stderr)
    return 1 if errors or fine != all_sessions else 0


if __name__ == "__main__":
    sys.exit(main())
