"""`python -m benchmarks COMMAND ...`

  list          the cases, parameter lists, pipelines and backends that the others take by name
  cpu           whole steps on the CPU, ours and the alternatives in turns
  gpu           the same on an NVIDIA GPU
  host          the host's share of a step with Triton, without a GPU
  kernels       reduce and update by themselves, over sizes and dtypes
  instructions  instructions per element of the CPU kernels, against bounds
  roofline      bytes per parameter from the options, and predicted times
  profile       the share of the optimizer in the examples' training
  memory        peak memory of the first and the second step
  fidelity      how true AdamW stays with states and masters of fewer bits
  plot          pictures of the rows
  tables        the generated blocks of README and docs, from the rows
  compare       what got slower between two commits or CSVs

`python -m benchmarks COMMAND --help` says more.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    name: {"list": "listing", "cpu": "cpu_step", "gpu": "gpu.step", "host": "host_time",
           "profile": "profile_training"}.get(name, name)
    for name in ("list", "cpu", "gpu", "host", "distributed", "kernels", "instructions", "roofline",
                 "profile", "memory", "fidelity", "plot", "tables", "compare")
}  # fmt: skip


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    module = importlib.import_module(f"benchmarks.{COMMANDS[arguments[0]]}")
    return int(module.main(arguments[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
