"""Custom actions: their names, and the form and size of their output. The agent executes them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from netloom.errors import BadRequest, HostRefused, one_line, unicode_escape

# The actions of every host, sorted. build/package/manifest.yaml has the descriptions that CloudStack shows.
BUILT_IN = (
    "check",
    "counters",
    "dump-config",
    "leases",
    "list-firewall-rules",
    "pbr-add-route",
    "pbr-add-rule",
    "pbr-create-table",
    "pbr-delete-route",
    "pbr-delete-rule",
    "pbr-delete-table",
    "pbr-list-routes",
    "pbr-list-rules",
    "pbr-list-tables",
    "reboot-device",
    "show",
)

# CloudStack stores the result of an API job in a TEXT column (async_job.job_result: 65,535 bytes), where quoted text is
# escaped once more. With a longer result the job fails after the action was executed.
OUTPUT_CHARACTERS_MAX = 48_000  # guard: a-page-holds-a-thousand-rules


# The longest legitimate output: JSON of that many characters, each of them escaped.
_PRINTED_CHARACTERS_MAX = 2 * OUTPUT_CHARACTERS_MAX + 1000


def bounded_output(output: str) -> str:
    """A custom action's output as it came from a host: printable ASCII and line ends, of bounded length."""
    text = printable_ascii(output[: _PRINTED_CHARACTERS_MAX + 1])
    if len(text) <= _PRINTED_CHARACTERS_MAX:  # guard: escapes-count-as-printed
        return text
    return f"{text[:OUTPUT_CHARACTERS_MAX]}\n... cut here, after {OUTPUT_CHARACTERS_MAX} characters"


def check_known(action: str, hooks: Collection[str]) -> None:
    """Raise BadRequest for an action that is neither built in nor one of the operator's ``hooks``."""
    if action not in BUILT_IN and action not in hooks:
        known = ", ".join(sorted({*BUILT_IN, *hooks}))
        raise BadRequest(f"custom-action {action}: there is no such action on this host", hint=f"known: {known}")


def success_json(message: str) -> str:
    """The JSON that means success to CloudStack, with a message that its UI shows."""
    return json.dumps({"status": "success", "printmessage": "true", "message": message})


def hook_output(action: str, output: str) -> str:
    """The output of a hook that exited with 0, in printable ASCII and at most OUTPUT_CHARACTERS_MAX characters.

    Raises HostRefused if it is a JSON object whose ``status`` is not ``success``: to CloudStack that is a failure,
    independent of the exit status.
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
    r"""``text`` with characters other than printable ASCII, line ends and tabs as ``\uXXXX``: in JSON the same text."""
    if text.isascii() and all(" " <= it <= "~" or it in "\n\t" for it in text):
        return text
    return "".join(it if " " <= it <= "~" or it in "\n\t" else unicode_escape(it) for it in text.replace("\r\n", "\n"))


def page_of(lines: Sequence[str], params: Mapping[str, str], *, none: str) -> str:
    """The lines that contain the parameter ``filter``, without the first ``skip`` of them; ``none`` if there is none.

    Unknown parameters are ignored. Raises BadRequest if ``skip`` is not a number.
    """
    text, skip = params.get("filter", ""), params.get("skip", "") or "0"
    if not (skip.isascii() and skip.isdigit()) or len(skip) > 9:
        raise BadRequest(f"payload.action-params.skip: {skip[:40]!r} is not a number of lines")
    found = [printable_ascii(line) for line in lines if text in line][int(skip) :]
    return truncated(found, after=int(skip)) if found else none


def truncated(lines: Sequence[str], limit: int = OUTPUT_CHARACTERS_MAX, *, after: int | None = None) -> str:
    """The lines as one text of at most about ``limit`` characters. The last line says how many lines were left out.

    ``after``: the number of lines that the parameter ``skip`` left out before these. The last line then explains
    ``skip`` and ``filter``; None: the action does not have these parameters.
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
    """Sections with titles, together at most about ``limit`` characters. The longest are truncated."""
    titled = [(title, [f"  {line}" for line in lines] or ["  (none)"]) for title, lines in sections]
    sizes = {title: sum(len(line) + 1 for line in lines) for title, lines in titled}
    shares: dict[str, int] = {}
    left = limit
    for at, title in enumerate(sorted(sizes, key=lambda it: sizes[it])):
        shares[title] = min(sizes[title], left // (len(sizes) - at))
        left -= shares[title]
    return "\n".join(f"{title}\n{truncated(lines, shares[title])}" for title, lines in titled)
