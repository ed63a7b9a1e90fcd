"""TTT-KVB: layers whose fast MLPs learn at test time to give a value for its key.

"TTT with key-value binding" is what arXiv 2512.23675 calls the layers of arXiv 2407.04620
(TTT-MLP) and 2505.23884 (LaCT), and derives TTT-E2E from (section 2.4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ttt_kernels
from ttt_kernels.dtypes import accumulation_dtype
from ttt_megatron.baselines.ttt_kvb_chunk import Run, read_run, take_step
from ttt_megatron.baselines.ttt_kvb_fast import Binding, FastWeights
from ttt_megatron.baselines.ttt_kvb_state import TTTKVBState, common_place, pack, unpack
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.decay import vectors
from ttt_megatron.model.slots import Slots, optional_norm


class TTTKVB(nn.Module):
    """One layer; its fast MLPs' parameters (fast_…) are where every sequence starts.

    Parameters beside the linear maps and norms: fast_fc1 [n, F, d], fast_fc2 [n, d, I],
    fast_bias1 [n, F] and fast_bias2 [n, d] (gelu), binding_gain and binding_bias [n, d] (squared),
    rate_bias [n] (learned rates). Raises ValueError where slots cut layers into
    parts.
    """

    def __init__(self, config: ModelConfig, slots: Slots) -> None:
        super().__init__()
        settings = config.ttt_kvb
        if slots.parts != 1:
            raise ValueError(f"TTT-KVB is not cut into parts, and there are {slots.parts}")
        self.config, self.settings = config, settings
        width, heads = config.hidden_size, settings.heads(config)
        head_dim, hidden = settings.head_dim(config), settings.fast_width(config)
        self.heads, self.head_dim = heads, head_dim
        # Columns: queries (but with the simplified output rule), keys, values; heads within each.
        self.linear_qkv = slots.column(width, (3 if settings.has_queries else 2) * width)
        norm = optional_norm(config.qk_norm, slots)
        if settings.has_queries:
            self.q_layernorm = norm(head_dim, config.norm_eps)
        self.k_layernorm = norm(head_dim, config.norm_eps)
        rows = settings.gates * hidden
        self.fast_fc1 = nn.Parameter(torch.empty(heads, rows, head_dim))
        self.fast_fc2 = nn.Parameter(torch.empty(heads, head_dim, hidden))
        self.fast_bias1 = self._vector(heads, rows, wanted=settings.has_biases)
        self.fast_bias2 = self._vector(heads, head_dim, wanted=settings.has_biases)
        self.binding_gain = self._vector(heads, head_dim, wanted=settings.loss == "squared")
        self.binding_bias = self._vector(heads, head_dim, wanted=settings.loss == "squared")
        learned = settings.rate_form != "constant"
        self.linear_rate = slots.column(width, heads) if learned else None
        self.rate_bias = self._vector(heads, wanted=learned)
        self.out_layernorm = slots.norm(head_dim, config.norm_eps)
        self.linear_proj = slots.row(width, width)

    def forward(
        self, x: Tensor, rotation: Tensor, past: TTTKVBState | None
    ) -> tuple[Tensor, TTTKVBState]:
        """[b, T, H] → [b, T, H], and the state after the last token.

        past is the state before the first one, None where nothing was read; rotation [T, d/2] are
        attention's angles, used where positions are absolute. A step is taken as soon as its
        chunk is full. Raises ValueError if rows of past are at different places of their chunks.
        """
        parameters = FastWeights(self.fast_fc1, self.fast_fc2, self.fast_bias1, self.fast_bias2)
        initial = self._initial(parameters, x)
        weights, total, seen = initial, None, 0
        if past is not None:
            seen = common_place(past.seen)
            weights = unpack(past.fast, parameters)
            total = unpack(past.total, parameters) if seen else None
        run = self._project(x, rotation, seen)
        binding = self._binding()
        outs, start, chunk_size = [], 0, self.settings.chunk_size
        while start < x.shape[1]:
            stop = min(start + chunk_size - seen, x.shape[1])
            piece = _cut(run, start, stop)
            out, total = read_run(piece, weights, total, seen, binding, self.settings)
            outs.append(out)
            seen, start = seen + stop - start, stop
            if seen == chunk_size:
                weights = take_step(weights, total, initial, self.settings)
                total, seen = None, 0
        heads = torch.cat(outs, dim=2).transpose(1, 2).to(x.dtype)
        out = self.linear_proj(self.out_layernorm(heads).flatten(-2))
        fast = pack(weights)
        summed = torch.zeros_like(fast) if total is None else pack(total)
        place = torch.full((len(x),), seen, dtype=torch.int64, device=x.device)
        return out, TTTKVBState(fast, summed, place)

    def _initial(self, parameters: FastWeights, x: Tensor) -> FastWeights:
        dtype = accumulation_dtype(x.dtype)
        fc1, fc2, bias1, bias2 = (
            None if part is None else part.to(dtype).expand(len(x), *part.shape)
            for part in parameters
        )
        assert fc1 is not None
        assert fc2 is not None
        return FastWeights(fc1, fc2, bias1, bias2)

    def _binding(self) -> Binding:
        return Binding(
            loss=self.settings.loss,
            gain=self.binding_gain,
            bias=self.binding_bias,
            eps=self.config.norm_eps,
        )

    def _project(self, x: Tensor, rotation: Tensor, seen: int) -> Run:
        """What the layer makes of its input before anything is fast: [b, n, T, …] each."""
        parts = self.linear_qkv(x).unflatten(-1, (-1, self.heads, self.head_dim)).unbind(2)
        *queries, k, v = parts
        k = self._rotated(self.k_layernorm(k), rotation, seen).transpose(1, 2)
        q = None
        if queries:
            q = self._rotated(self.q_layernorm(queries[0]), rotation, seen).transpose(1, 2)
        return Run(q, k, v.transpose(1, 2), self._rates(x))

    def _rotated(self, x: Tensor, rotation: Tensor, seen: int) -> Tensor:
        """Turn x [b, T, n, d] by the positions' angles."""
        if self.settings.positions == "none":
            return x
        if self.settings.positions == "absolute":
            # Attention's heads may be others, and its angles are those of their width.
            split = x.flatten(-2).unflatten(-1, (self.config.num_heads, -1))
            return ttt_kernels.rope(split, rotation).flatten(-2).unflatten(-1, x.shape[-2:])
        size, theta = self.settings.chunk_size, self.config.rope_theta
        table = ttt_kernels.rotations(0, size, self.head_dim, theta, x)
        places = torch.arange(seen, seen + x.shape[1], device=x.device) % size
        return ttt_kernels.rope(x, table[places])

    def _rates(self, x: Tensor) -> Tensor:
        """Every token's inner learning rate: [b, n, T].

        Divided by the head's width, which is a normalised key's squared length.
        """
        dtype, rate = accumulation_dtype(x.dtype), self.settings.rate
        if self.linear_rate is None or self.rate_bias is None:
            fixed = torch.full((1, 1, 1), rate / self.head_dim, dtype=dtype, device=x.device)
            return fixed.expand(len(x), self.heads, x.shape[1])
        logits = self.linear_rate(x).to(dtype) + self.rate_bias.to(dtype)
        if self.settings.rate_form == "sigmoid":
            rates = rate * torch.sigmoid(logits)
        else:
            rates = F.softplus(logits + rate + math.log(-math.expm1(-rate)))
        return (rates / self.head_dim).transpose(1, 2)

    @staticmethod
    def _vector(*shape: int, wanted: bool) -> nn.Parameter | None:
        return vectors(torch.empty(shape)) if wanted else None


def _cut(run: Run, start: int, stop: int) -> Run:
    """Tokens start … stop−1 of a run."""
    span = slice(start, stop)
    q = None if run.q is None else run.q[:, :, span]
    return Run(q, run.k[:, :, span], run.v[:, :, span], run.rate[:, :, span])
