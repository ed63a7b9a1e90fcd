"""Running modules with other tensors in place of their parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ttt_megatron.model.transformer import LanguageModel


@dataclass(frozen=True)
class ParameterSlot:
    """The place of one parameter: an attribute of a module."""

    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """What stands there now."""
        value = self.module._parameters[self.attribute]
        assert value is not None
        return value


def suffix_parameters(model: LanguageModel) -> list[ParameterSlot]:
    """The slow weights a chunk of the suffix uses, each once, the output head included."""
    first, *later = model.suffix_blocks
    entered = {first.attention_norm, first.self_attention, first.attention_post_norm}
    modules: list[nn.Module] = [child for child in first.children() if child not in entered]
    modules += [*later, model.final_norm, model.output or model.embedding]
    fast = {
        m for block in model.suffix_blocks if block.prime_mlp for m in block.prime_mlp.modules()
    }
    return [
        ParameterSlot(module, name)
        for top in modules
        for module in top.modules()
        if module not in fast
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


@contextmanager
def substituted(slots: Sequence[ParameterSlot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within this context the slots hold the given tensors instead of their parameters."""
    originals = [slot.module._parameters[slot.attribute] for slot in slots]
    try:
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.module._parameters[slot.attribute] = tensor  # type: ignore[assignment]
        yield
    finally:
        for slot, original in zip(slots, originals, strict=True):
            slot.module._parameters[slot.attribute] = original
