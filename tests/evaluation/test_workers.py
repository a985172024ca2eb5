"""Worker processes: reports, failures, deaths, and no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sparsity_forcing.evaluation.workers import WorkerError, run_in_processes


def square(numbers, report):
    for number in numbers:
        report((os.getpid(), number * number))


def fail_on_odd(number, report):
    report(os.getpid())
    if number % 2:
        raise LookupError(f"no answer for {number}")
    time.sleep(60)


def die(report):
    os.kill(os.getpid(), signal.SIGKILL)


def report_and_sleep(report):
    report(os.getpid())
    time.sleep(60)


def test_every_group_runs_in_a_process_of_its_own():
    reports = []
    run_in_processes(square, [([1, 2],), ([3],), ([4],)], reports.append, processes=2)
    assert sorted(value for _, value in reports) == [1, 4, 9, 16]
    assert len({pid for pid, _ in reports}) == 3
    assert os.getpid() not in {pid for pid, _ in reports}


def test_no_groups_is_nothing_to_do():
    run_in_processes(square, [], pytest.fail)


def test_a_failure_shows_its_traceback_and_ends_the_others():
    pids = []
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)evaluation-1 failed:.*LookupError: no answer for 1"):
        run_in_processes(fail_on_odd, [(0,), (1,)], pids.append, processes=2)
    assert time.monotonic() - started < 50
    assert not any(is_alive(pid) for pid in pids)


def test_a_silent_death_is_an_error_that_names_the_signal():
    with pytest.raises(WorkerError, match=r"evaluation-0 was ended by SIGKILL \(often: out of memory"):
        run_in_processes(die, [()], pytest.fail)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """Nothing goes on computing behind the back of a user who killed the run."""
    code = (
        "import sys, test_workers as t\n"
        "if __name__ == '__main__':\n"
        "    t.run_in_processes(t.report_and_sleep, [()], lambda pid: print(pid, flush=True))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
