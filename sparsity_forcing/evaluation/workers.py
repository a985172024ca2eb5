"""Runs groups of jobs in processes of their own and says what went wrong in them.

A worker that fails takes the others down and its traceback becomes the error here. A worker that dies silently (killed
by the kernel for memory, say) is an error too. If this process is killed, its workers end by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback or how it ended."""


Report = Callable[[object], None]


def run_in_processes(work: Callable[..., None], groups: Sequence[tuple], on_report: Report, processes: int = 2) -> None:
    """Calls ``work(*group, report)`` for every group, each in a fresh process, up to ``processes`` at a time.

    Args:
        work: a module-level function. What it passes to ``report`` comes out at ``on_report`` in this process.
        groups: arguments of each call; they are pickled.

    Raises:
        WorkerError: a call raised or its process died. The other processes are ended first.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    waiting = list(enumerate(groups))
    running: dict[Connection, BaseProcess] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                index, group = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                worker = context.Process(
                    target=_worker, args=(theirs, work, group), name=f"evaluation-{index}", daemon=True
                )
                worker.start()
                theirs.close()
                running[ours] = worker
            for connection in wait(list(running)):
                if _read(connection, running[connection], on_report):
                    connection.close()
                    running.pop(connection).join()
    finally:
        for worker in running.values():
            worker.terminate()
        for worker in running.values():
            worker.join()


def _read(connection: Connection, worker: BaseProcess, on_report: Report) -> bool:
    """Takes one message; True once the worker is done."""
    try:
        kind, value = connection.recv()
    except EOFError:
        worker.join()
        raise WorkerError(f"{worker.name} {_ending(worker.exitcode)} before it was done") from None
    if kind == "error":
        raise WorkerError(f"{worker.name} failed:\n{value}")
    if kind == "report":
        on_report(value)
    return kind == "done"


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = " (often: out of memory; lower evaluate.batch_size or evaluate.workers)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _worker(connection: Connection, work: Callable[..., None], group: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*group, lambda value: connection.send(("report", value)))
    except Exception:
        connection.send(("error", traceback.format_exc()))
    else:
        connection.send(("done", None))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
