"""Commands of `saferope` in processes of their own that need no seven seconds of imports: for tests that kill them.

They are forked from one process that has imported everything and computed nothing, and then live, write and die as
processes that a shell starts. Where the system cannot fork, each imports for itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

HEAVY = [
    "diffusers",
    "saferope.cli",
    "saferope_training.flux.loading",
    "saferope_training.making.recipe",
    "saferope_benchmark.suites",
    __name__,
]
PATIENCE = 1800  # seconds: half a minute is usual; only a process that hangs is to be given up
_CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")


def start(
    arguments: list[str], said: Path, script: Path | None = None, environment: dict[str, str] | None = None
) -> BaseProcess:
    """`saferope <arguments>`, or `python <script> <arguments>`, on one thread, started; all it says goes to the file
    `said`.
    """
    if _CAN_FORK:
        _CONTEXT.set_forkserver_preload(HEAVY)  # of no effect once the server runs
    process = _CONTEXT.Process(target=_work, args=(arguments, said, script, environment or {}))
    process.start()
    return process


def start_several(count: int, arguments: list[str], said: Path) -> list[BaseProcess]:
    """The same command in `count` processes that share its work, as PyTorch's launcher would start them.

    What the process number n says goes to the file `said` with n as its suffix.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    ranks = ({"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count))
    return [start(arguments, said.with_suffix(f".{n}"), None, common | rank) for n, rank in enumerate(ranks)]


def ended(process: BaseProcess, said: Path, code: int = 0) -> str:
    """Waits for its end and returns what it said. AssertionError unless it ended with `code`; of a signal, its
    negative.
    """
    process.join(PATIENCE)
    text = said.read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == code, f"ended with {process.exitcode} (None: it still runs) and said {text[-3000:]}"
    return text


def _work(arguments: list[str], said: Path, script: Path | None, environment: dict[str, str]) -> None:
    import torch

    from saferope import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    with said.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [str(script or "saferope"), *arguments]
    if script:
        runpy.run_path(str(script), run_name="__main__")
    else:
        cli.main()
