"""What RMSNorm moves."""

from ttt_kernels.work import Work

# Tensors of the rows' size, and float32 numbers a row, that a pass reads or writes.
_TENSORS = {"forward": (2, 1), "backward": (3, 1), "pair_forward": (4, 2), "pair_backward": (6, 2)}


def rms_norm_work(kernel: str, *, rows: int, width: int, element_size: int = 2) -> Work:
    """`kernel` is forward, backward, pair_forward or pair_backward; the gain is float32.

    rows: rows that are normalised (a pair's value and tangent are one); element_size: bytes.
    Backward passes form the gain's gradient too. Raises KeyError for another kernel.
    """
    tensors, numbers = _TENSORS[kernel]
    gains = 2 if "backward" in kernel else 1
    return Work(0, tensors * rows * width * element_size + 4 * (numbers * rows + gains * width))
