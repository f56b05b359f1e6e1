"""Answer a call in place of a host without the program, when the call must not install it.

A removal installs nothing, and neither does a call that only reads. A host without the program holds nothing, unless a
state file or the namespace of the scope is still there. Then somebody has removed the program and left the network.
"""

from __future__ import annotations

import shlex

from netloom import names
from netloom.commands.table import row_of
from netloom.extension.ssh import NoAgent, SshConnection
from netloom.wire import Call, Reply

_STATES = "/var/lib/netloom/scopes"
_NAMESPACES = "/run/netns"

# Prints whether the program $1 exists, and which of the files $2, $3, ... The last line shows that the script ended.
_LOOK = r"""
export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
there() { [ -e "$1" ] || [ -L "$1" ]; }
if there "$1" || command -v "$1" >/dev/null; then printf 'netloom-program\n'; fi
shift
for file; do if there "$file"; then printf 'netloom-left %s\n' "$file"; fi; done
printf 'netloom-looked\n'
"""


async def reply_without_agent(connection: SshConnection, call: Call, why: NoAgent) -> Reply:
    """The reply of a host whose agent did not answer, because its program is missing. Changes nothing on the host.

    Raises ``why`` if the program is there, or if the host cannot be examined. Raises ConnectionLost.
    """
    left = await _left(connection, call.scope_id, why)
    if call.command == "locate":
        return Reply(call_id=call.call_id, holds=bool(left))
    if left:  # guard: what-is-left-on-a-host-is-told
        return Reply(
            call_id=call.call_id,
            status=3,
            error=f"{call.scope_id} is still on this host ({', '.join(left)}), and netloom is not installed there",
            hint=f"netloom agent install --hosts {connection.host}, and repeat the command",
            holds=True,
        )
    if row_of(call.command).kind == "acts":
        return Reply(
            call_id=call.call_id,
            status=3,
            error=f"{call.command}: {call.scope_id} is not on this host, and netloom is not installed there",
            hint="is the network implemented?",
        )
    return Reply(call_id=call.call_id)


async def _left(connection: SshConnection, scope_id: str, why: NoAgent) -> list[str]:
    """The files of the scope on the host."""
    program = next(iter(shlex.split(connection.login.agent)), "")
    files = [f"{_STATES}/{scope_id}.json", f"{_STATES}/{scope_id}.ended", f"{_NAMESPACES}/{names.namespace(scope_id)}"]
    done = await connection.execute(["sh", "-c", _LOOK, "netloom", program, *files])
    lines = done.out.splitlines()
    if "netloom-looked" not in lines or "netloom-program" in lines:  # guard: a-program-that-fails-may-hold-something
        raise why
    return [file for file in files if f"netloom-left {file}" in lines]
