"""Starting again, on processes that fail in every way there is."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ttt_megatron.resilience.supervisor import RestartPolicy, Supervisor

ATTEMPT = "SMALL_ATTEMPT"


def _script(text: str) -> Callable[[int], list[str]]:
    """A child that knows its `attempt`."""
    head = f"import os, signal, sys, time\nattempt = int(os.environ['{ATTEMPT}'])\n"
    return lambda restarts: [sys.executable, "-c", head + textwrap.dedent(text)]


def _supervise(
    text: str, restarts: int = 3, progress: Callable[[], int] = lambda: -1
) -> tuple[int, list[str]]:
    told: list[str] = []
    supervisor = Supervisor(
        command=_script(text),
        policy=RestartPolicy(max_restarts=restarts, first_wait=0.01),
        progress=progress,
        final=frozenset({0, 2}),
        tell=told.append,
        attempt=ATTEMPT,
    )
    return supervisor.run(), told


def test_waits_double_to_a_limit() -> None:
    policy = RestartPolicy(max_restarts=9, first_wait=5, longest_wait=60)
    assert [policy.wait_before(n) for n in range(1, 7)] == [5, 10, 20, 40, 60, 60]


def test_a_killed_child_is_started_again_until_it_is_done() -> None:
    status, told = _supervise(
        "if attempt < 2: os.kill(os.getpid(), signal.SIGKILL if attempt else signal.SIGSEGV)"
    )
    assert status == 0
    assert told == [
        "the run was killed by SIGSEGV; starting again in 0.01 s from step 0, restart 1 of 3 "
        "since then",
        "the run was killed by SIGKILL; starting again in 0.02 s from step 0, restart 2 of 3 "
        "since then",
    ]


@pytest.mark.parametrize(("end", "status"), [("sys.exit(2)", 2), ("sys.exit(143)", 143)])
def test_what_trying_again_does_not_cure_is_not_tried(end: str, status: int) -> None:
    assert _supervise(end) == (status, [])


def test_restarts_are_counted_since_there_was_progress(tmp_path: Path) -> None:
    # A checkpoint more in the attempts 0, 1 and 3; none in 2, 4 and 5.
    done = tmp_path / "done"
    text = f"if attempt in (0, 1, 3): open({str(done)!r}, 'a').write('x')\nsys.exit(1)"
    status, told = _supervise(
        text, restarts=2, progress=lambda: 10 * len(done.read_text()) if done.exists() else -1
    )
    assert status == 1
    assert [line.split("restart ")[1][0] for line in told[:-1]] == ["1", "1", "2", "1", "2"]
    assert "from step 30" in told[-2]
    assert told[-1].startswith("the run ended with status 1 for the 3. time since step 30: not")


def _process(body: str) -> subprocess.Popen[str]:
    text = f"""
        import sys
        from ttt_megatron.resilience.supervisor import RestartPolicy, Supervisor
        body = {body!r}
        sys.exit(Supervisor(
            command=lambda restarts: [sys.executable, "-c", body],
            policy=RestartPolicy(max_restarts=3, first_wait=30),
            progress=lambda: 0, final=frozenset({{0}}), tell=lambda s: print(s, flush=True),
            attempt="{ATTEMPT}",
        ).run())
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, text=True
    )


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_sigterm_is_passed_on_and_nothing_follows() -> None:
    process = _process(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    assert _first_line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == 143


def test_sigterm_in_a_pause_ends_it() -> None:
    process = _process("import sys; sys.exit(1)")
    assert "starting again in 30 s" in _first_line(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


_WITH_A_CHILD = (
    "import subprocess, sys, time\n"
    "from ttt_megatron.resilience.supervisor import end_with_supervisor\n"
    "end_with_supervisor()\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(child.pid, flush=True)\n"
)


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_nothing_of_an_attempt_is_left_when_the_next_begins() -> None:
    process = _process(_WITH_A_CHILD + "sys.exit(1)")
    orphan = int(_first_line(process))
    assert "starting again" in _first_line(process)
    assert _gone(orphan)
    process.terminate()
    process.communicate(timeout=20)


def test_a_child_ends_with_a_killed_supervisor() -> None:
    process = _process(_WITH_A_CHILD + "time.sleep(60)")
    grandchild = int(_first_line(process))
    child = psutil.Process(grandchild).ppid()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while not _gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(grandchild, signal.SIGKILL)
