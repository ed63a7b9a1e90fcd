"""Answers in the shapes of OpenAI's API."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from ttt_megatron.service.jobs import Finished


class Format(ABC):
    """One answer's shape. `session` is an addition: what became of the session, if one."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str) -> None:
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """All of it."""
        choice = {"index": 0, "logprobs": None, "finish_reason": _reason(end)} | self._text(text)
        return self._body(self.kind, [choice]) | {"usage": _usage(end)} | _session(end)

    def first(self) -> dict[str, Any] | None:
        """A chunk before all text, if the shape has one."""
        return None

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk(self._delta(text), None)

    def last(self, end: Finished) -> dict[str, Any]:
        """The chunk that says why the answer is over."""
        return self._chunk(self._delta(""), _reason(end)) | _session(end)

    def usage(self, end: Finished) -> dict[str, Any]:
        """The chunk with the counts."""
        return self._body(self.chunk_kind, []) | {"usage": _usage(end)}

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]:
        """What of a choice holds the whole text."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """What of a choice holds a piece of text."""

    def _chunk(self, part: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason} | part
        return self._body(self.chunk_kind, [choice])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": kind, "choices": choices} | self._common


class CompletionFormat(Format):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _text


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self) -> dict[str, Any]:
        """The chunk that says whose text it is."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _reason(end: Finished) -> str:
    # A cancelled answer has no reader; the API has no word for it.
    return "stop" if end.reason == "cancelled" else end.reason


def _usage(end: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


def _session(end: Finished) -> dict[str, Any]:
    if end.session is None:
        return {}
    return {"session": {key: end.session[key] for key in ("name", "position", "steps", "drift")}}
