"""`python -m fusedopt [--json]`: the environment report, for a bug report.

`python -m fusedopt memory`: what training takes with each precision of state.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt import installation, memory_report
from fusedopt.backends import registry as backends

MAPS = Path("/proc/self/maps")


def openmp_libraries(maps: str) -> list[str]:
    """The OpenMP runtimes among the mapped files. Two of them have thread pools that compete."""
    return sorted(set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[-.]\S*", maps)))


def cpu_name() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*: (.*)", text, re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), cpu_name()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield torch.device("cuda", index), torch.cuda.get_device_name(index)


def self_test(device: torch.device) -> tuple[str, str]:
    """Compare a clipped AdamW step with torch's. Returns the backend, and the problem if any."""
    start, grad = (torch.randn(1000).to(device) for _ in range(2))
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    ours.grad, theirs.grad = grad.clone(), grad.clone()
    opt = fusedopt.FusedAdamW([ours], max_grad_norm=1.0)
    opt.step()
    torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    torch.optim.AdamW([theirs]).step()
    moved = (theirs - start).abs().max().item()
    error = (ours - theirs).abs().max().item()
    agrees = error <= 1e-3 * moved  # false for NaN
    problem = "" if agrees else f"off by {error:.3g} where torch moved by {moved:.3g}"
    return next(iter(opt.backend.values()), "none"), problem


def examine(device: torch.device, name: str) -> dict[str, str]:
    try:
        with warnings.catch_warnings():
            # the report shows the fallback in a line of its own
            warnings.simplefilter("ignore", fusedopt.FusedOptFallbackWarning)
            backend, problem = self_test(device)
    except Exception as error:  # a report that ends in a traceback reports nothing
        backend, problem = "none", f"{type(error).__name__}: {error}"
    return {"name": name, "backend": backend, "self_test": problem or "ok"}


def collect() -> dict[str, Any]:
    build = installation.build_config()
    examined = {str(device): examine(device, name) for device, name in devices()}
    return {
        "fusedopt": fusedopt.__version__,
        "commit": build.get("commit") or None,
        "location": str(Path(fusedopt.__file__).parent),
        "build": build.get("modules"),
        "backends": backends.report(),
        "devices": examined,
        "threads": torch.get_num_threads(),
        # read after the self-test: by then everything is loaded
        "openmp_libraries": openmp_libraries(MAPS.read_text()) if MAPS.exists() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FUSEDOPT_")},
    }


def problems(report: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Warnings, and for each whether it means that something is broken.

    A module is not broken if the build left it out and recorded why.
    """
    cpu = report["backends"]["cpu"]
    if not cpu["available"]:
        text = f"the CPU backend is not available ({cpu['reason']}). {cpu['remedy']}"
        yield text.strip(), installation.recorded_reason("_cpu") is None
    for name in installation.stale():
        yield f"{name} is older than the sources in csrc/; {installation.remedy()}", False
    if len(report["openmp_libraries"] or []) > 1:
        text = (
            "several OpenMP runtimes are loaded; where the threads of two are at work, both are "
            "several times slower: leave out what brings another than torch's, or give it one "
            "thread (scikit-learn: threadpoolctl)"
        )
        yield text, False
    for device, facts in report["devices"].items():
        if facts["self_test"] != "ok":
            yield f"the self-test failed on {device}: {facts['self_test']}", True


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "fusedopt", f"{report['fusedopt']}, commit {report['commit'] or 'unknown'}"
    yield "location", report["location"]
    for name, built in (report["build"] or {}).items():
        versions = ", ".join([*built["simd"], *built.get("architectures", [])])
        how = f"{versions}; built with {built['compiler']}"
        yield f"module {name}", how if built["built"] else f"not built: {built['reason']}"
    for name, facts in report["backends"].items():
        reason = f": {facts['reason']}" if facts["reason"] else ""
        yield f"backend {name}", ("available" if facts["available"] else "not available") + reason
        for key in sorted(facts.keys() - {"available", "reason"}):
            value = facts[key]
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield f"  {key}", text
    for device, facts in report["devices"].items():
        yield device, f"{facts['name']}: {facts['backend']}, self-test {facts['self_test']}"
    yield "threads", str(report["threads"])
    libraries = report["openmp_libraries"]
    yield "openmp", "unknown" if libraries is None else ", ".join(libraries) or "none loaded"
    for name in ("torch", "python", "platform"):
        yield name, report[name]
    for name, value in report["environment"].items():
        yield name, value


def main(arguments: list[str] | None = None) -> int:
    about = "Environment report. Exits with 1 where something is broken."
    parser = argparse.ArgumentParser(prog="python -m fusedopt", description=about)
    parser.add_argument("--json", action="store_true", help="for programs")
    commands = parser.add_subparsers(title="other commands", dest="command")
    what = "what training takes with each precision of state; exits with 1 where nothing fits"
    memory_report.add_arguments(commands.add_parser("memory", help=what, description=what))
    options = parser.parse_args(arguments)
    if options.command == "memory":
        return memory_report.run(options)
    report = collect()
    found = list(problems(report))
    report["warnings"] = [text for text, _ in found]
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        rows = list(_rows(report))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:<{width}}  {text}")
        for warning in report["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
    return 1 if any(is_broken for _, is_broken in found) else 0


if __name__ == "__main__":
    sys.exit(main())
