"""Operations of a TTT-E2E meta step, first order and on (primal, tangent) pairs.

Every operation has a plain definition in PyTorch (`reference.py`, differentiable any number of
times) and a first-order implementation with a closed-form backward (`op.py`). A *pair* is one
tensor with a leading axis of 2: index 0 the primal value, index 1 its tangent.
"""

from ttt_kernels.backend import Backend, backend
from ttt_kernels.clipped_sgd.op import (
    add_scaled_,
    clip_factor,
    scaled_differences,
    sequence_products,
)
from ttt_kernels.deferred import WeightGradients, putting_off, weight_gradients
from ttt_kernels.fast_linear.op import fast_linear, fast_linear_pair
from ttt_kernels.fp8_linear.op import Float8Weight, fp8_linear, fp8_linear_pair, fp8_weight
from ttt_kernels.fp8_linear.scaling import CurrentScaling, DelayedScaling
from ttt_kernels.linear.op import linear, linear_pair
from ttt_kernels.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_pair
from ttt_kernels.mode import plain_definitions, uses_plain_definitions
from ttt_kernels.rms_norm.op import rms_norm, rms_norm_pair
from ttt_kernels.rope.op import rope, rotations
from ttt_kernels.rounded import RoundedWeights, using
from ttt_kernels.swa_attention.op import swa_attention, swa_attention_pair
from ttt_kernels.swiglu.op import swiglu, swiglu_pair

__all__ = [
    "Backend",
    "CurrentScaling",
    "DelayedScaling",
    "Float8Weight",
    "RoundedWeights",
    "WeightGradients",
    "add_scaled_",
    "backend",
    "clip_factor",
    "fast_linear",
    "fast_linear_pair",
    "fp8_linear",
    "fp8_linear_pair",
    "fp8_weight",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_pair",
    "linear_pair",
    "plain_definitions",
    "putting_off",
    "rms_norm",
    "rms_norm_pair",
    "rope",
    "rotations",
    "scaled_differences",
    "sequence_products",
    "swa_attention",
    "swa_attention_pair",
    "swiglu",
    "swiglu_pair",
    "uses_plain_definitions",
    "using",
    "weight_gradients",
]
