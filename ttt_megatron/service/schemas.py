"""Bodies of requests, with every field that is understood; others are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Id = Annotated[int, Field(strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """`include_usage`: one more chunk, with the counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextRequest(_Body):
    """What completions and chat completions have in common.

    session: the text goes on from request to request. top_k: an addition of this service. What
    follows `session` is taken only with the value that means nothing.
    """

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    session: str | None = None
    n: int | None = None
    logprobs: int | bool | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def unsupported(self) -> str | None:
        """The first field that asks for what there is not, if any."""
        asked: dict[str, Any] = {
            "n": self.n not in (None, 1),
            "logprobs": self.logprobs is not None and self.logprobs is not False,
            "logit_bias": bool(self.logit_bias),
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
        }
        return next((name for name, wanted in asked.items() if wanted), None)


class CompletionRequest(TextRequest):
    """POST /v1/completions. prompt: a text, or ids of tokens."""

    prompt: str | list[Id] | list[str]
    max_tokens: Count | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def unsupported(self) -> str | None:
        """The first field that asks for what there is not, if any."""
        asked = {"echo": bool(self.echo), "suffix": bool(self.suffix)}
        asked["best_of"] = self.best_of not in (None, 1)
        return next((name for name, wanted in asked.items() if wanted), super().unsupported())


class ChatMessage(_Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class ChatRequest(TextRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None


class NewSession(_Body):
    """POST /v1/sessions. state: a file's path below the folder of states."""

    name: str
    state: str


class CloneRequest(_Body):
    """POST /v1/sessions/{name}/clone. to: the name of the new session."""

    to: str
