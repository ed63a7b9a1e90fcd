"""What a linear map with weights of each sequence's own takes."""

from ttt_kernels.work import Work, product

# Products a pass forms, and tensors of the input's, output's and weights' size that it reads or
# writes. Weights and their gradients are float32.
_PASSES = {
    "forward": (1, 1, 1, 1),
    "backward": (2, 2, 1, 2),
    "pair_forward": (3, 2, 2, 2),
    "pair_backward": (5, 4, 2, 3),
}


def fast_linear_work(
    kernel: str,
    *,
    sequences: int,
    tokens: int,
    inputs: int,
    outputs: int,
    known: bool = False,
    element_size: int = 2,
) -> Work:
    """`kernel` is forward, backward, pair_forward or pair_backward.

    tokens: of a sequence; inputs and outputs: the weights are [outputs, inputs]; known: pairs
    reuse what the forward sweep kept, and copy instead of multiplying; element_size: bytes of an
    activation. Raises KeyError for another kernel.
    """
    products, in_tensors, out_tensors, weights = _PASSES[kernel]
    if known and kernel.startswith("pair"):
        products -= 1
        in_tensors += kernel == "pair_backward"
        out_tensors += kernel == "pair_forward"
    activations = tokens * (in_tensors * inputs + out_tensors * outputs) * element_size
    flops = products * product(tokens, outputs, inputs)
    return Work(sequences * flops, sequences * (activations + 4 * weights * outputs * inputs))
