"""Completion scripts for shells, generated from the commands and options of the program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from netloom.cli.app import app


@dataclass(frozen=True)
class Word:
    """The subcommands and options that may follow a command, each with its help text."""

    words: dict[str, str]
    options: dict[str, str]


def words() -> dict[str, Word]:
    """Each command with what may follow it, sorted. A command is a path of words; the first path is empty."""
    return dict(sorted(_walk((), get_command(app))))


def _walk(path: tuple[str, ...], command: Any) -> Iterator[tuple[str, Word]]:
    inner = command.commands if isinstance(command, TyperGroup) else {}
    shown = {name: it for name, it in sorted(inner.items()) if not it.hidden}
    with typer.Context(command, help_option_names=["-h", "--help"]) as context:
        found = [it for it in command.get_params(context) if isinstance(it, TyperOption) and not it.hidden]
    yield (
        " ".join(path),
        Word(
            {name: it.get_short_help_str(80) for name, it in shown.items()},
            {option: _line(it.help or "") for it in found for option in sorted([*it.opts, *it.secondary_opts])},
        ),
    )
    for name, it in shown.items():
        yield from _walk((*path, name), it)


def _line(text: str) -> str:
    return " ".join(text.split())


def bash(known: dict[str, Word]) -> str:
    """The script for bash. It does not need the package bash-completion."""
    paths = "|".join(f"'{path}'" for path in known if path)
    cases = "\n".join(
        f"        '{path}') reply='{' '.join([*word.words, *word.options])}' ;;" for path, word in known.items()
    )
    return f"""\
# bash completion of netloom
_netloom() {{
    local path= word reply=
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "${{path:+$path }}$word" in
            {paths}) path="${{path:+$path }}$word" ;;
        esac
    done
    case "$path" in
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$reply" -- "${{COMP_WORDS[COMP_CWORD]}}")
}}
complete -o default -F _netloom netloom
"""


def zsh(known: dict[str, Word]) -> str:
    """The script for zsh, for a directory of its fpath."""
    paths = "|".join(f"'{path}'" for path in known if path)
    cases = "\n".join(
        f"    ('{path}') reply=({' '.join(_zsh_quoted(name, help_text) for name, help_text in _both(word))}) ;;"
        for path, word in known.items()
    )
    return f"""\
#compdef netloom
local at= word
local -a reply
for word in "${{(@)words[2,CURRENT-1]}}"; do
    case "${{at:+$at }}$word" in
    ({paths}) at="${{at:+$at }}$word" ;;
    esac
done
case "$at" in
{cases}
esac
_describe netloom reply
"""


def fish(known: dict[str, Word]) -> str:
    """The script for fish, for its directory of vendor completions."""
    paths = " ".join(f"'{path}'" for path in known if path)
    lines = [
        f"complete -c netloom -f -n \"__netloom_at '{path}'\" {_fish_kind(name)} -d {_fish_quoted(help_text)}"
        for path, word in known.items()
        for name, help_text in _both(word)
    ]
    return f"""\
# fish completion of netloom
function __netloom_at
    set -l at ''
    for word in (commandline -opc)[2..]
        set -l further (string trim "$at $word")
        if contains -- $further {paths}
            set at $further
        end
    end
    test "$at" = "$argv[1]"
end
{chr(10).join(lines)}
"""


def _both(word: Word) -> list[tuple[str, str]]:
    return [*word.words.items(), *word.options.items()]


def _zsh_quoted(name: str, help_text: str) -> str:
    text = f"{name}:{help_text}".replace("'", "'\\''")
    return f"'{text}'"


def _fish_quoted(help_text: str) -> str:
    text = help_text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _fish_kind(name: str) -> str:
    return f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" if name.startswith("-") else f"-a {name}"
