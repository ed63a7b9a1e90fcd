"""What SwiGLU moves."""

from ttt_kernels.work import Work

# Tensors [rows, width] that a pass reads or writes.
_TENSORS = {"forward": 3, "backward": 5, "pair_forward": 6, "pair_backward": 10}


def swiglu_work(kernel: str, *, rows: int, width: int, element_size: int = 2) -> Work:
    """`kernel` is forward, backward, pair_forward or pair_backward.

    rows: tokens; width: the output's, half the input's; element_size: bytes. Raises KeyError for
    another kernel.
    """
    return Work(0, _TENSORS[kernel] * rows * width * element_size)
