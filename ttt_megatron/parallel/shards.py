"""Which part of every parameter a tensor-parallel rank holds."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """A parameter is cut along `axis` of its view in `pieces` equal pieces along axis 0.

    pieces 1 is the parameter itself; 2 is fc1, whose gate and up halves are each cut.
    """

    axis: int
    pieces: int = 1

    def view(self, x: Tensor) -> Tensor:
        """The tensor with the cut along one axis: [out, in], or [2, out/2, in]."""
        return x if self.pieces == 1 else x.unflatten(0, (self.pieces, -1))

    @property
    def view_axis(self) -> int:
        """The axis of the view that is cut."""
        return self.axis if self.pieces == 1 else self.axis + 1

    def take(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """A rank's part of the whole parameter."""
        part = self.view(whole).chunk(size, dim=self.view_axis)[rank]
        return part.flatten(0, 1) if self.pieces > 1 else part

    def blocks(self, part: Tensor, rank: int, size: int) -> list[tuple[int, Tensor]]:
        """A rank's part as blocks of the whole parameter: each with its index along `axis`.

        The whole parameter is `size` × `pieces` such blocks, one behind the other. The blocks
        share the part's memory.
        """
        return [
            (piece * size + rank, block)
            for piece, block in enumerate(part.chunk(self.pieces, dim=self.axis))
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole parameter from all ranks' parts."""
        whole = torch.cat([self.view(part) for part in parts], dim=self.view_axis)
        return whole.flatten(0, 1) if self.pieces > 1 else whole


_CUTS = {
    "linear_qkv": Cut(0),
    "linear_proj": Cut(1),
    "linear_fc1": Cut(0, pieces=2),
    "linear_fc2": Cut(1),
    "embedding": Cut(0),
    "output": Cut(0),
}


def cut_of(name: str) -> Cut | None:
    """How the parameter of this name is cut; None if every rank has all of it."""
    module = name.rsplit(".", 2)[-2] if "." in name else name
    return _CUTS.get(module)


def whole_shape(name: str, local: torch.Size, size: int) -> torch.Size:
    """The shape of the whole parameter, given a part's."""
    cut = cut_of(name)
    if cut is None:
        return local
    shape = list(local)
    shape[cut.axis] *= size
    return torch.Size(shape)


def take_part(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """A rank's part of the whole parameter of this name."""
    cut = cut_of(name)
    return whole if cut is None else cut.take(whole, rank, size)
