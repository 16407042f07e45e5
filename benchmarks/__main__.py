"""`python -m benchmarks COMMAND ...`: `cpu`, `gpu` measure, `compare` looks for what got slower."""

from __future__ import annotations

import sys

COMMANDS = ("cpu", "gpu", "compare")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print(f"{__doc__}\n`python -m benchmarks COMMAND --help` says more.", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    command, rest = arguments[0], arguments[1:]
    if command == "compare":
        from benchmarks import compare

        return compare.main(rest)
    if command == "cpu":
        from benchmarks import cpu_step

        return cpu_step.main(rest)
    from benchmarks import gpu_step

    return gpu_step.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
