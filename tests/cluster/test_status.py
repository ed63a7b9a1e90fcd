"""Status from what a real Slurm 22.05 printed, and from runs' folders."""

import json
from pathlib import Path

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.cluster.cancel import cancel_jobs, with_dependents
from ttt_megatron.cluster.logs import follow, last_attempt, last_lines
from ttt_megatron.cluster.records import JobRecord, add_record, find_record, read_records
from ttt_megatron.cluster.slurm import parse_sacct, parse_squeue
from ttt_megatron.cluster.status import as_json, statuses
from ttt_megatron.errors import UserError

RECORDED = Path(__file__).parent / "recorded"
QUEUE = parse_squeue((RECORDED / "squeue.txt").read_text())
ACCOUNTS = parse_sacct((RECORDED / "sacct.txt").read_text())


def _record(job_id: str, output: Path, **changes) -> JobRecord:
    values = {
        "job_id": job_id,
        "name": output.name,
        "recipe": "r.yaml",
        "overrides": ["parallel.data=2"],
        "output": str(output),
        "script": str(output / "slurm" / "a.sbatch"),
        "folder": str(output / "slurm"),
        "time": "2026-11-28T05:00:00+0000",
        "nodes": 2,
        "processes": 1,
        "profile": "cpu",
        "commit": "0" * 40,
        "user": "root",
        "after": [],
        "steps": 60,
    }
    return JobRecord(**{**values, **changes})


def test_what_slurm_prints_is_read():
    assert QUEUE["12"].state == "PENDING"
    assert QUEUE["12"].reason == "Dependency"
    assert QUEUE["8"].nodes == "n[1-2]"
    assert QUEUE["8"].reason == ""
    assert QUEUE["16_1"].active
    assert not QUEUE["7"].active
    assert ACCOUNTS["10"].reason == "exit status 3"
    assert ACCOUNTS["14"].state == "CANCELLED"
    assert ACCOUNTS["15"].state == "TIMEOUT"
    assert ACCOUNTS["9"].reason == ""


def _run(folder: Path, step: int, notes: str) -> Path:
    """A run's folder as training and its job leave it; without a model."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    info = {"step": step, "loss": 1.0, "finite": True, "data_fingerprint": "x"}
    (checkpoint / "info.json").write_text(json.dumps(info))
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    rows = [{"step": n, "loss": n / 2, "seconds": 2.0} for n in range(1, step + 4)]
    rows.append({"step": step + 3, "validation_loss": 1.0})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')
    (folder / "slurm").mkdir()
    for name in notes.split(";"):
        job, words = name.split(":")
        (folder / "slurm" / f"{job}.state").write_text(words + "\n")
    return folder


@pytest.mark.parametrize(
    ("job", "notes", "state", "active"),
    [
        ("8", "20 0 running 2", "running, 0:04 left", True),
        ("12", None, "waiting (Dependency)", True),
        ("13", None, "waiting for a job that failed: cancel it", True),
        ("14", None, "cancelled (JobHeldUser)", False),
        ("15", "20 0 running 1", "timeout (TimeLimit)", False),
        ("9", "60 0 finished 3", "finished", False),
        ("10", "0 0 refused 1", "refused: an error that would come again, see its log", False),
        ("99", "20 4 failed 5", "given up after fruitless attempts, see its log", False),
        ("99", None, "not known to Slurm any more", False),
    ],
)
def test_states_are_told_in_words(job, notes, state, active, tmp_path):
    run = _run(tmp_path / "run", 20, f"{job}:{notes or ''}")
    (found,) = statuses([_record(job, run)], QUEUE, {})
    assert found.state == state
    assert found.active == active
    assert found.attempt == (int(notes.split()[3]) if notes else 0)
    assert (found.checkpoint, found.step, found.loss) == (20, 23, 11.5)
    assert found.left == (2.0 * 37 if active else None)
    assert as_json(found)["steps"] == 60


def test_accounts_tell_what_the_queue_has_forgotten(tmp_path):
    run = tmp_path / "run"
    (found,) = statuses([_record("10", run)], {}, ACCOUNTS)
    assert found.state == "failed (exit status 3)"
    assert (found.checkpoint, found.step, found.loss, found.saved) == (0, 0, None, None)


def test_tasks_of_an_array_stand_one_by_one(tmp_path):
    tasks = {str(n): str(_run(tmp_path / f"p{n}", 10 * n + 10, f"16_{n}:")) for n in range(3)}
    record = _record("16", tmp_path, tasks=tasks)
    found = statuses([record], QUEUE, {})
    assert [one.job_id for one in found] == ["16_0", "16_1", "16_2"]
    assert [one.checkpoint for one in found] == [10, 20, 30]
    assert [one.active for one in found] == [False, True, True]


def test_records_are_found_by_number_name_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for job in ("1", "2"):
        add_record(Path("runs"), _record(job, tmp_path / "runs" / "one"))
    assert [record.job_id for record in read_records(Path("runs"))] == ["1", "2"]
    for word in ("2", "one", "runs/one"):
        assert find_record(Path("runs"), word).job_id == "2"
    with pytest.raises(UserError, match=r"9: .* no such job; the last are 1 \(one\), 2 \(one\)"):
        find_record(Path("runs"), "9")
    Path("runs/jobs.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"jobs.jsonl, line 1 tells of no job"):
        read_records(Path("runs"))


def test_what_waits_is_cancelled_too(tmp_path):
    first, second, third, other = (
        _record(job, tmp_path / job, after=after)
        for job, after in (("1", []), ("2", ["1"]), ("3", ["9", "2"]), ("4", ["9"]))
    )
    known = [first, second, third, other]
    assert with_dependents([first], known) == [first, second, third]
    assert with_dependents([third], known) == [third]


@pytest.mark.parametrize(
    ("states", "now", "calls", "said"),
    [
        (
            {"0": "COMPLETED", "1": "RUNNING", "2": "RUNNING", "3": "PENDING", "4": "SUSPENDED"},
            False,
            ["scancel --state=PENDING 5", "scancel 5_4", "scancel --batch --signal=TERM 5"],
            "2 running tasks save after their current steps and end, 2 others cancelled",
        ),
        ({"0": "PENDING", "1": "PENDING"}, False, ["scancel 5"], "cancelled"),
        ({"0": "RUNNING", "1": "PENDING"}, True, ["scancel 5"], "cancelled"),
    ],
)
def test_tasks_that_run_save_while_those_that_wait_are_cancelled(
    states, now, calls, said, tmp_path, monkeypatch
):
    record = _record("5", tmp_path, tasks={index: str(tmp_path / index) for index in states})
    Path(record.folder).mkdir()
    given = []

    def slurm(command):
        given.append(" ".join(command))
        return "".join(f"5_{index}|{state}|None|0:01|0:09|n1\n" for index, state in states.items())

    monkeypatch.setattr("ttt_megatron.cluster.slurm.run_slurm", slurm)
    monkeypatch.setattr("ttt_megatron.cluster.cancel.run_slurm", slurm)
    assert cancel_jobs([record], now=now) == {"5": said}
    assert given[0].startswith("squeue ")
    assert given[1:] == calls
    assert (Path(record.folder) / "5.cancelled").exists()


def test_following_ends_with_a_job_whose_script_could_not_say_so(tmp_path, monkeypatch):
    """Ended by its time limit: no note, but Slurm knows; it is waited for while Slurm is silent."""
    run = _run(tmp_path / "run", 10, "15:10 0 running 1")
    log = run / "slurm" / "15.log"
    log.write_text("one\ntwo\n")
    answers = [UserError("squeue failed"), {"15": QUEUE["8"]}, {"15": QUEUE["15"]}]

    def told(users):
        assert list(users) == ["root"]
        answer = answers.pop(0)
        if isinstance(answer, UserError):
            raise answer
        log.write_text(log.read_text() + "more\n")
        return answer

    monkeypatch.setattr("ttt_megatron.cluster.logs._ASK_SECONDS", 0.05)
    monkeypatch.setattr("ttt_megatron.cluster.logs._POLL_SECONDS", 0.01)
    monkeypatch.setattr("ttt_megatron.cluster.logs.squeue", told)
    shown = b"".join(follow(log, 4, _record("15", run), "15"))
    # What came while Slurm was asked is shown too.
    assert shown == b"two\nmore\nmore\n"
    assert not answers
    monkeypatch.setattr("ttt_megatron.cluster.logs.squeue", lambda _: {})
    monkeypatch.setattr("ttt_megatron.cluster.logs.sacct", lambda _: {})
    assert list(follow(log, log.stat().st_size, _record("15", run), "15")) == []


def test_the_last_attempt_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = "".join(
        f"[job 1, attempt {n}, 2026-11-28 05:09:10] on n1, from step {n}: x\nwords {n}\n"
        f"[job 1, attempt {n}, 2026-11-28 05:10:10] failed\n"
        for n in (1, 2)
    )
    assert last_attempt(log.encode()).decode() == log[len(log) // 2 :]
    assert last_attempt(b"no attempt yet\n") == b"no attempt yet\n"
    assert last_lines(b"a\nb\nc\n", 2) == b"b\nc\n"
    run = _run(tmp_path / "runs" / "one", 10, "1:10 0 failed 2")
    add_record(Path("runs"), _record("1", run))
    (run / "slurm" / "1.log").write_text(log)
    for words, shown in (
        (["one"], log[len(log) // 2 :]),
        (["one", "--all", "--follow"], log),
        (["1", "--lines", "1"], log.splitlines(keepends=True)[-1]),
    ):
        assert main(["logs", *words]) == 0
        assert capsys.readouterr().out == shown
