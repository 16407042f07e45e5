from typing import Any

ROW_BYTES: int
GRAD_BYTES: int
CHUNK_BYTES: int
CHUNK_ELEMENTS: int
ROW_STEP_BYTES: int
OPTIONS_BYTES: int
DEVICE_NUMBERS: int
DEVICE_NUMBER_BYTES: int

class Plan:
    def __init__(self, tables: dict[str, Any], rule: str, amsgrad: bool) -> None: ...
    def begin(
        self,
        norm_type: float,
        max_grad_norm: float,
        measured: bool,
        skip_nonfinite: bool,
        max_grad_value: float,
        grad_scale: int,
        found_inf: int,
        inf_flag: int,
        scalars: int,
        n_device_numbers: int,
        stream: int,
        capturing: bool,
    ) -> None: ...
    def reduce(self, finalizes: bool) -> None: ...
    def finalize(self) -> None: ...
    def update(self) -> None: ...
    @property
    def updates(self) -> int: ...

def device_count() -> int: ...
def versions() -> dict[str, int]: ...
