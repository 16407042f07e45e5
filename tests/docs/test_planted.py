"""The planted faults apply to the sources as they are; `.ci/planted` proves that tests see them."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "tests" / "planted").glob("*.patch"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_fault_can_be_planted(patch: Path) -> None:
    first_line = patch.read_text().splitlines()[0]
    files = first_line.removeprefix("Seen by: ").split()
    assert first_line.startswith("Seen by: ") and files
    assert [name for name in files if not (ROOT / name).is_file()] == []
    command = ["git", "apply", "--check", str(patch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_faults_of_every_language() -> None:
    text = "".join(patch.read_text() for patch in PATCHES)
    assert len(PATCHES) >= 60
    for folder in ("csrc/cpu", "csrc/rules", "csrc/cuda", "csrc/watch", "fusedopt/triton_kernels"):
        assert f"+++ b/{folder}/" in text
