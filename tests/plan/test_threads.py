"""Other threads at work during a step: what the kernels read stays in memory while they run.

This file is a program as well: a read of freed memory would end the process that runs the scenes.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fusedopt

LARGE = 1 << 20  # elements: most of a step is kernels, without the interpreter's lock
SMALL = 1 << 10  # most of a step is its preparation
STEPS = {
    ("cpu", LARGE): 16,
    ("cpu", SMALL): 600,
    ("reference", LARGE): 5,
    ("reference", SMALL): 100,
}


def gradient(param: torch.Tensor) -> torch.Tensor:
    return torch.full_like(param, 0.5, requires_grad=False)


class Training:
    """An optimizer that has stepped once, and threads that disturb it."""

    def __init__(self, backend: str, numel: int) -> None:
        self.steps = STEPS[backend, numel]
        # Between two disturbances: without it steps are few. 0 where a fault has but a moment.
        self.pause = 0.001 if numel == LARGE else 0.0002
        if backend == "reference":
            numel = min(numel, 1 << 16)  # it is slower, and waits for no memory
        self.params = [torch.nn.Parameter(torch.ones(numel)) for _ in range(6)]
        self.opt = fusedopt.FusedAdamW(self.params, lr=0.01, max_grad_norm=1.0, backend=backend)
        for param in self.params:
            param.grad = gradient(param)
        self.opt.step()

    def step_beside(self, *works: Callable[[], None]) -> None:
        """While threads do these over and over; once more when they have ended."""
        over, failures = threading.Event(), []

        def run(work: Callable[[], None]) -> None:
            try:
                while not over.is_set():
                    work()
                    if self.pause > 0:
                        time.sleep(self.pause)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for _ in range(self.steps):
            self.opt.step()
        over.set()
        for thread in threads:
            thread.join()
        self.opt.step()
        assert not failures, failures
        assert all(param.isfinite().all() for param in self.params)


def gradients_are_replaced(backend: str) -> None:
    training = Training(backend, LARGE)

    def replace() -> None:
        for param in training.params:
            param.grad = gradient(param)

    training.step_beside(replace)


def states_are_dropped(backend: str) -> None:
    training = Training(backend, LARGE)
    training.step_beside(training.opt.state.clear)


def others_step(backend: str) -> None:
    training = Training(backend, LARGE)

    def step() -> None:
        for param in training.params:
            param.grad = gradient(param)
        training.opt.step()

    training.step_beside(step, step)


def small_states_are_dropped(backend: str) -> None:
    training = Training(backend, SMALL)
    training.step_beside(training.opt.state.clear)


def states_are_emptied(backend: str) -> None:
    training = Training(backend, SMALL)

    def empty() -> None:
        for own in list(training.opt.state.values()):
            own.clear()

    training.step_beside(empty)


def all_is_replaced(backend: str) -> None:
    training = Training(backend, SMALL)
    opt, saved = training.opt, training.opt.state_dict()["state"][0]

    def replace() -> None:
        for param in training.params:
            param.grad = gradient(param)
            opt.state[param] = {name: value.clone() for name, value in saved.items()}
        opt.param_groups.append(opt.param_groups.pop())

    training.step_beside(replace)


def checkpoints_are_loaded(backend: str) -> None:
    training = Training(backend, SMALL)
    opt, saved = training.opt, training.opt.state_dict()

    def count() -> None:
        with opt._shared.turn:
            counts = {float(own["step"]) for own in opt.state.values()}
        assert len(counts) == 1, counts

    training.step_beside(lambda: opt.load_state_dict(saved), count)
    count()


def groups_change_places(backend: str) -> None:
    training = Training(backend, SMALL)
    training.steps *= 3  # which are short ones
    groups = [
        {"params": training.params[:3], "lr": 0.0},
        {"params": training.params[3:], "lr": 1.0},
    ]
    opt = training.opt = fusedopt.FusedSGD(groups, backend=backend)
    for param in training.params:
        torch.nn.init.ones_(param)  # steps of a half are exact from there

    def reorder() -> None:
        for _ in range(101):
            opt.param_groups = opt.param_groups[::-1]

    training.step_beside(reorder)
    moved = [1.0 - float(param.min()) for param in training.params]
    assert moved == [0.0] * 3 + [(training.steps + 1) * 0.5] * 3, moved


def an_option_is_switched(backend: str) -> None:
    training = Training(backend, SMALL)

    training.pause = 0.0

    def switch() -> None:
        for group in training.opt.param_groups:
            group["amsgrad"] = not group["amsgrad"]

    training.step_beside(switch)


def groups_come_and_go(backend: str) -> None:
    training = Training(backend, SMALL)

    def regroup() -> None:
        training.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        training.opt.param_groups.pop()

    training.step_beside(regroup)


def states_are_initialized(backend: str) -> None:
    training = Training(backend, SMALL)

    def initialize() -> None:
        training.opt.state.clear()
        training.opt.init_state()

    training.step_beside(initialize)


SCENES = [gradients_are_replaced, states_are_dropped, others_step, small_states_are_dropped]
SCENES += [states_are_emptied, all_is_replaced, checkpoints_are_loaded, groups_change_places]
SCENES += [an_option_is_switched, groups_come_and_go, states_are_initialized]


def test_threads_that_take_memory_away(backend: str) -> None:
    root = Path(fusedopt.__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, backend],
        capture_output=True,
        text=True,
        timeout=120,
        # What is freed goes back to the system at once.
        env={**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, f"{done.returncode} in\n{done.stdout}{done.stderr}"
    assert len(done.stdout.splitlines()) == len(SCENES)


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(2)
    sys.setswitchinterval(1e-6)
    for scene in SCENES:
        print(scene.__name__, flush=True)
        scene(*sys.argv[1:])
