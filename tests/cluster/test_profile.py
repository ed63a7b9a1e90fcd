"""Profiles: those that come along, and what is refused."""

from pathlib import Path

import pytest
from cluster.cluster_case import cpu_profile, write_profile

from ttt_megatron.cluster.profile import FILES, Profile, limit_seconds, load_profile
from ttt_megatron.errors import UserError

NAMES = sorted(path.stem for path in (FILES / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_those_that_come_along_are_found_by_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    profile = load_profile(name)
    assert profile.name == name
    assert profile.processes >= 1


def test_one_of_the_current_folder_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TTT_MEGATRON_PROFILE", raising=False)
    assert load_profile().gpus_per_node == 8
    folder = tmp_path / "slurm" / "profiles"
    folder.mkdir(parents=True)
    write_profile(folder / "default.yaml", processes_per_node=3)
    write_profile(folder / "mine.yaml", environment={"OMP_NUM_THREADS": 4, "NAME": "a b"})
    assert load_profile().processes == 3
    monkeypatch.setenv("TTT_MEGATRON_PROFILE", "mine")
    assert load_profile().environment == {"OMP_NUM_THREADS": "4", "NAME": "a b"}
    assert load_profile(str(folder / "default.yaml")).processes == 3


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"partitoin": "a"}, "unknown key partitoin; the nearest known key is partition"),
        ({"container": {"image": "a", "mount": []}}, "the nearest known key is container.mounts"),
        ({"container": {"mounts": []}}, "container must hold an image"),
        ({"partition": 4}, "partition must be text (in quotes, if it looks like a number) or null"),
        ({"modules": "cuda"}, "modules must be a list of texts, not 'cuda'"),
        ({"environment": {"A": [1]}}, "environment must be `NAME: text` pairs"),
        ({"environment": {"A B": "1"}}, "environment: 'A B' is no name of a variable"),
        ({"sbatch_options": ["--x\n--y"]}, "sbatch_options holds the end of a line"),
        ({"gpus_per_node": -1}, "gpus_per_node = -1 must be at least 0"),
        ({"processes_per_node": None}, "gpus_per_node = 0 leaves a node without processes"),
        ({"time_limit": "a day"}, "time_limit = a day is no time of Slurm's"),
        ({"time_limit": "1", "warning_seconds": 60}, "warning_seconds = 60 begins before the job"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(keys, said):
    with pytest.raises(UserError) as error:
        cpu_profile(**keys)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such profile; give the path of a YAML file, or one of"):
        load_profile("nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        load_profile(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("1-0:0:5", 86405),
        ("1:2:3:4", None),
        ("-5", None),
        ("", None),
    ],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert limit_seconds(text) == seconds


def test_every_key_has_its_help():
    assert all(field.metadata.get("help") for field in Profile.__dataclass_fields__.values()), Path(
        __file__
    )
