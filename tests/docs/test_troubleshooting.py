"""docs/troubleshooting.md: its messages are raised somewhere, and all that are raised are in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from raised_messages import raised

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "troubleshooting.md"

pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="the documents are not here")

# Raised, and not looked for by anybody.
OF_NO_USER = {
    "… row kinds than params": "called by our own plan alone",
    "… is neither True nor False": "the same",
    "… is not a number": "the same",
    "…": "repeats the message of check_param",
}


def of_the_native_door() -> str:
    """What C++ says, where the sources are here; a user meets one sentence of it."""
    return "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.cpp")))


def listed() -> list[str]:
    """The messages in the first column; of torch's own, what torch says is torch's business."""
    cells = re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(), re.MULTILINE)
    ours = [cell for cell in cells if not cell.endswith("(torch's)")]
    return [message for cell in ours for message in re.findall(r"`([^`]+)`", cell)]


def test_there_are_messages() -> None:
    assert len(listed()) > 30 and len(set(raised())) > 30
    assert len(listed()) == len(set(listed()))


def test_every_message_listed_is_raised() -> None:
    texts = list(raised())
    missing = [one for one in listed() if not any(one in text for text in texts)]
    if (ROOT / "csrc").is_dir():
        missing = [one for one in missing if one not in of_the_native_door()]
        assert missing == []
    else:
        assert len(missing) <= 1


def test_every_message_raised_is_listed() -> None:
    entries = listed()
    known = {text for text in raised() if any(entry in text for entry in entries)}
    assert set(raised()) - known - OF_NO_USER.keys() == set()


def test_the_exceptions_are_current() -> None:
    assert OF_NO_USER.keys() <= set(raised())
