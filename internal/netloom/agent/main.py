"""``netloom agent <subcommand>`` without Typer: ``connect``, ``serve`` and ``activate``.

Each subcommand imports only what it needs.
"""

from __future__ import annotations

import sys

_USAGE = (
    "usage: netloom agent connect|serve [--socket PATH] [--state-dir DIRECTORY] [--log FILE] [--check-every SECONDS]"
    " | activate [--by-word] | install|uninstall|rollback|selftest|status --help"
)


def main(arguments: list[str]) -> int:
    """Run the arguments that follow ``netloom agent`` and return the exit status."""
    subcommand, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if subcommand == "activate" and options in ([], ["--by-word"]):
        return _activate(by_word=bool(options))
    if subcommand not in ("connect", "serve"):
        sys.stderr.write(f"netloom agent: unknown word {subcommand!r}; {_USAGE}\n" if subcommand else f"{_USAGE}\n")
        return 1
    known = {"--socket", "--state-dir", "--log", "--check-every"}
    if len(options) % 2 or not known.issuperset(options[::2]):
        sys.stderr.write(f"{_USAGE}\n")
        return 1
    if subcommand == "connect":
        from netloom.agent.connect import connect  # the relay is a small process: no msgspec, no asyncio

        return connect(options)
    # The agent itself: asyncio, msgspec, the renderers.
    from netloom.agent.connect import SOCKET
    from netloom.agent.log import complain
    from netloom.agent.serve import STATE_DIR, serve
    from netloom.agent.upkeep import CHECK_EVERY_S

    given = dict(zip(options[::2], options[1::2], strict=True))
    check_every = given.get("--check-every") or str(CHECK_EVERY_S)
    try:
        check_every_s = float(check_every)
    except ValueError:
        complain(f"--check-every {check_every}: not a number of seconds")
        return 1
    return serve(
        given.get("--socket", SOCKET),
        given.get("--state-dir", STATE_DIR),
        given.get("--log", ""),
        check_every_s,
    )


def _activate(*, by_word: bool) -> int:
    """The last step of a deployment (extension/deploy.py): one line of JSON, or one line on stderr and status 3."""
    import msgspec  # imported by install anyway

    from netloom.agent.log import complain
    from netloom.agent.setup import (
        install,
        selftest,  # the renderers
    )
    from netloom.errors import NetloomError

    try:
        outcome = install.activate(by_word=by_word, require=selftest.require)
    except (NetloomError, OSError) as error:
        complain(str(error))
        return 3
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    return 0
