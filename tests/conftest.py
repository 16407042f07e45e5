"""Backend fixture, seeds and the hypothesis profile."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "fusedopt",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    phases=[p for p in hypothesis.Phase if p.name != "explain"],
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("fusedopt")

BACKENDS = ["cpu", "reference"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `exhaustive`, unless -m or -k or the test's own name asks for it."""
    asked = (config.option.markexpr, config.option.keyword, *config.args)
    if any("exhaustive" in str(word) for word in asked):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def require_cpu_backend() -> None:
    """Skip where the native module is not built; with FUSEDOPT_REQUIRE_CPU=1 that is a failure."""
    if importlib.util.find_spec("fusedopt._cpu") is not None:
        return
    reason = "the native module fusedopt._cpu is not built"
    if os.environ.get("FUSEDOPT_REQUIRE_CPU") == "1":
        pytest.fail(f"{reason} and FUSEDOPT_REQUIRE_CPU=1", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on the CPU, by the name the `backend=` argument takes."""
    name: str = request.param
    if name == "cpu":
        require_cpu_backend()
    return name


@pytest.fixture
def cpu_backend() -> str:
    require_cpu_backend()
    return "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def simd_levels(cpu_backend: str) -> Iterator[list[str]]:
    """Those of this machine and build, "generic" among them."""
    from fusedopt import _cpu

    in_use = _cpu.simd()
    yield _cpu.simd_levels()
    _cpu.set_simd(in_use)
