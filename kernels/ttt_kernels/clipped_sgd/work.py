"""What the passes over fast weights move."""

from ttt_kernels.work import Work


def clipped_sgd_work(
    kernel: str, *, weights: int, sequences: int = 1, weight_size: int = 4, gradient_size: int = 4
) -> Work:
    """The passes `norm` (of a gradient), `product` (⟨gradient, v⟩), `step` and `difference`.

    weights: fast weights of a sequence; sizes: bytes of a weight (and of v) and of an entry of the
    gradient. Scales and sums, a number a sequence, are left out. Raises KeyError for another
    kernel.
    """
    sizes = {
        "norm": gradient_size,
        "product": gradient_size + weight_size,
        "step": gradient_size + 2 * weight_size,
        "difference": gradient_size + 2 * weight_size,
    }
    return Work(0, sequences * weights * sizes[kernel])
