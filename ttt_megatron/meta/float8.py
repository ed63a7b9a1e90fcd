"""What a float8 product does with operands of a sweep."""

from torch import Tensor, nn

from ttt_megatron.meta.pair import Pair
from ttt_megatron.meta.tape import Recorded, keep_adjoint
from ttt_megatron.model import ops
from ttt_megatron.model.float8 import Float8Product


@ops.float8_linear.rule(Recorded)
def _recorded(x: Recorded, weight: Tensor, product: nn.Module) -> Recorded:
    entry = x.tape.new_entry()
    keeps_adjoints = x.tape.policy == "save_all"
    out: Tensor = product(keep_adjoint(x.value, entry) if keeps_adjoints else x.value, weight)
    entry.output = out.detach()
    return x.like(out)


@ops.float8_linear.rule(Pair)
def _pair(x: Pair, weight: Tensor, product: Float8Product) -> Pair:
    kept = x.playback.next()
    return x.like(product.pair(x.stacked, weight, kept.output, kept.dot_input()))
