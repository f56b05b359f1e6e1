"""``netloom agent <word>``: the words of the host's side. Each imports only what it needs."""

from __future__ import annotations

import sys

_USAGE = (
    "usage: netloom agent connect|serve [--socket PATH] [--state-dir DIRECTORY] [--log FILE] [--check-every SECONDS]"
    " | activate [--by-word] | install|uninstall|rollback|selftest|status --help"
)


def main(arguments: list[str]) -> int:
    """Carries out ``arguments``, what stands after ``netloom agent``; the exit status."""
    word, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if word == "activate" and options in ([], ["--by-word"]):
        return _activate(by_word=bool(options))
    if word not in ("connect", "serve"):
        sys.stderr.write(f"netloom agent: unknown word {word!r}; {_USAGE}\n" if word else f"{_USAGE}\n")
        return 1
    known = {"--socket", "--state-dir", "--log", "--check-every"}
    if len(options) % 2 or not known.issuperset(options[::2]):
        sys.stderr.write(f"{_USAGE}\n")
        return 1
    if word == "connect":
        from netloom.agent.connect import connect  # the relay is a small process: no msgspec, no asyncio

        return connect(options)
    from netloom.agent.serve import serve  # the agent itself: asyncio, msgspec, the renderers

    told = dict(zip(options[::2], options[1::2], strict=True))
    return serve(**{key.removeprefix("--").replace("-", "_"): value for key, value in told.items()})


def _activate(*, by_word: bool) -> int:
    """What an upload ends with (extension/deploy.py): one line of JSON, or one line on stderr and status 3."""
    import msgspec  # as in what follows

    from netloom.agent.log import complain
    from netloom.agent.setup import (
        install,
        selftest,  # the renderers, for the trial
    )
    from netloom.errors import NetloomError

    try:
        outcome = install.activate(by_word=by_word, require=selftest.require)
    except (NetloomError, OSError) as error:
        complain(str(error))
        return 3
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    return 0
