from collections.abc import Sequence
from typing import Any

RECORDS: dict[str, list[tuple[str, int, int, str]]]
RULES: dict[str, dict[str, Any]]

def __getattr__(name: str) -> int: ...  # constants; see backends/modules.py

class Plan:
    def __init__(self, rule: str, tables: dict[str, int]) -> None: ...
    def reduce(self, num_threads: int) -> None: ...
    def finalize(self) -> None: ...
    def update(self, num_threads: int) -> None: ...

class Watch:
    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        kinds: Sequence[int],
        dtensor: type | None = None,
    ) -> None: ...
    def refresh(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], grads: int
    ) -> tuple[list[int], list[int], list[Any]] | None: ...

def use_torch(
    tensor_type: type,
    parameter_type: type,
    is_neg: object,
    disable_subclasses: type,
    exchange: object,
) -> None: ...
def simd_levels() -> list[str]: ...
def simd() -> str: ...
def set_simd(name: str) -> None: ...
def built_with_openmp() -> bool: ...
