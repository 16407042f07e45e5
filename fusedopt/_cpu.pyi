from collections.abc import Sequence
from typing import Any

ROW_BYTES: int
GRAD_BYTES: int
CHUNK_BYTES: int
CHUNK_ELEMENTS: int
LANES: int

class Plan:
    def __init__(
        self,
        rows: int,
        grads: int,
        row_scalars: int,
        n_rows: int,
        chunks: int,
        n_chunks: int,
        n_elements: int,
        partials: int,
        step_scalars: int,
    ) -> None: ...

class Watch:
    def __init__(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], kinds: Sequence[int]
    ) -> None: ...
    def refresh(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], grads: int
    ) -> tuple[list[int], list[int], list[Any]] | None: ...

def use_torch(
    tensor_type: type, parameter_type: type, is_neg: object, exchange: object
) -> None: ...
def reduce(plan: Plan, norm_type: float, grad_scale: int, num_threads: int) -> None: ...
def finalize(
    plan: Plan,
    rule: str,
    options: bytearray,
    norm_type: float,
    max_grad_norm: float,
    measured: bool,
    skip_nonfinite: bool,
    grad_scale: int,
    found_inf: int,
    inf_flag: int,
) -> None: ...
def update(
    plan: Plan, rule: str, options: bytearray, max_grad_value: float, num_threads: int
) -> None: ...
def simd_levels() -> list[str]: ...
def simd() -> str: ...
def set_simd(name: str) -> None: ...
def built_with_openmp() -> bool: ...
