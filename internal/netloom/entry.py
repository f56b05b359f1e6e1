"""argv to one of five doors, importing only what is behind that one.

The program does not depend on its own name: CloudStack runs whatever file the operator registered.
"""

from __future__ import annotations

import sys

from netloom.fastos import os
from netloom.program import begin

# What a person may say. CloudStack's commands have a hyphen in them and these have none, so neither hides the other.
PEOPLE = ("agent", "commands", "help", "hosts", "version")

# What of ``agent`` is for people; the rest is what SSH and systemd start.
AGENT_PEOPLE = ("install", "uninstall", "rollback", "selftest", "status", "-h", "--help")

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without the cost of importing typing
if TYPE_CHECKING:
    from typing import Literal

    Door = Literal["call", "helper", "agent", "guest", "people"]


def door(words: list[str]) -> Door:
    """Which of the five doors the words of the command line lead to.

    Three words are CloudStack's call unless the first is one of ours; so an unknown command is refused in one
    line, as CloudStack's log wants it.
    """
    first = words[0] if words else ""
    if first == "agent":
        return "people" if words[1:2] and words[1] in AGENT_PEOPLE else "agent"
    if first == "guest":
        return "guest"
    if first == "helper":
        return "helper"
    if not first.startswith("-") and ("-" in first or (len(words) == 3 and first not in PEOPLE)):
        return "call"
    return "people"


def main(argv: list[str] | None = None) -> int:
    """Open the door that ``argv`` names; the exit status, where the door does not end the process itself.

    Without ``argv`` the process's own: so calls the script that pip makes of ``project.scripts`` (pyproject.toml).
    """
    argv = sys.argv if argv is None else argv
    begin(os.environ)
    words = argv[1:]
    behind = door(words)
    if behind != "call":  # which lets them in when it can say its last words
        _let_signals_in()
    match behind:
        case "call":
            from netloom.extension.call import call  # nothing heavy: sys, os, time and what the interpreter has

            return call(words, executable=argv[0])
        case "agent":
            from netloom.agent.main import main as agent  # msgspec, asyncio: three bare start-ups

            return agent(words[1:])
        case "people":
            from netloom.cli.app import run  # Typer: ten bare start-ups

            return run(words)
        case "guest":
            from netloom.guest.main import main as guest  # asyncio and h11: four bare start-ups

            return guest(words[1:])
        case "helper":
            from netloom.extension.helper import main as helper  # asyncio; the rest when it serves

            return helper()


def _let_signals_in() -> None:
    """What ends a program comes from here on: the start of the one file (build/nuitka/start.c) holds it back."""
    import _signal  # type: ignore[import-not-found]  # the C module

    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP))
