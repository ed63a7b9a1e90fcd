"""What `train --outcome` leaves for the script that decides whether there is another attempt."""

import pytest
from cluster.cluster_case import write_recipe

from ttt_megatron.cli.main import main
from ttt_megatron.cluster.outcome import (
    FINISHED,
    REFUSED,
    STOPPED,
    read_outcome,
    telling_outcome,
    write_outcome,
)
from ttt_megatron.errors import PassingError, UserError


def test_a_word_and_one_line(tmp_path):
    path = tmp_path / "outcome"
    assert read_outcome(path) is None
    for word, words in ((FINISHED, ""), (STOPPED, ""), (REFUSED, "rank 1: no data")):
        write_outcome(path, word, words)
        found = read_outcome(path)
        assert (found.ended, found.words) == (word, words)
    write_outcome(path, REFUSED, "two\nlines")
    assert path.read_text() == "refused two lines\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_that_may_pass_is_not_written_down(tmp_path):
    path = tmp_path / "outcome"
    with pytest.raises(PassingError), telling_outcome(path):
        raise PassingError("the disk is full")
    with pytest.raises(RuntimeError), telling_outcome(path):
        raise RuntimeError
    assert not path.exists()
    with pytest.raises(UserError), telling_outcome(path):
        raise UserError("no such key")
    assert path.read_text() == "refused no such key\n"


def test_a_refused_run_is_not_begun_again(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "none", str(tmp_path / "run"))
    words = ["train", str(recipe), "--outcome", str(tmp_path / "outcome")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "index.json is missing" in error
    assert (tmp_path / "outcome").read_text() == error.replace("error:", "refused")
    assert main(words) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seen", ["by other nodes", "before", "never"])
def test_data_whose_mount_is_missing_is_tried_again(seen, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if seen == "by other nodes" else "2")
    if seen == "before":
        (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "none", str(tmp_path / "run"))
    words = ["train", str(recipe), "--outcome", str(tmp_path / "outcome")]
    assert main(words) == (2 if seen == "never" else 75)
    assert "rank 0: " in capsys.readouterr().err
    assert (tmp_path / "outcome").exists() == (seen == "never")


def test_kernels_for_a_gpu_that_is_gone_are_tried_again(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "none", str(tmp_path / "run"))
    words = ["train", str(recipe), "training.device=auto", "training.cuda_graphs=true"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*words, "parallel.data=1"]) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([*words, "parallel.data=1"]) == 75
    assert "torch finds no CUDA device here" in capsys.readouterr().err
