"""Messages between neighbouring pipeline stages, outside of megatron-core's schedules.

Those know nothing of context parallelism, under which a rank has to run further ahead, nor of
batches of several sizes, as in an evaluation.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ttt_megatron.parallel.context_links import Channel


@dataclass(frozen=True, kw_only=True)
class StageLinks:
    """This rank's place, `rank` of `size`, in its pipeline.

    Every rank has `turns` stages and takes them in turn: stage i is on rank i mod size. What goes
    from stage to stage is a rank's own tokens, one of `token_parts` parts.
    """

    rank: int
    size: int
    turns: int
    token_parts: int
    forward: Channel
    backward: Channel

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the first stage."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the last stage."""
        return self.rank == self.size - 1

    def receive_stream(self, tokens: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """What left the stage before, for tokens [b, T]: [b, T / token_parts, width].

        In a backward pass its cotangent goes back there.
        """
        shape = tokens.shape[0], tokens.shape[1] // self.token_parts, width
        into = torch.empty(shape, dtype=dtype, device=tokens.device)
        self.forward.receive(into, (self.rank - 1) % self.size, "stream")
        if torch.is_grad_enabled():
            into.requires_grad_().register_hook(self._send_cotangent)
        return into

    def send_stream(self, stream: Tensor) -> None:
        """Hand a stage's output to the next stage."""
        message = stream.detach().contiguous()
        self.forward.send(message, (self.rank + 1) % self.size, "stream")

    def receive_cotangent(self, like: Tensor) -> Tensor:
        """The cotangent of what was sent, from the stage behind."""
        into = like.new_empty(like.shape)
        self.backward.receive(into, (self.rank + 1) % self.size, "stream")
        return into

    def _send_cotangent(self, cotangent: Tensor) -> None:
        self.backward.send(cotangent.contiguous(), (self.rank - 1) % self.size, "stream")

    def settle(self) -> None:
        """Wait until everything sent has arrived."""
        self.forward.settle()
        self.backward.settle()


def stage_links(
    group: ProcessGroup, turns: int, token_parts: int, timeout: timedelta | None = None
) -> StageLinks:
    """Links within this rank's pipeline; `timeout` is that of a wait for a message.

    Collective over all ranks of the run.
    """
    own = dist.get_process_group_ranks(group)
    found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    channels: list[Channel] = []
    for ranks in sorted({tuple(ranks) for ranks in found}):
        made = [dist.new_group(list(ranks), timeout=timeout) for _ in range(2)]
        if list(ranks) == own:
            channels = [Channel(one) for one in made]
    return StageLinks(
        rank=group.rank(),
        size=group.size(),
        turns=turns,
        token_parts=token_parts,
        forward=channels[0],
        backward=channels[1],
    )
