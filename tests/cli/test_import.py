"""`ttt-megatron import`: from another implementation's folder to a run that goes on from it."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tokenizer import WORDS, save_tokenizer

from ttt_megatron.cli.main import main
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import newest_complete, read_config
from ttt_megatron.training.run import run_training
from ttt_megatron.training.weights import read_weights

OFFICIAL = Path(__file__).parents[1] / "golden" / "official_checkpoint"
SETTINGS = (
    "model.window_size=20",
    "model.rope_theta=5e5",
    "model.norm_eps=1e-6",
    "inner.chunk_size=8",
    "inner.lr=0.5",
    "inner.clip=0.3",
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder of an imported checkpoint, with a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("imported")
    words = save_tokenizer(folder / "tokenizer")
    arguments = ["import", "--from", "jax", str(OFFICIAL), "--tokenizer", str(words)]
    length = "data.sequence_length=32"
    assert main([*arguments, "--output", str(folder / "run"), *SETTINGS, length]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def data(imported: Path) -> Path:
    """Prepared with the same tokenizer. Read only."""
    generator = random.Random(3)
    source, output = imported.parent / "text", imported.parent / "data"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.txt").write_text(" ".join(generator.choices(WORDS, k=200)))
    tokenizer = str(imported.parent / "tokenizer")
    prepare(
        PrepareOptions(
            inputs=(str(source),),
            output=str(output),
            tokenizer=tokenizer,
            validation=0.25,
            workers=1,
        )
    )
    return output


def _config(imported: Path, data: Path, output: Path) -> RunConfig:
    """The imported checkpoint's own configuration, for one step on the CPU."""
    checkpoint = newest_complete(imported / "checkpoints")
    assert checkpoint is not None
    config = read_config(checkpoint)
    return replace(
        config,
        data=replace(config.data, path=str(data)),
        optimizer=replace(config.optimizer, warmup_fraction=0.0),
        training=replace(
            config.training,
            steps=1,
            global_batch_size=2,
            micro_batch_size=2,
            eval_sequences=0,
            device="cpu",
            output=str(output),
        ),
        tracking=replace(config.tracking, mlflow=False, progress=False),
    )


def test_generate_reads_what_was_imported(imported: Path, capsys) -> None:
    arguments = ["generate", str(imported), "--prompt", "sea whale ship " * 6, "--device", "cpu"]
    assert main([*arguments, "--greedy", "--tokens", "3"]) == 0
    assert "2 inner steps" in capsys.readouterr().err


def test_parameters_counts_what_was_imported(imported: Path, capsys) -> None:
    (recipe,) = imported.glob("checkpoints/*/run.yaml")
    assert main(["parameters", str(recipe)]) == 0
    assert "9,952" in capsys.readouterr().out


def test_a_run_trains_on_from_it(imported: Path, data: Path, tmp_path: Path) -> None:
    config = _config(imported, data, tmp_path / "run")
    training = replace(config.training, init_from=str(imported))
    run_training(replace(config, training=training))
    before = read_weights(next(imported.glob("checkpoints/*")))
    after = read_weights(tmp_path / "run/checkpoints/step-00000001")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        moved = (after[name] - tensor).abs().max()
        # One step of AdamW: no entry moves by much more than the rate, and every tensor moves.
        assert 0 < moved < 2 * config.optimizer.lr, name


def test_the_folder_itself_is_no_run_to_go_on_with(imported: Path, data: Path) -> None:
    checkpoint = newest_complete(imported / "checkpoints")
    assert checkpoint is not None
    config = read_config(checkpoint)
    same = replace(
        config,
        data=replace(config.data, path=str(data)),
        tracking=replace(config.tracking, mlflow=False, progress=False),
    )
    with pytest.raises(UserError, match=r"holds weights alone.*training\.init_from"):
        run_training(same)


def _refused(capsys, *arguments: str) -> str:
    """The error that the command ends with."""
    assert main(["import", "--from", "jax", str(OFFICIAL), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_tokenizers_are_asked_for_and_held_to_the_model(tmp_path: Path, capsys) -> None:
    output = ("--output", str(tmp_path / "run"), *SETTINGS)
    assert "holds no tokenizer: give --tokenizer" in _refused(capsys, *output)
    message = _refused(capsys, *output, "--tokenizer", "bytes")
    assert "has 257 ids" in message
    assert "50 rows" in message
    large = save_tokenizer(tmp_path / "large", 51)
    assert "has 51 ids" in _refused(capsys, *output, "--tokenizer", str(large))
    assert "there is no" in _refused(capsys, *output, "--tokenizer", str(tmp_path / "none.json"))
    small = save_tokenizer(tmp_path / "small", 50)
    named = _refused(capsys, *output, "--tokenizer", str(small), "--bos", "<begin>")
    assert "<begin>" in named
    assert not (tmp_path / "run").exists()
    assert main(["import", "--from", "jax", str(OFFICIAL), *output, "--tokenizer", str(small)]) == 0


def test_arguments_are_held_to_what_they_can_be(tmp_path: Path, capsys) -> None:
    given = ("--tokenizer", "none", "--output", str(tmp_path / "run"))
    assert "neither SOURCE nor key=value" in _refused(capsys, *given, "another", *SETTINGS)
    assert "inner.clip" in _refused(capsys, *given, *SETTINGS[:-1])
    assert "unknown key model.windows" in _refused(capsys, *given, "model.windows=3")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert "exists and is not empty" in _refused(capsys, *given, *SETTINGS)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_weights_alone_are_no_model_to_generate_with(tmp_path: Path, capsys) -> None:
    output = ["--output", str(tmp_path / "run"), "--tokenizer", "none", *SETTINGS]
    assert main(["import", "--from", "jax", str(OFFICIAL), *output]) == 0
    written = capsys.readouterr().out
    assert "9,952 parameters" in written
    assert f"training.init_from={tmp_path / 'run'}" in written
    assert main(["generate", str(tmp_path / "run"), "--prompt", "sea", "--device", "cpu"]) == 2
    assert "tokenizer.meta.json is missing" in capsys.readouterr().err
    weights = read_weights(next((tmp_path / "run").glob("checkpoints/*")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
