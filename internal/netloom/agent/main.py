"""``netloom agent connect|serve|activate``: the subcommands that SSH and systemd start on a host.

Each imports only what it needs. The subcommands for people are in cli/agent.py.
"""

from __future__ import annotations

import sys

_USAGE = (
    "usage: netloom agent connect|serve [--socket PATH] [--state-dir DIRECTORY] [--log FILE] [--check-every SECONDS]"
    " | activate [--by-word] | install|uninstall|rollback|selftest|status --help"
)

# The options of connect and serve; each has a value.
_OPTIONS = {"--socket", "--state-dir", "--log", "--check-every"}


def main(args: list[str]) -> int:
    """Run the subcommand ``args[0]`` with the options that follow; the exit status."""
    command, options = (args[0], args[1:]) if args else ("", [])
    # Older builds send --by-word over SSH (extension/deploy.py), so the option keeps its name.
    if command == "activate" and options in ([], ["--by-word"]):
        return _activate(forced_by_operator=bool(options))
    if command not in ("connect", "serve"):
        sys.stderr.write(f"netloom agent: unknown command {command!r}; {_USAGE}\n" if command else f"{_USAGE}\n")
        return 1
    # No argparse: it would make each start of connect a fifth slower (3 ms of 15, November 2026).
    if len(options) % 2 or not _OPTIONS.issuperset(options[::2]):
        sys.stderr.write(f"{_USAGE}\n")
        return 1
    if command == "connect":
        from netloom.agent.connect import connect  # a small process: no msgspec, no asyncio

        return connect(options)
    return _serve(dict(zip(options[::2], options[1::2], strict=True)))


def _serve(options: dict[str, str]) -> int:
    import math

    # asyncio would load OpenSSL, a tenth of the time to start. The agent has no TLS.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    # asyncio, msgspec, the renderers
    from netloom.agent.connect import SOCKET
    from netloom.agent.log import complain
    from netloom.agent.scopes.upkeep import CHECK_EVERY_S
    from netloom.agent.serve import STATE_DIR, serve

    check_every = options.get("--check-every") or str(CHECK_EVERY_S)
    try:
        check_every_s = float(check_every)
    except ValueError:
        check_every_s = math.nan
    if not 0 < check_every_s < math.inf:
        complain(f"--check-every {check_every}: not a number of seconds above 0")
        return 1
    return serve(
        options.get("--socket", SOCKET),
        options.get("--state-dir", STATE_DIR),
        options.get("--log", ""),
        check_every_s,
    )


def _activate(*, forced_by_operator: bool) -> int:
    """The last step of an installation: print one line of JSON, a ``wire.Activation``, with status 0.

    extension/deploy.py and cli/agent.py read it. An error is one line on stderr, with status 3.
    """
    import msgspec  # here, because connect does not need it

    from netloom.agent.log import complain
    from netloom.agent.setup import install
    from netloom.errors import NetloomError

    def require() -> None:
        # This loads all of the agent. At a first installation, the agent starts meanwhile.
        from netloom.agent.setup import selftest

        selftest.require()

    try:
        activation = install.activate(forced_by_operator=forced_by_operator, require=require)
    except (NetloomError, OSError) as error:
        complain(str(error))
        return 3
    sys.stdout.write(msgspec.json.encode(activation).decode() + "\n")
    return 0
