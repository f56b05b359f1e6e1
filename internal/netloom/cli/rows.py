"""Results of hosts as rows: printed as a table, or as JSON for programs."""

from __future__ import annotations

import msgspec
import typer

from netloom.cli import table
from netloom.commands.actions import printable_ascii
from netloom.errors import one_line


def host_row(host: str, status: int, answer: object, error: str = "") -> dict[str, object]:
    """One host's row. Its answer cannot replace the three columns that are ours."""
    plain = msgspec.to_builtins(answer)
    own = {"host": host, "status": status, "error": error}
    return {**own, **(plain if isinstance(plain, dict) else {"answer": plain}), **own}  # guard: a-row-names-its-host


def echo_json(value: object) -> None:
    """Print JSON in printable ASCII: the texts are those of hosts."""
    typer.echo(printable_ascii(msgspec.json.format(msgspec.json.encode(value)).decode()))


def print_rows(rows: list[dict[str, object]], as_json: bool) -> None:
    """Print the hosts' rows as a table or as JSON. Raises typer.Exit with the highest status unless that is 0."""
    if as_json:
        echo_json(rows)
    else:
        columns = [
            key
            for key in _columns(rows)
            if (key in _ALWAYS and key in rows[0]) or any(row.get(key) not in ("", None, [], ()) for row in rows)
        ]
        lines = [[_text(row.get(key)) for key in columns] for row in rows]
        typer.echo(table.render([one_line(column.upper(), 100) for column in columns], lines))
    if worst := worst_status(rows):
        raise typer.Exit(worst)


_ALWAYS = ("current", "serves")  # columns that are shown even if all their cells are empty


def _columns(rows: list[dict[str, object]]) -> list[str]:
    found = list(dict.fromkeys(key for row in rows for key in row))
    return [*(key for key in found if key not in ("status", "error", "did")), "did", "error"]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        items = [str(it) for it in value]
        return one_line(("; " if any(" " in it for it in items) else " ").join(items)) or "-"
    return "-" if value in (None, "") else one_line(str(value))


def worst_status(rows: list[dict[str, object]]) -> int:
    """The highest exit status of the rows."""
    return max(status for row in rows if isinstance(status := row["status"], int))
