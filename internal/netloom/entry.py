"""Chooses one of six entry points by argv and imports only the modules of that one.

The entry points: a call of CloudStack's, the resident helper, the agent on a host, the guest service process, the
launcher of services (confine), and the commands for people. The name of the executable does not matter: the operator
registers it under any name.
"""

from __future__ import annotations

import sys

from netloom.fastos import os
from netloom.program import take_environment

# The commands for people. CloudStack's commands contain a hyphen and these do not, so the two cannot collide.
PEOPLE = (
    "agent",
    "commands",
    "drain",
    "evacuate",
    "export",
    "help",
    "hosts",
    "import",
    "move",
    "rebalance",
    "undrain",
    "version",
    "where",
)

# The subcommands of ``agent`` for people; SSH and systemd start the others.
AGENT_PEOPLE = ("install", "uninstall", "rollback", "selftest", "status", "-h", "--help")

# New objects; younger collections between two of the next generation. A start makes 100,000 objects and no garbage, and
# a list of 10,000 rules has 30,000 and no cycle. By default Python would look at all objects many times.
COLLECT_AFTER = 100_000, 20, 100

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without the cost of importing typing
if TYPE_CHECKING:
    from typing import Literal

    Door = Literal["call", "helper", "agent", "guest", "confine", "people"]


def door(args: list[str]) -> Door:
    """The entry point for the arguments of the command line.

    Three arguments are a call of CloudStack's unless the first one is a command for people. A command that we do not
    know is then refused in one line, as CloudStack's log needs it, and not by a page of help.
    """
    first = args[0] if args else ""
    if first == "agent":
        return "people" if args[1:2] and args[1] in AGENT_PEOPLE else "agent"
    if first == "guest":
        return "guest"
    if first == "confine":
        return "confine"
    if first == "helper":
        return "helper"
    if not first.startswith("-") and ("-" in first or (len(args) == 3 and first not in PEOPLE)):
        return "call"
    return "people"


def main(argv: list[str] | None = None) -> int:
    """Run the entry point that ``argv`` selects; the exit status, unless the entry point exits by itself.

    Without ``argv`` the process's own arguments: the script that pip makes of ``project.scripts`` calls it so.
    """
    argv = sys.argv if argv is None else argv
    take_environment(os.environ)
    args = argv[1:]
    chosen = door(args)
    if chosen != "call":  # a call unblocks the signals once its handlers can report them
        _unblock_signals()
    if chosen not in ("call", "guest"):  # the guest process starts seldom, and its requests leave garbage
        import gc

        gc.set_threshold(*COLLECT_AFTER)
    match chosen:
        case "call":
            from netloom.extension.call import call  # loads only what the interpreter has loaded anyway

            return call(args, executable=argv[0])
        case "agent":
            from netloom.agent.main import main as agent  # msgspec, asyncio: three bare start-ups

            return agent(args[1:])
        case "people":
            from netloom.cli.app import run  # Typer: ten bare start-ups

            return run(args)
        case "guest":
            from netloom.guest.main import main as guest  # h11, msgspec: seven bare start-ups

            return guest(args[1:])
        case "confine":
            from netloom.confine import main as confine  # ctypes: runs before each start of a service

            return confine(args[1:])
        case "helper":
            from netloom.extension.helper import main as helper  # asyncio; the rest while it serves

            return helper()


def _unblock_signals() -> None:
    """Unblock the signals that end a program. The one file's start code (build/nuitka/start.c) blocks them."""
    import _signal  # type: ignore[import-not-found]  # the C module

    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP))
