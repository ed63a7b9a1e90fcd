"""A run over many GPUs in one process: what it tells, and the sentence for whatever would fail."""

from pathlib import Path

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.config.layouts import read_layouts
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.errors import UserError
from ttt_megatron.planning.hardware import find_hardware
from ttt_megatron.simulation.simulate import simulate_run

RECIPES = Path(__file__).parents[2] / "recipes"
BF16 = find_hardware("h100")


def simulate(recipe, overrides, gpus, hardware=BF16):
    return simulate_run(RECIPES / f"{recipe}.yaml", overrides.split(), gpus, hardware)


def test_the_command_tells_everything_of_a_published_recipe(capsys):
    path = RECIPES / "3b" / "extend-e2e-128k.yaml"
    assert main(["train", str(path), "--simulate-world", "128"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "3b-extend-e2e-128k on 128 x h100; nothing is trained",
        "3b/layouts.yaml",
        "16 sequences of 131,072 tokens",
        "s a step",
        "every rank is once in a group of every kind",
        "GiB optimizer",
        "every token of a batch is read once",
        "not checked  data: there is no data/extend here",
        "not checked  weights: there is no runs/3b-pretrain-e2e-8k here",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("recipe", "overrides", "gpus", "messages"),
    [
        ("125m/pretrain-e2e-8k", "parallel.tensor=2 parallel.context=2 parallel.pipeline=2", 16, 1),
        ("125m/pretrain-e2e-8k", "parallel.context=4 parallel.context_order=zigzag", 8, 1),
        ("125m/pretrain-e2e-8k", "parallel.pipeline=2 parallel.virtual_pipeline=2", 8, 1),
        ("125m/extend-full-32k", "parallel.context=4", 8, 1),
        ("125m/pretrain-mamba2-8k", "parallel.pipeline=2", 8, 1),
        ("125m/pretrain-e2e_all-8k", "parallel.tensor=4 parallel.sequence_parallel=true", 32, 0),
        ("125m/pretrain-hybrid-8k", "parallel.tensor=2 training.precision=fp8", 8, 0),
        ("125m/pretrain-off-8k", "optimizer.engine=deepspeed parallel.data=4", 4, 0),
    ],
)
def test_layouts_of_every_kind_fit_together(recipe, overrides, gpus, messages):
    found = simulate(recipe, overrides, gpus)
    parallel = found.config.parallel
    assert found.world.size == parallel.world_size == gpus
    assert len(found.parts) == parallel.pipeline * parallel.tensor
    assert bool(found.messages) == messages
    assert found.data.tokens * parallel.data * parallel.context == (
        found.config.training.global_batch_size * found.config.data.sequence_length
    )


REFUSALS = [
    ("125m/pretrain-e2e-8k", "parallel.data=2", 8, "makes 2 processes, and 8 were started"),
    ("125m/pretrain-e2e-8k", "parallel.tensor=4", 6, "a replica takes 4 processes .* divide 6"),
    ("125m/pretrain-e2e-8k", "parallel.tensor=8", 8, "does not divide model.num_heads = 12"),
    ("125m/pretrain-e2e-8k", "parallel.pipeline=16", 16, "more stages than the 9 blocks"),
    ("125m/pretrain-e2e-8k", "parallel.context=16", 16, "does not divide the 8 chunks"),
    ("125m/pretrain-e2e-8k", "parallel.data=3", 3, "global_batch_size = 64 is not a multiple"),
    ("125m/pretrain-e2e-8k", "optimizer.beta1=2", 8, "optimizer.beta1 = 2.0 must be"),
    ("125m/pretrain-mamba2-8k", "parallel.tensor=2", 8, "mamba2 .* is not cut"),
    ("125m/pretrain-hybrid-8k", "parallel.context=2", 8, "asks for more; set parallel.context=1"),
    (
        "125m/pretrain-e2e-8k",
        "model.vocab_size=128257 parallel.tensor=2",
        8,
        "does not divide the model.vocab_size=128257",
    ),
    ("125m/pretrain-e2e-8k", "model.vocab_size=null parallel.data=8", 8, "vocab_size is not set"),
    (
        "3b/pretrain-e2e-8k",
        "parallel.data=8 training.micro_batch_size=16",
        8,
        r"3b-pretrain-e2e-8k on 8 GPUs as DP8 .* needs [\d.]+ GiB a GPU of 72.8 usable",
    ),
    ("8b/pretrain-mamba2-8k", "parallel.data=1", 1, r"optimizer state alone are 117\.\d GiB"),
    ("125m/extend-mamba2-128k", "", 128, "no layout divides 128 GPUs among 8 sequences"),
    ("125m/extend-e2e-32k", "training.init_from=recipes", 8, "recipes .*checkpoint"),
]


@pytest.mark.parametrize(("recipe", "overrides", "gpus", "message"), REFUSALS)
def test_what_would_fail_on_the_cluster_fails_here(recipe, overrides, gpus, message):
    with pytest.raises(UserError, match=message):
        simulate(recipe, overrides.replace("=recipes", f"={RECIPES}"), gpus)


def test_hardware_without_float8_is_refused():
    settings = "parallel.data=8 training.precision=fp8"
    a100 = find_hardware("a100")
    with pytest.raises(UserError, match="a100-80 has no products in float8"):
        simulate("125m/pretrain-e2e-8k", settings, 8, a100)


def test_data_that_is_there_is_checked(tmp_path):
    (tmp_path / "text.txt").write_text("a short text " * 100)
    options = PrepareOptions(
        inputs=(str(tmp_path / "text.txt"),),
        output=str(tmp_path / "data"),
        validation=0,
        workers=1,
    )
    prepare(options)
    short = f"data.path={tmp_path / 'data'} training.eval_sequences=0"
    with pytest.raises(UserError, match=r"data\.sequence_length=8192 needs 8193"):
        simulate("125m/pretrain-e2e-8k", short, 8)
    fits = f"{short} data.sequence_length=1024 training.global_batch_size=64 parallel.data=8"
    assert not any(
        text.startswith("data:") for text in simulate("125m/pretrain-e2e-8k", fits, 8).unchecked
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--simulate-world", "0"], "--simulate-world 0: give a number of at least 1"),
        (["--simulate-world", "8", "--gpu", "h10"], "--gpu h10: known GPUs are"),
    ],
)
def test_the_command_refuses_in_words(words, message, capsys):
    assert main(["train", str(RECIPES / "125m" / "pretrain-e2e-8k.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


def all_layouts():
    for path in sorted(RECIPES.glob("*/layouts.yaml")):
        for key, one in read_layouts(path).layouts.items():
            if one.unfit is None:
                yield (path.parent.name, *key)


@pytest.mark.slow
def test_every_layout_of_every_recipe_fits_together():
    failed = []
    for size, name, gpus, precision in all_layouts():
        try:
            simulate(f"{size}/{name}", f"training.precision={precision}", gpus)
        except Exception as error:
            failed.append(f"{size}/{name} {gpus} {precision}: {error}")
    assert not failed, "\n".join(failed)
