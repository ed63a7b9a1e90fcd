"""Impossible values are refused, their neighbours are not."""

import pytest

from ttt_megatron.config import from_dict, load_recipe
from ttt_megatron.config.keys import known_keys
from ttt_megatron.errors import UserError

SMALL = (
    "model.num_layers=4",
    "model.num_suffix_layers=1",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.window_size=64",
    "data.sequence_length=256",
    "inner.chunk_size=32",
)


NUMBERS = [name for name, key in known_keys().items() if key.kind in (int, float)]
MAY_BE_ZERO = {
    "model.num_suffix_layers",  # with inner.mode=off
    "model.ttt_kvb.clip",
    "inner.clip",
    "inner.lr_start",
    "inner.lr_warmup_fraction",
    "data.seed",
    "faults.hang_minutes",
    "faults.max_rewinds",
    "optimizer.end_lr",
    "optimizer.warmup_fraction",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "training.seed",
    "training.milestone_interval",
    "training.eval_interval",
    "training.eval_sequences",
}


@pytest.fixture
def resolve(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("")

    def load(*overrides: str):
        return load_recipe(path, [*SMALL, *overrides])

    return load


@pytest.mark.parametrize(
    "overrides",
    [
        ["inner.chunk_size=48"],
        ["model.num_heads=5"],
        ["model.hidden_size=30", "model.num_heads=2"],
        ["model.num_heads=4", "model.num_kv_heads=3"],
        ["model.window_size=31"],
        ["model.num_suffix_layers=5"],
        ["model.num_suffix_layers=0"],
        ["model.num_suffix_layers=0", "inner.mode=naive"],
        ["model.num_suffix_layers=-1", "inner.mode=off"],
        ["training.global_batch_size=6", "training.micro_batch_size=4"],
        ["training.global_batch_size=8", "training.micro_batch_size=4", "parallel.data=4"],
        ["inner.segment_chunks=2"],
        ["inner.segment_chunks=9", "inner.two_level=true"],
        ["inner.segment_chunks=0", "inner.two_level=true"],
        ["inner.lr=0"],
        ["fp8.recipe=delayed"],
        ["fp8.history=4"],
        ["fp8.history=4", "training.precision=fp8"],
        ["fp8.recipe=delayed", "fp8.scaling=row", "training.precision=fp8"],
        ["fp8.backend=transformer_engine", "fp8.scaling=row", "training.precision=fp8"],
        ["fp8.backend=transformer_engine", "training.device=cpu", "training.precision=fp8"],
        [
            "fp8.backend=transformer_engine",
            "parallel.context_order=zigzag",
            "parallel.context=2",
            "training.precision=fp8",
        ],
        ["model.hidden_size=40", "training.precision=fp8"],
        ["model.ffn_hidden_size=200", "training.precision=fp8"],
        ["model.ffn_hidden_size=176", "parallel.tensor=2", "training.precision=fp8"],
        ["training.cuda_graphs=true", "training.device=cpu"],
        ["training.fused_norm=apex", "training.device=cpu"],
        ["training.fused_norm=transformer_engine", "training.precision=fp64"],
        ["optimizer.fused=apex", "training.device=cpu"],
        ["optimizer.fused=transformer_engine", "training.precision=fp64"],
        ["optimizer.fused=apex", "optimizer.engine=deepspeed"],
        ["training.cuda_graphs=true", "inner.mode=off"],
        ["training.cuda_graphs=true", "parallel.tensor=2"],
        ["training.cuda_graphs=true", "parallel.context=2", "parallel.context_order=zigzag"],
        [
            "fp8.backend=transformer_engine",
            "training.cuda_graphs=true",
            "training.precision=fp8",
        ],
        ["inner.clip=-1"],
        ["inner.lr_warmup_fraction=1.1"],
        ["optimizer.lr=0"],
        ["optimizer.lr=0.001", "optimizer.end_lr=0.002"],
        ["optimizer.beta1=1"],
        ["optimizer.beta2=-0.1"],
        ["optimizer.warmup_fraction=-0.1"],
        ["optimizer.warmup_fraction=1"],
        ["optimizer.clip_grad=-1"],
        ["optimizer.weight_decay=-1"],
        ["model.init_std=0"],
        ["model.vocab_size=0"],
        ["training.steps=0"],
        ["training.keep_last=0"],
        ["training.micro_batch_size=0"],
        ["training.log_interval=0"],
        ["training.output="],
        ["parallel.data=0"],
        ["parallel.overlap_param_gather=true"],
        ["parallel.tensor=3"],
        ["parallel.tensor=2", "model.num_kv_heads=1"],
        ["parallel.tensor=2", "model.ffn_hidden_size=1663"],
        ["parallel.tensor=2", "model.prime_ffn_hidden_size=5"],
        ["parallel.sequence_parallel=true"],
        ["parallel.context=3"],
        ["parallel.context=16"],
        ["parallel.tensor=2", "parallel.sequence_parallel=true", "inner.chunk_size=1"],
        ["parallel.context_order=zigzag"],
        ["parallel.context=8", "parallel.context_order=zigzag"],
        ["parallel.pipeline=2", "parallel.context=2", "parallel.context_order=zigzag"],
        ["parallel.pipeline=9"],
        ["parallel.virtual_pipeline=2"],
        ["parallel.virtual_pipeline=5", "parallel.pipeline=2"],
        ["parallel.virtual_pipeline=2", "parallel.pipeline=2"],
        ["optimizer.engine=fsdp"],
        ["optimizer.zero_stage=2"],
        ["optimizer.zero_stage=3", "optimizer.engine=deepspeed"],
        ["parallel.tensor=2", "optimizer.engine=deepspeed"],
        ["parallel.context=2", "optimizer.engine=deepspeed"],
        ["parallel.pipeline=2", "optimizer.engine=deepspeed"],
        ["parallel.overlap_grad_reduce=true", "optimizer.engine=deepspeed"],
        ["training.precision=fp64", "optimizer.engine=deepspeed"],
    ],
)
def test_impossible_values_are_refused_by_name_and_value(resolve, overrides):
    with pytest.raises(UserError) as caught:
        resolve(*overrides)
    key, _, value = overrides[0].partition("=")
    message = str(caught.value)
    assert any(override.partition("=")[0] in message for override in overrides)
    assert key in message
    assert value in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.window_size=32"],
        ["model.window_size=null"],
        ["model.window_size=16", "inner.mode=off"],
        ["model.num_suffix_layers=4"],
        ["model.num_suffix_layers=0", "inner.mode=off"],
        ["model.num_kv_heads=1"],
        ["inner.segment_chunks=8", "inner.two_level=true"],
        ["inner.two_level=true", "inner.memory_policy=save_all"],
        ["inner.clip=0"],
        ["inner.lr_start=0", "inner.lr_warmup_fraction=1"],
        ["optimizer.lr=1e-5", "optimizer.end_lr=1e-5"],
        ["optimizer.warmup_fraction=0", "optimizer.beta1=0"],
        ["training.steps=1", "training.eval_sequences=0"],
        ["training.global_batch_size=8", "training.micro_batch_size=2", "parallel.data=4"],
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
        ["parallel.tensor=2", "parallel.sequence_parallel=true"],
        ["parallel.tensor=2", "inner.chunk_size=1"],
        ["parallel.context=8", "parallel.tensor=2"],
        ["parallel.context=4", "parallel.context_order=zigzag"],
        ["parallel.pipeline=3", "parallel.context=2"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=1"],
        ["optimizer.engine=deepspeed", "training.precision=bf16"],
        ["optimizer.engine=deepspeed", "optimizer.zero_stage=2"],
        ["training.precision=fp8", "fp8.recipe=delayed", "fp8.history=4", "fp8.compute=fp32"],
        ["training.precision=fp8", "fp8.scaling=row", "parallel.tensor=2"],
        ["training.precision=fp8", "training.cuda_graphs=true"],
        ["training.cuda_graphs=true", "inner.mode=first_order", "parallel.context=2"],
        ["training.cuda_graphs=true", "parallel.pipeline=2", "inner.two_level=true"],
    ],
)
def test_values_at_the_edge_are_possible(resolve, overrides):
    resolve(*overrides)


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_negative_and_few_are_zero(resolve, name):
    with pytest.raises(UserError, match=rf"{name} = -1(\.0)? (must|is a share)"):
        resolve(f"{name}=-1")
    if name in MAY_BE_ZERO:
        resolve(f"{name}=0", "inner.mode=off")
    else:
        with pytest.raises(UserError, match=rf"{name} = 0(\.0)? must be greater"):
            resolve(f"{name}=0")


def test_what_faults_cannot_be(resolve):
    with pytest.raises(UserError, match="one step has no standard deviation"):
        resolve("faults.spike_window=1")
    with pytest.raises(UserError, match="half of the processes take longer"):
        resolve("faults.slow_rank_ratio=1")
    resolve("faults.drift_alarm=null")


def test_dictionaries_are_validated_too():
    with pytest.raises(UserError, match=r"step-7: training\.steps = 0 must be greater than 0"):
        from_dict({"training": {"steps": 0}}, source="step-7")
