"""What the output head takes: products of tokens, vocabulary and width, and bytes."""

from ttt_kernels.work import Work, product

# Logits; the cotangent of h; the cotangent of the head's weights.
_PRODUCTS = {"loss": 1, "hidden": 2, "full": 3, "pair": 6, "pair_known": 5}


def head_work(
    kernel: str, *, tokens: int, vocabulary: int, width: int, element_size: int = 2
) -> Work:
    """The least work: every logit formed once, and none of them in memory.

    `kernel` is `loss` alone, `hidden` (with the gradient of the hidden states: the forward
    sweep's), `full` (with the weights' gradient too), `pair`, or `pair_known` where the tangent's
    cotangent is kept. element_size: bytes of a hidden state; the head's weights are float32 and
    read once, their gradient is float32 and written once. Raises KeyError for another kernel.
    """
    flops = _PRODUCTS[kernel] * product(tokens, vocabulary, width)
    tensors = {"loss": 1, "hidden": 2, "full": 2, "pair": 4, "pair_known": 5}[kernel]
    matrices = 1 if kernel in ("loss", "hidden") else 2
    moved = tensors * tokens * width * element_size + 4 * matrices * vocabulary * width
    return Work(flops, moved)
