"""What RoPE moves."""

from ttt_kernels.work import Work


def rope_work(
    *, tokens: int, heads: int, head_dim: int, copies: int = 1, element_size: int = 2
) -> Work:
    """One rotation, forwards or back.

    copies: sequences, times 2 for a pair, that share the table of angles (float32, [tokens,
    head_dim]); element_size: bytes.
    """
    entries = copies * tokens * heads * head_dim
    return Work(0, 2 * entries * element_size + 4 * tokens * head_dim)
