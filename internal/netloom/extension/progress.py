"""The progress of installing the agent on a host, as values; the text for people is made here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Step = Literal["looking at the host", "uploading", "checking", "starting"]


@dataclass(frozen=True)
class Installing:
    """How far the installation on ``host`` is. ``percent``: of the upload, at the step "uploading" only."""

    host: str
    step: Step
    percent: int | None = None

    @property
    def state(self) -> str:
        """``42 %``, or the step."""
        return self.step if self.percent is None else f"{self.percent} %"

    def __str__(self) -> str:
        return f"agent being installed on {self.host}, {self.state}"


class Progress:
    """Receives the progress of installations, and lines for the log. This base class ignores both."""

    def installing(self, now: Installing) -> None:
        """Called with each new step and each new percentage."""

    def log(self, line: str) -> None:
        """Called with a line that belongs in the log of the management server."""
