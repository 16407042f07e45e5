"""Reads a trace of torch.profiler: what ran within the ranges of one name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTSIDE = "outside torch's operators"  # Python, and native code that torch knows nothing of
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of what runs on a GPU

Event = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """One range: its length, and by name the calls of operators and the times they took themselves.

    Calls include those that operators make of each other, as in the profiler's own table. On a
    GPU also what ran there.
    """

    ms: float
    operators: Counter[str]
    self_ms: Counter[str]
    launches: Counter[str]
    device_ms: Counter[str]


def read_ranges(path: Path, name: str) -> list[Range]:
    """The ranges that `torch.profiler.record_function(name)` left in a trace, in order of time.

    Work on a GPU belongs to the range in whose time it ran, so the range has to wait for it.
    """
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    ranges = [e for e in events if e["cat"] == "user_annotation" and e["name"] == name]
    return [_range(events, outer) for outer in ranges]


def _range(events: Iterable[Event], outer: Event) -> Range:
    end = outer["ts"] + outer["dur"]
    inside = [event for event in events if outer["ts"] <= event["ts"] < end]
    operators = [e for e in inside if e["cat"] == "cpu_op" and e["tid"] == outer["tid"]]
    on_device = [e for e in inside if e["cat"] in _ON_DEVICE]
    device_ms: Counter[str] = Counter()
    for event in on_device:
        device_ms[event["name"]] += event["dur"] / 1e3
    return Range(
        ms=outer["dur"] / 1e3,
        operators=Counter(event["name"] for event in operators),
        self_ms=_self_ms(operators, outer["dur"] / 1e3),
        launches=Counter(event["name"] for event in on_device),
        device_ms=device_ms,
    )


def _self_ms(operators: Iterable[Event], whole_ms: float) -> Counter[str]:
    """Time by name without that of the operators called inside; ordered by start, callers first."""
    own: Counter[str] = Counter({OUTSIDE: whole_ms})
    callers: list[tuple[float, str]] = []  # end and name of those that still run
    for event in operators:
        while callers and event["ts"] >= callers[-1][0]:
            callers.pop()
        ms = event["dur"] / 1e3
        own[event["name"]] += ms
        own[callers[-1][1] if callers else OUTSIDE] -= ms
        callers.append((event["ts"] + event["dur"], event["name"]))
    return own
