"""The script of a job: bash and shellcheck find nothing wrong, and it does what it should.

What only a cluster can show is in test_real_slurm.py. Here srun, scontrol and scancel are small
programs of the test, so that every end an attempt can have is tried within seconds.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cluster.cluster_case import cpu_profile, write_profile, write_recipe
from sweeps.sweep_files import write_sweep

from ttt_megatron.cli.main import main
from ttt_megatron.cluster.profile import load_profile
from ttt_megatron.cluster.script import Job, render
from ttt_megatron.sweeps.points import make_points
from ttt_megatron.sweeps.slurm import array_script
from ttt_megatron.sweeps.sweep_file import read_sweep

AWKWARD = 'it\'s a "name" with $HOME and `date`'


def _job(folder: Path, **changes) -> Job:
    values = {
        "name": "run",
        "about": ["a run"],
        "folder": folder / "run" / "slurm",
        "work": folder,
        "command": ["recipe.yaml", "optimizer.lr=1e-3"],
        "python": "python",
        "outputs": {0: folder / "run"},
    }
    return Job(**{**values, **changes})


def _checked(text: str, folder: Path) -> str:
    path = folder / "script"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", "--exclude=SC2016", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout
    return text


@pytest.mark.parametrize(("name", "nodes"), [("default", 16), ("container", 1), ("cpu", 2)])
def test_scripts_of_the_profiles_are_sound(name, nodes, tmp_path):
    profile = load_profile(name)
    job = _job(tmp_path, nodes=nodes, processes=profile.processes)
    text = _checked(render(job, profile), tmp_path)
    assert f"#SBATCH --nodes={nodes}\n" in text
    assert f"--nnodes {nodes} --nproc-per-node {profile.processes} --max-restarts 3\n" in text
    assert ("#SBATCH --gpus-per-node=8\n" in text) == (name != "cpu")
    assert ("--container-image=ttt-megatron.sqsh" in text) == (name == "container")
    assert ("--label" in text) == (nodes > 1)
    assert f"#SBATCH --signal=B:TERM@{profile.warning_seconds}\n" in text


def test_everything_a_profile_can_say_is_in_the_script(tmp_path):
    profile = cpu_profile(
        **{"partition": "p", "account": "a", "qos": "q", "gpu_type": "h100", "gpus_per_node": 4},
        **{"memory": "0", "venv": "/my venv", "modules": ["cuda/13", "nccl"]},
        environment={"NCCL_SOCKET_IFNAME": AWKWARD},
        sbatch_options=["--exclusive", "--constraint=ib"],
        srun_options=["--mpi=none"],
    )
    text = _checked(render(_job(tmp_path, processes=4), profile), tmp_path)
    for line in (
        *("#SBATCH --partition=p", "#SBATCH --account=a", "#SBATCH --qos=q", "#SBATCH --mem=0"),
        *("#SBATCH --gpus-per-node=h100:4", "#SBATCH --exclusive", "#SBATCH --constraint=ib"),
        *("module load cuda/13", "module load nccl", "source '/my venv/bin/activate'"),
    ):
        assert f"\n{line}\n" in text
    assert "--mpi=none" in text
    exported = subprocess.run(
        [
            "bash",
            "-c",
            re.search(r"^export NCCL_SOCKET.*$", text, re.M).group()
            + '\nprintf %s "$NCCL_SOCKET_IFNAME"',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert exported == AWKWARD


def test_a_container_sees_the_folders_that_the_run_needs(tmp_path):
    profile = cpu_profile(container={"image": "i.sqsh", "mounts": ["/a:/b"]})
    text = render(_job(tmp_path, mounts=[Path("/data")]), profile)
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/a:/b" in text
    assert f"--container-workdir={tmp_path}" in text


def _mounted(printed: str) -> list[str]:
    return re.search(r"--container-mounts=([^ ']*)", printed).group(1).split(",")


def test_a_container_sees_where_links_lead_and_what_lies_elsewhere(tmp_path, monkeypatch, capsys):
    """As clusters have it: runs and data on a scratch disk, linked into the folder of the code."""
    work, scratch, shared = tmp_path / "work", tmp_path / "scratch", tmp_path / "shared"
    for folder in (work, scratch / "runs", shared / "recipes" / "small"):
        folder.mkdir(parents=True)
    (work / "runs").symlink_to(scratch / "runs")
    (work / "data").symlink_to(scratch / "data")  # which comes later
    recipe = write_recipe(shared / "recipes" / "small" / "r.yaml", "data/words", "runs/r")
    text = recipe.read_text().replace("name: r", "name: r\nextends: ../../bases/b.yaml")
    recipe.write_text(text)
    (shared / "bases").mkdir()
    (shared / "bases" / "b.yaml").write_text("inner: {lr: 0.1}\n")
    write_profile(work / "p.yaml", container={"image": "i.sqsh"})
    monkeypatch.chdir(work)
    words = [str(recipe), f"training.init_from={tmp_path}/old/run", "--profile", "p.yaml"]
    assert main(["submit", *words, "parallel.data=1", "--dry-run"]) == 0
    wanted = [work, scratch / "runs", scratch / "data" / "words", tmp_path / "old" / "run"]
    wanted += [shared / "recipes" / "small", shared / "bases"]
    assert _mounted(capsys.readouterr().out) == [f"{path}:{path}" for path in wanted]


def test_a_container_of_a_sweep_sees_them_too(tmp_path, monkeypatch):
    work, shared = tmp_path / "work", tmp_path / "shared"
    for folder in (work, tmp_path / "scratch", shared):
        folder.mkdir(parents=True)
    (work / "runs").symlink_to(tmp_path / "scratch")
    path = write_sweep(shared, tmp_path / "data", axes={"inner.lr": [1, 2]})
    monkeypatch.chdir(work)
    sweep, output = read_sweep(path), Path("runs/sweep")
    points = make_points(sweep, output, [])
    profile = cpu_profile(container={"image": "i.sqsh"})
    text = array_script(sweep, points, output, None, [], profile)
    wanted = [work, tmp_path / "scratch" / "sweep", tmp_path / "data", shared]
    assert sorted(_mounted(text)) == sorted(f"{path}:{path}" for path in wanted)


def test_awkward_words_reach_the_run_as_they_are(tmp_path):
    cluster = _Cluster(
        tmp_path, [f'printf "%s\\n" "$@" >{tmp_path}/words; echo finished >"$outcome"']
    )
    cluster.run(command=["recipe.yaml", f"name={AWKWARD}"])
    assert f"name={AWKWARD}" in (tmp_path / "words").read_text().splitlines()


TOOLS = {
    "srun": 'exec bash "$SRUN_DOES" "$@"',
    "scontrol": """case "$1" in
        show) [[ $2 = job ]] && echo "   JobState=$(cat "$STATE") Reason=None D
   StartTime=2026-01-01T00:00:00 EndTime=$(cat "$STATE.end" 2>/dev/null) D" ;;
        requeue) echo "$2" >>"$CALLS"
            [[ ! -e $STATE.end ]] || echo COMPLETING >"$STATE" ;;
    esac""",
    "scancel": """echo "scancel $*" >>"$CALLS"
        [[ $1 = --signal=TERM ]] && touch "$ASKED"
        :""",
}


@dataclass
class _Cluster:
    """Runs a job's attempts; each in turn does one of the `attempts`, which are bash."""

    folder: Path
    attempts: list[str]
    state: str = "RUNNING"
    job: str = "7"
    mark_when_asked: Path | None = None
    backoff: int = 0
    seconds_left: int | None = None

    def __post_init__(self) -> None:
        tools = self.folder / "tools"
        tools.mkdir()
        for name, text in TOOLS.items():
            (tools / name).write_text(f"#!/bin/bash\n{text}\n")
            (tools / name).chmod(0o755)
        self.tools = tools
        self.calls = self.folder / "calls"
        (self.folder / "state").write_text(self.state)

    def start(self, number: int, **changes) -> subprocess.Popen[str]:
        job = _job(self.folder, **changes)
        job.folder.mkdir(parents=True, exist_ok=True)
        profile = cpu_profile(max_fruitless_requeues=2, backoff_seconds=self.backoff)
        script, does = self.folder / "job.sbatch", self.folder / f"does-{number}"
        script.write_text(render(job, profile))
        outcome = job.folder / f"{self.job}.{number + 1}.outcome"
        saved = f"{self.folder}/run/checkpoints/step-$1"
        step = f"save() {{ mkdir -p {saved}; touch {saved}/manifest.json; }}"
        if self.seconds_left is not None:
            end = datetime.now() + timedelta(seconds=self.seconds_left)
            (self.folder / "state.end").write_text(end.strftime("%Y-%m-%dT%H:%M:%S"))
        does.write_text(f"outcome={outcome}\n{step}\n{self.attempts[number]}\n")
        return subprocess.Popen(
            ["bash", str(script)],
            env={
                **os.environ,
                "PATH": f"{self.tools}:{os.environ['PATH']}",
                "SLURM_JOB_ID": self.job,
                "SLURM_RESTART_COUNT": str(number),
                "SLURM_JOB_NODELIST": "n1",
                "SRUN_DOES": str(does),
                "STATE": str(self.folder / "state"),
                "CALLS": str(self.calls),
                "ASKED": str(self.folder / "asked"),
                **({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "5"} if job.array else {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **changes) -> tuple[list[int], str]:
        """Exit statuses and the log of all attempts, one after the other while it is requeued."""
        statuses, log = [], ""
        for number in range(len(self.attempts)):
            process = self.start(number, **changes)
            printed, _ = process.communicate(timeout=60)
            statuses.append(process.returncode)
            log += printed
            calls = self.calls.read_text().splitlines() if self.calls.exists() else []
            if calls.count("5_3" if changes.get("array") else self.job) == number:
                break
        return statuses, log


def test_failures_are_tried_again_while_there_are_new_checkpoints(tmp_path):
    attempts = ["exit 1", "save 00000010; exit 1", "exit 1", "exit 9", "exit 1", "save 00000020"]
    statuses, log = _Cluster(tmp_path, attempts).run()
    # Two failures in a row are borne, the third ends it; the new checkpoint began the count anew.
    assert statuses == [0, 0, 0, 0, 1]
    assert "1 of 2 times; waiting for 0 seconds" in log
    assert "failed (exit status 1); queued again, to go on from step 10" in log
    assert (
        "given up: 3 attempts in a row ended without a new checkpoint (exit status 1, step 10)"
        in log
    )


def test_a_folder_that_is_not_whole_is_no_progress(tmp_path):
    whole = (
        "mkdir -p {0}/run/checkpoints/step-00000010.tmp-1 {0}/run/checkpoints/step-00000020; exit 1"
    )
    _, log = _Cluster(tmp_path, [whole.format(tmp_path), "exit 1"]).run()
    assert "from step 0:" in log
    assert "without a new checkpoint, 1 of 2 times" in log


@pytest.mark.parametrize(
    ("does", "status", "said"),
    [
        ('save 00000060; echo finished >"$outcome"', 0, "finished: step 60"),
        ('echo refused rank 1: no data >"$outcome"; exit 1', 2, "come of it: rank 1: no data"),
    ],
)
def test_an_end_for_good_is_never_tried_again(does, status, said, tmp_path):
    cluster = _Cluster(tmp_path, [does, "exit 1"])
    statuses, log = cluster.run()
    assert statuses == [status]
    assert said in log
    assert not cluster.calls.exists()


def _ask(cluster: _Cluster, **changes) -> tuple[int, str]:
    process = cluster.start(0, **changes)
    deadline = time.monotonic() + 60
    while not (cluster.folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if cluster.mark_when_asked is not None:
        cluster.mark_when_asked.touch()
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed


SAVES = 'touch {0}/started; until [[ -e "$ASKED" ]]; do sleep 0.02; done; save 00000010; exit 1'


def test_the_warning_reaches_the_run_and_the_job_is_queued_again(tmp_path):
    cluster = _Cluster(tmp_path, [SAVES.format(tmp_path)])
    status, log = _ask(cluster)
    assert status == 0
    assert cluster.calls.read_text().splitlines() == ["scancel --signal=TERM 7", "7"]
    assert "asked to end: the run saves after its current step" in log
    assert "stopped at step 10, as asked; queued again, to go on from step 10" in log
    assert (tmp_path / "run" / "slurm" / "7.state").read_text() == "10 0 requeued 1\n"


SAVES_LONG = """touch {0}/started
until grep -qx 7 "$CALLS" 2>/dev/null; do sleep 0.02; done; {1}; exit 1"""


@pytest.mark.parametrize(
    ("save", "notes"), [("save 00000010", "10 0 stopped 1"), (":", "0 1 stopped 1")]
)
def test_a_save_that_reaches_the_time_limit_is_queued_again_before(save, notes, tmp_path):
    """Slurm does not queue a job again that ran out of time."""
    does = SAVES_LONG.format(tmp_path, save)
    # 15 seconds before the limit.
    cluster = _Cluster(tmp_path, [does], seconds_left=17)
    status, log = _ask(cluster)
    assert status == 143
    assert cluster.calls.read_text().splitlines() == ["scancel --signal=TERM 7", "7"]
    assert "the time limit is near and the run still saves; queued again" in log
    assert "Slurm is ending the job (COMPLETING None) and decides what comes next" in log
    assert (tmp_path / "run" / "slurm" / "7.state").read_text() == f"{notes}\n"


def test_a_save_that_comes_to_no_end_is_not_queued_again_for_ever(tmp_path):
    cluster = _Cluster(tmp_path, ["", "", f"touch {tmp_path}/started; sleep 4"], seconds_left=17)
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    (folder / "7.state").write_text("0 2 requeued 2\n")
    process = cluster.start(2)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert cluster.calls.read_text().splitlines() == ["scancel --signal=TERM 7"]
    assert "given up: 3 attempts in a row" in printed


@pytest.mark.parametrize("mark", ["cancelled", None])
def test_a_cancelled_job_is_not_queued_again(mark, tmp_path):
    """By `ttt-megatron cancel`, or by scancel, after which Slurm calls the job COMPLETING."""
    cluster = _Cluster(
        tmp_path, [SAVES.format(tmp_path)], state="RUNNING" if mark else "COMPLETING"
    )
    if mark:
        folder = tmp_path / "run" / "slurm"
        folder.mkdir(parents=True)
        cluster.mark_when_asked = folder / "7.cancelled"
    status, log = _ask(cluster)
    assert status == 143
    assert "7" not in cluster.calls.read_text().splitlines()
    assert ("cancelled; the same recipe" if mark else "Slurm is ending the job (COMPLETING") in log


def test_a_job_that_is_cancelled_while_it_rests_is_not_queued_again(tmp_path):
    """`ttt-megatron cancel` signals the script, which waits before the next attempt."""
    cluster = _Cluster(tmp_path, ["exit 1"], backoff=300)
    process = cluster.start(0)
    for line in process.stdout:
        if "waiting for 300 seconds" in line:
            break
    (tmp_path / "run" / "slurm" / "7.cancelled").touch()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    calls = cluster.calls.read_text().splitlines()
    assert "7" not in calls
    assert calls[-1] == "scancel 7"
    assert (tmp_path / "run" / "slurm" / "7.state").read_text() == "0 1 cancelled 1\n"


def test_an_attempt_that_begins_cancelled_ends_at_once(tmp_path):
    """`ttt-megatron cancel` came when the job was queued again and not yet pending."""
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    (folder / "7.cancelled").touch()
    cluster = _Cluster(tmp_path, [f"touch {tmp_path}/started"])
    statuses, log = cluster.run()
    assert statuses == [143]
    assert not (tmp_path / "started").exists()
    assert cluster.calls.read_text() == "scancel 7\n"
    assert "cancelled; the same recipe, submitted anew, goes on from step 0" in log


def _array(folder: Path) -> dict[str, object]:
    """Changes that make the job an array, whose task 3 runs."""
    return {
        "array": "2-3%1",
        "torchrun": False,
        "command": ["sweep", "s.yaml", "--only-index"],
        "raw": ['"$SLURM_ARRAY_TASK_ID"'],
        "outputs": {2: folder / "run", 3: folder / "other"},
    }


def test_a_task_of_an_array_goes_by_its_exit_status(tmp_path):
    changes = _array(tmp_path)
    words = f'echo "${{*: -1}}" >>{tmp_path}/words; exit '
    cluster = _Cluster(tmp_path, [words + "1", words + "2", words + "0"])
    statuses, log = cluster.run(**changes)
    assert statuses == [0, 2]
    assert (tmp_path / "words").read_text() == "3\n3\n"
    assert (tmp_path / "run" / "slurm" / "5_3.state").read_text() == "0 2 refused 2\n"
    assert "not tried again, as the same would come of it: see the error above" in log
    _checked((tmp_path / "job.sbatch").read_text(), tmp_path)


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_task_signals_queues_and_cancels_itself_alone(cancelled, tmp_path):
    """Also the task whose SLURM_JOB_ID is the number of the array."""
    cluster = _Cluster(tmp_path, [SAVES.format(tmp_path)], job="5")
    if cancelled:
        folder = tmp_path / "run" / "slurm"
        folder.mkdir(parents=True)
        cluster.mark_when_asked = folder / "5.cancelled"
    status, _ = _ask(cluster, **_array(tmp_path))
    assert status == (143 if cancelled else 0)
    last = "scancel 5_3" if cancelled else "5_3"
    assert cluster.calls.read_text().splitlines() == ["scancel --signal=TERM 5_3", last]
