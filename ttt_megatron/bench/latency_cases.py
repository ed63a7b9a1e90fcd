"""Reading a prompt and decoding after it, by the streaming session, as contexts grow."""

from typing import Any

import torch
from torch import Tensor

from ttt_megatron.baselines.systems import as_system
from ttt_megatron.bench import models
from ttt_megatron.bench.case import Case, Group, Missing
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.models import E2E, FULL, SWA, Size
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.serving.session import Session

PREFILL, DECODE, STEP = "prefill", "decode a token", "decode a token and step"
_DECODED = 16


def latency_group(
    size: Size,
    length: int,
    precision: str,
    device: torch.device,
    rounds: int,
    ceilings: Ceilings,
) -> Group:
    """A prompt of `length` tokens, one sequence. A ratio is to SWA."""
    config = size.at(length, precision)
    variants = {
        E2E: config,
        SWA: as_system(config, "swa"),
        FULL: as_system(config, "full"),
    }
    flops = sum(step_work(c, tile=1).total.flops for c in variants.values()) / 3
    return Group(
        section="latency",
        operation="session",
        shape=f"{size.name}, context {length:,}",
        precision=precision,
        build=lambda: _cases(variants, device),
        cold_cache=False,
        memory_bytes=sum(_needed(c, device) for c in variants.values()),
        seconds=flops / ceilings.product_rate(precision) / 0.15,
        rounds=rounds,
        reference_way=SWA,
    )


def _needed(config: RunConfig, device: torch.device) -> float:
    """Weights, and keys and values: of all tokens under full attention, twice while they grow."""
    model, length = config.model, config.data.sequence_length
    kept = min(model.window_size or length, length)
    width = (model.num_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)
    size = 8 if config.training.precision == "fp64" else 4
    return models.weight_bytes(config, device) + 2 * 2 * model.num_layers * kept * width * size


class _Reader:
    """A learner's sessions: one that is prefilled anew, and one that goes on from a prompt."""

    def __init__(self, learner: Learner, prompt: Tensor) -> None:
        self.prompt = prompt
        self._fresh = Session(learner)
        self._after: Session | None = None
        self._chunk = learner.inner.chunk_size
        self.decoded = max(1, min(_DECODED, self._chunk // 4))

    def prefill(self, _: Any) -> Tensor:
        """Reads the prompt from the start."""
        self._fresh.reset()
        return self._fresh.prefill(self.prompt)

    @property
    def after(self) -> Session:
        """A session that has read the prompt, less what decoding fills its last chunk with."""
        if self._after is None:
            self._after = Session(self._fresh._learner)
            self._after.prefill(self.prompt[:, : -self._chunk // 2])
        return self._after

    def begin(self) -> Session:
        """A copy to decode from."""
        return self.after.clone()

    def decode(self, session: Session) -> None:
        """Tokens one by one, greedily; none completes a chunk."""
        logits = session.next_logits
        for _ in range(self.decoded):
            logits = session.prefill(logits.argmax(dim=-1, keepdim=True))

    def full(self) -> Session:
        """A copy whose chunk is full: the next token is followed by a step."""
        session = self.after.clone()
        session.prefill(self.prompt[:, -(self._chunk // 2) :])
        return session

    def step(self, session: Session) -> Tensor:
        """One token, and the inner step that waited for it."""
        return session.prefill(session.next_logits.argmax(dim=-1, keepdim=True))


def _cases(variants: dict[str, RunConfig], device: torch.device) -> list[Case | Missing]:
    first = next(iter(variants.values()))
    vocabulary, length = first.model.vocab_size or 0, first.data.sequence_length
    prompt = torch.randint(vocabulary, (1, length), device=device)
    cases: list[Case | Missing] = []
    for way, config in variants.items():
        learner = models.make(config, device).eval()
        reader = _Reader(learner, prompt)
        common: dict[str, Any] = {
            "way": way,
            "own_bytes": sum(p.nbytes for p in learner.parameters()),
            "extra": {"chunk": float(config.inner.chunk_size)},
        }
        cases.append(Case(name=PREFILL, run=reader.prefill, tokens=length, **common))
        cases.append(
            Case(
                name=DECODE,
                run=reader.decode,
                prepare=reader.begin,
                count=reader.decoded,
                tokens=1,
                **common,
            )
        )
        if way == E2E:
            run, prepare = reader.step, reader.full
            cases.append(Case(name=STEP, run=run, prepare=prepare, tokens=1, **common))
    return cases
