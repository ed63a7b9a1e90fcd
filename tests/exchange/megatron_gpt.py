"""Checkpoints that megatron-core's own GPTModel leaves, and what it computes."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig, dot_product_attention

from ttt_megatron.config import ParallelConfig
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.training.background_write import expect_results

VOCABULARY, LENGTH = 96, 24
SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "layernorm_epsilon": 1e-5,
    "qk_layernorm": True,
    "rotary_interleaved": False,
    "gated_linear_unit": True,
}


def tokens() -> torch.Tensor:
    """[2, LENGTH + 1] int64."""
    return torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(7))


def arguments(**changes: Any) -> argparse.Namespace:
    """What Megatron-LM stores of a run, one value of a class of its own included."""
    named = {
        "num_attention_heads": 4,
        "rotary_base": 5000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "window_size": None,
        "attention_backend": SimpleNamespace(name="unfused"),
        "params_dtype": torch.bfloat16,
        "iteration": 30,
    }
    return argparse.Namespace(**(named | changes))


def build(tied: bool, changes: dict[str, Any], tensor: int = 1) -> GPTModel:
    """A GPTModel whose gains are no ones; equal at any cut, but for the cut."""
    config = TransformerConfig(
        **(SHAPE | changes),
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        tensor_model_parallel_size=tensor,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        init_method_std=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    torch.manual_seed(0)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        rotary_base=5000,
        share_embeddings_and_output_weights=tied,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def save(
    folder: Path,
    tied: bool = False,
    changes: dict[str, Any] | None = None,
    args: argparse.Namespace | None = None,
    tensor: int = 1,
) -> torch.Tensor | None:
    """Saves as torch_dist into `folder`; the log-likelihoods [2, LENGTH] of one that is not cut."""
    with process_groups("cpu", ParallelConfig(tensor=tensor)), megatron_scope():
        model = build(tied, changes or {}, tensor)
        state: dict[str, Any] = dict(model.sharded_state_dict())
        if args is not None:
            state |= {"args": args, "iteration": args.iteration}
        folder.mkdir(parents=True, exist_ok=True)
        expect_results()
        dist_checkpointing.save(state, str(folder))
        return losses(model) if tensor == 1 else None


def save_old_format(folder: Path, args: argparse.Namespace) -> torch.Tensor:
    """Saves as one file of one rank into `folder`."""
    with process_groups("cpu", ParallelConfig()), megatron_scope():
        model = build(True, {})
        file = folder / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        optimizer = SimpleNamespace(state=[1, 2])
        torch.save(
            {"model": model.state_dict(), "args": args, "optimizer": optimizer, "iteration": 30},
            file,
        )
        return losses(model)


@torch.no_grad()
def losses(model: GPTModel) -> torch.Tensor:
    """The model's own loss of every token, [2, LENGTH] float32."""
    # Dropout, which is off, asks for CUDA's random state.
    dot_product_attention.tensor_parallel = SimpleNamespace(
        get_cuda_rng_tracker=lambda: SimpleNamespace(fork=nullcontext)
    )
    rows = tokens()
    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    logits = model(rows[:, :-1], positions, mask)
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    )
    return flat.view(2, LENGTH)
