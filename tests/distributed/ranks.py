"""Functions on several ranks: processes of this machine that talk by gloo over loopback.

Starting a process and importing torch takes seconds, so processes are started once and kept. Each
call makes a process group of its own. A call that takes too long ends all processes, and the error
names the ranks that have not answered and shows where they are.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

MOST = 4  # ranks
SECONDS = 60.0  # that a call may take; the machines of CI are slow and busy
COLLECTIVE_SECONDS = 20.0  # that one rank waits for another

_calls = itertools.count()


class Pool:
    """Processes that run functions of test modules."""

    def __init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp()
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def _start(self, world: int) -> None:
        while len(self._processes) < world:
            here, there = self._spawn.Pipe()
            traces = Path(self._folder, f"rank{len(self._processes)}")
            process = self._spawn.Process(target=_serve, args=(there, str(traces)), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on ``world`` ranks; what each returned, in order.

        Raises:
            AssertionError: it raised on a rank, or a rank did not answer.
        """
        assert 1 <= world <= MOST
        self._start(world)
        module = sys.modules[function.__module__]
        where = (str(module.__file__), function.__module__, function.__name__)
        store = str(Path(self._folder, f"store{next(_calls)}"))
        for rank, pipe in enumerate(self._pipes[:world]):
            pipe.send((where, store, rank, world, args, sys.path))
        answers = self._answers(world)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failed:
            self.stop()
            told = "\n".join(f"---- rank {rank}\n{text}" for rank, text in sorted(failed.items()))
            raise AssertionError(f"{function.__name__} failed on ranks {sorted(failed)}\n{told}")
        return [answers[rank][1] for rank in range(world)]

    def _answers(self, world: int) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + SECONDS
        while len(answers) < world:
            for rank, pipe in enumerate(self._pipes[:world]):
                if rank in answers or not pipe.poll(0.005):
                    continue
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    exitcode = self._processes[rank].exitcode
                    answers[rank] = False, f"the process ended: {exitcode}\n{self._written(rank)}"
            if any(not ok for ok, _ in answers.values()):
                end = min(end, time.monotonic() + COLLECTIVE_SECONDS + 2)
            if time.monotonic() > end:
                for rank in range(world):
                    if rank not in answers:
                        answers[rank] = False, f"no answer; it is at\n{self._trace(rank)}"
        return answers

    def _trace(self, rank: int) -> str:
        import signal

        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self._written(rank)

    def _written(self, rank: int) -> str:
        traces = Path(self._folder, f"rank{rank}")
        return traces.read_text() if traces.exists() else ""

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []


_pool = Pool()
atexit.register(_pool.stop)


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``Pool.run`` in the pool of this process."""
    return _pool.run(world, function, *args)


# ---- in the processes ----------------------------------------------------------------------------


def _serve(pipe: Any, traces: str) -> None:
    import signal

    import torch

    with open(traces, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file=file)
        torch.set_num_threads(1)
        while True:
            try:
                where, store, rank, world, args, path = pipe.recv()
            except EOFError:
                break
            sys.path[:] = path
            try:
                pipe.send((True, _one_call(where, store, rank, world, args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
    os._exit(0)  # gloo's threads sometimes abort a process that exits as usual


def _one_call(where: tuple[str, str, str], store: str, rank: int, world: int, args: Any) -> Any:
    import torch
    import torch.distributed as dist

    file, module, name = where
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    torch.manual_seed(0)
    try:
        dist.barrier()  # a rank that fails at once closes connections that others still make
        return getattr(sys.modules[module], name)(rank, *args)
    finally:
        dist.destroy_process_group()
