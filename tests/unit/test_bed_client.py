"""A process of the test bed that does not start is reported with its error."""

from __future__ import annotations

import subprocess

import pytest

from bed.client import BedError, Client


def test_a_process_that_ends_at_once_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of its output and its exit, the process still has no exit status."""
    client = Client("broken", {"role": "no such role"})
    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "poll", lambda process: None)
        with pytest.raises(BedError, match=r"broken did not start: (?s:.*)KeyError: 'no such role'"):
            client.wait_up()
    client.end()
