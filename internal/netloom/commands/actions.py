"""Custom actions: their names, and what their output may look like. What they do is the agent's part."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from netloom.errors import BadRequest, HostRefused, one_line, unicode_escape

BUILT_IN = {
    "check": "what a repair would do; nothing is changed",
    "counters": "packets and bytes of each public address and IPv6 prefix, in and out",
    "dump-config": "the whole scope, wanted and found, secrets left out",
    "leases": "the NICs that are known, with their addresses and names",
    "list-firewall-rules": "firewall and translations in words; parameters filter (a text) and skip (lines)",
    "pbr-add-route": "a route in one of those tables",
    "pbr-add-rule": "which of the packets that guests send look up one of those tables",
    "pbr-create-table": "a route table of the scope",
    "pbr-delete-route": "takes it away",
    "pbr-delete-rule": "takes it away",
    "pbr-delete-table": "takes it away, with its routes and rules",
    "pbr-list-routes": "those routes, or those of one table, a line each",
    "pbr-list-rules": "those rules, or those of one table, a line each",
    "pbr-list-tables": "those tables, a line each",
    "reboot-device": "links down and up, ruleset and services anew; open connections go on",
    "show": "the scope in a few lines",
}

# CloudStack keeps the result of an API job in a TEXT column (async_job.job_result: 65,535 bytes), and what is in quotes
# there is escaped once more. A longer result fails the job after everything was done.
OUTPUT_CHARACTERS_MAX = 48_000  # guard: a-page-holds-a-thousand-rules


def check_known(action: str, hooks: Collection[str]) -> None:
    """Raises BadRequest for an action that is neither built in nor one of the operator's ``hooks``."""
    if action not in BUILT_IN and action not in hooks:
        known = ", ".join(sorted({*BUILT_IN, *hooks}))
        raise BadRequest(f"custom-action {action}: there is no such action on this host", hint=f"known: {known}")


def success_json(message: str) -> str:
    """The JSON that CloudStack takes for a success and whose message its UI shows."""
    return json.dumps({"status": "success", "printmessage": "true", "message": message})


def hook_output(action: str, output: str) -> str:
    """The output of a hook that ended well, in ASCII and not too long.

    Raises HostRefused when it is a JSON object whose ``status`` is not ``success``: CloudStack takes it for a failure,
    whatever the exit status was.
    """
    text = printable_ascii(output).strip()
    if len(text) > OUTPUT_CHARACTERS_MAX:
        return f"{text[:OUTPUT_CHARACTERS_MAX]}\n... cut here, after {OUTPUT_CHARACTERS_MAX} characters"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return text
    status = document.get("status", "") if isinstance(document, dict) else ""
    if status not in ("", None) and str(status).lower() != "success":
        why = one_line(str(document.get("message", "")), 400)
        raise HostRefused(f"hook {action} says status {one_line(str(status), 60)!r}{': ' if why else ''}{why}")
    return text


def printable_ascii(text: str) -> str:
    r"""``text`` in printable ASCII, line ends and tabs; the rest as ``\uXXXX``, which within JSON is the same text."""
    if text.isascii() and all(" " <= it <= "~" or it in "\n\t" for it in text):
        return text
    return "".join(it if " " <= it <= "~" or it in "\n\t" else unicode_escape(it) for it in text.replace("\r\n", "\n"))


def page_of(lines: Sequence[str], params: Mapping[str, str], *, none: str) -> str:
    """The lines that the parameter ``filter`` is in, from number ``skip`` on; ``none`` when there is none.

    Parameters that nobody knows are let be. Raises BadRequest for a ``skip`` that is no number.
    """
    text, skip = params.get("filter", ""), params.get("skip", "") or "0"
    if not (skip.isascii() and skip.isdigit()) or len(skip) > 9:
        raise BadRequest(f"payload.action-params.skip: {skip[:40]!r} is no number of lines")
    found = [printable_ascii(line) for line in lines if text in line][int(skip) :]
    return truncated(found, after=int(skip)) if found else none


def truncated(lines: Sequence[str], limit: int = OUTPUT_CHARACTERS_MAX, *, after: int | None = None) -> str:
    """The lines as one text of about ``limit`` characters at most; the last one says how many are left out.

    ``after``: so many were left out before them, by the parameter that shows the rest.
    """
    kept: list[str] = []
    left = limit
    for line in lines:
        left -= len(line) + 1
        if left < 0:
            break
        kept.append(line)
    if len(kept) < len(lines):
        hint = (
            ""
            if after is None
            else f": the rest with skip={after + len(kept)}, or those with a text with filter=<text>"
        )
        kept.append(f"... {len(lines) - len(kept)} more lines{hint}")
    return "\n".join(kept)


def as_sections(sections: Iterable[tuple[str, Sequence[str]]], limit: int = OUTPUT_CHARACTERS_MAX) -> str:
    """Sections under their titles, about ``limit`` characters together at most: short ones are whole."""
    titled = [(title, [f"  {line}" for line in lines] or ["  (none)"]) for title, lines in sections]
    sizes = {title: sum(len(line) + 1 for line in lines) for title, lines in titled}
    shares: dict[str, int] = {}
    left = limit
    for at, title in enumerate(sorted(sizes, key=lambda it: sizes[it])):
        shares[title] = min(sizes[title], left // (len(sizes) - at))
        left -= shares[title]
    return "\n".join(f"{title}\n{truncated(lines, shares[title])}" for title, lines in titled)
