"""Other threads at work during a step: what the kernels read stays in memory while they run.

In a process of their own, which a read of freed memory would end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

import fusedopt

PREPARED = """
    import sys, threading, torch, fusedopt

    BACKEND, STEPS = {backend!r}, {steps}
    torch.set_num_threads(2)
    params = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(6)]
    opt = fusedopt.FusedAdamW(params, lr=0.01, max_grad_norm=1.0, backend=BACKEND)
    for p in params:
        p.grad = torch.full((1 << 20,), 0.5)
    turns = threading.Semaphore(0)  # one for each step of the main thread
    failures = []

    def start(work):
        def run():
            try:
                for _ in range(STEPS):
                    turns.acquire()
                    work()
            except BaseException as error:
                failures.append(error)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def step_beside(*threads):
        for _ in range(STEPS):
            for _ in threads:
                turns.release()
            opt.step()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert all(p.isfinite().all() for p in params)
        print("survived")
"""
GRADIENTS = """
    def assign():
        for _ in range(10):
            for p in params:
                p.grad = torch.full((1 << 20,), 0.5)  # so large that it goes back to the system

    step_beside(start(assign))
"""
STATES = """
    step_beside(start(opt.state.clear))
"""
STEPPERS = """
    def step():
        for p in params:
            p.grad = torch.full((1 << 20,), 0.5)
        opt.step()

    step_beside(start(step), start(step))
"""
# From here on the other thread never waits. Small parameters: most of a step is its preparation.
RESTLESS = """
    import time

    params = [torch.nn.Parameter(torch.ones(1 << 10)) for _ in range(6)]
    opt = fusedopt.FusedAdamW(params, lr=0.01, max_grad_norm=1.0, backend=BACKEND)
    for p in params:
        p.grad = torch.full((1 << 10,), 0.5)
    opt.step()
    saved = opt.state_dict()
    sys.setswitchinterval(1e-6)
    over = False

    def restless(work):
        def run():
            try:
                while not over:
                    work()
                    time.sleep(0.0002)
            except BaseException as error:
                failures.append(error)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def step_beside_restless(work):
        global over
        thread = restless(work)
        for _ in range(4 * STEPS):
            opt.step()
        over = True
        thread.join()
        step_beside()
"""
CLEARED = (
    RESTLESS
    + """
    step_beside_restless(opt.state.clear)
"""
)
EMPTIED = (
    RESTLESS
    + """
    def empty():
        for own in list(opt.state.values()):
            own.clear()

    step_beside_restless(empty)
"""
)
REPLACED = (
    RESTLESS
    + """
    def replace():
        for p in params:
            p.grad = torch.full((1 << 10,), 0.5)
            opt.state[p] = {name: value.clone() for name, value in saved["state"][0].items()}
        opt.param_groups.append(opt.param_groups.pop())

    step_beside_restless(replace)
"""
)
REORDERED = (
    RESTLESS
    + """
    opt = fusedopt.FusedSGD([{"params": params[:3], "lr": 0.0}, {"params": params[3:], "lr": 1.0}],
                            backend=BACKEND)
    before = [p.detach().clone() for p in params]

    def reorder():
        for _ in range(101):
            opt.param_groups = opt.param_groups[::-1]

    step_beside_restless(reorder)
    moved = [float((b - p.detach()).max()) for b, p in zip(before, params)]
    assert moved == [0.0] * 3 + [5 * STEPS * 0.5] * 3, moved
"""
)
SWITCHED = (
    RESTLESS
    + """
    def switch():
        for on in 50 * (True, False):
            for group in opt.param_groups:
                group["amsgrad"] = on

    step_beside_restless(switch)
"""
)
REGROUPED = (
    RESTLESS
    + """
    def regroup():
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        opt.param_groups.pop()

    step_beside_restless(regroup)
"""
)
INITIALIZED = (
    RESTLESS
    + """
    def initialize():
        opt.state.clear()
        opt.init_state()

    step_beside_restless(initialize)
"""
)
LOADED = (
    RESTLESS
    + """
    step_beside_restless(lambda: opt.load_state_dict(saved))
    counts = {float(own["step"]) for own in opt.state.values()}
    assert len(counts) == 1, counts
"""
)
SCENES = {
    "gradients": GRADIENTS,
    "states": STATES,
    "steppers": STEPPERS,
    "cleared": CLEARED,
    "emptied": EMPTIED,
    "replaced": REPLACED,
    "loaded": LOADED,
    "reordered": REORDERED,
    "switched": SWITCHED,
    "regrouped": REGROUPED,
    "initialized": INITIALIZED,
}


@pytest.mark.parametrize("scene", SCENES)
def test_threads_that_take_memory_away(scene: str, backend: str) -> None:
    prepared = PREPARED.format(backend=backend, steps=30 if backend == "cpu" else 10)
    code = textwrap.dedent(prepared) + textwrap.dedent(SCENES[scene])
    root = os.path.dirname(os.path.dirname(fusedopt.__file__))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,  # `-c` looks in the working directory first: not in the checkout
        # What is freed goes back to the system at once.
        env={**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout == "survived\n"
