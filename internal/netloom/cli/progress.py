"""Progress on stderr: a terminal has lines that are redrawn, elsewhere each change is a new line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from netloom.errors import one_line
from netloom.extension.progress import Installing, Progress

_BAR = 20
_LINE = 78  # a longer line would take two lines of a terminal


def bar(percent: int) -> str:
    """``[####................]  20 %``."""
    full = percent * _BAR // 100
    return f"[{'#' * full}{'.' * (_BAR - full)}] {percent:>3} %"


class _Lines:
    """Lines at the end of a terminal, which are drawn again in place."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self._drawn = 0

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the lines that were drawn before."""
        if not self.is_terminal:
            return
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        text = "".join(f"\r\x1b[K{line}\n" for line in lines)
        sys.stderr.write(f"{up}{text}\x1b[J" if len(lines) < self._drawn else f"{up}{text}")
        sys.stderr.flush()
        self._drawn = len(lines)


class InstallDisplay(Progress):
    """Shows the progress of each host: a terminal has one line per host."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._shown: dict[str, str] = {}  # host -> the text of its last line, if stderr is no terminal
        self._state = dict.fromkeys(hosts, "connecting")
        self._width = max(map(len, hosts))
        self._lines = _Lines()
        self._draw()

    def installing(self, now: Installing) -> None:
        if self._lines.is_terminal:
            self._state[now.host] = now.state if now.percent is None else bar(now.percent)
            self._draw()
            return
        news = now.state if now.percent is None else f"{now.percent // 10}"
        if news != self._shown.get(now.host):  # a percentage is written only when its tens change
            self._shown[now.host] = news
            sys.stderr.write(f"{now.host}: {now.state}\n")

    def end(self) -> None:
        for host in self._state:
            self._state[host] = "ended"
        self._draw()

    def _draw(self) -> None:
        self._lines.draw([f"{host:<{self._width}}  {state}" for host, state in self._state.items()])


class HostsDisplay:
    """Shows on a terminal how many hosts have answered, and which ones have not."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._total = len(hosts)
        self._waiting = dict.fromkeys(hosts)
        self._lines = _Lines()
        self._draw()

    def answered(self, host: str) -> None:
        self._waiting.pop(host, None)
        self._draw()

    def end(self) -> None:
        """Remove the line from the terminal."""
        self._lines.draw([])

    def _draw(self) -> None:
        done = self._total - len(self._waiting)
        line = f"{bar(done * 100 // self._total)}  {done} of {self._total} hosts"
        rest = f"; waiting for {', '.join(self._waiting)}" if self._waiting else ""
        self._lines.draw([one_line(line + rest, _LINE)])


class MovesDisplay:
    """Shows the progress of moves: a terminal has a bar, and a line for each scope that is being moved now.

    Elsewhere a line is written when a scope is done.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._failed = 0
        self._now: dict[str, str] = {}  # scope -> what is done with it
        self._lines = _Lines()
        self._draw()

    def step(self, scope_id: str, what: str) -> None:
        self._now[scope_id] = what
        self._draw()

    def done(self, scope_id: str, result: str, failed: bool) -> None:
        """``result``: one line."""
        self._now.pop(scope_id, None)
        self._done += 1
        self._failed += failed
        if self._lines.is_terminal:
            self._draw()
        else:
            sys.stderr.write(f"{scope_id}: {one_line(result)}\n")

    def end(self) -> None:
        """Remove the lines from the terminal."""
        self._lines.draw([])

    def _draw(self) -> None:
        if not self._total:
            return
        failed = f", {self._failed} failed" if self._failed else ""
        lines = [f"{bar(self._done * 100 // self._total)}  {self._done} of {self._total}{failed}"]
        self._lines.draw([*lines, *(one_line(f"{it:<10}  {what}", _LINE) for it, what in self._now.items())])
