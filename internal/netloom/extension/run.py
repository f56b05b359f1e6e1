"""Run one call: check it, find its host, send it there, and return what to print.

The process that CloudStack started and the resident helper use the same code: ``run_blocking`` and ``run``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from netloom.extension.deadline import Deadline
from netloom.extension.record import CallRecord
from netloom.extension.request import check

if TYPE_CHECKING:
    from netloom.extension.pool import Pool

_RESOLVER_THREADS_MAX = 32
# The resident helper checks a larger payload in a thread, so that its other calls continue.
_LARGE_BYTES = 1 << 18


def run_blocking(command: str, payload_file: bytes, deadline: Deadline, executable: str, record: CallRecord) -> str:
    """What the call prints. Raises NetloomError with the exit status."""
    loop = asyncio.new_event_loop()
    resolve_in_threads(loop)
    # Closing the loop would wait for its resolver threads. The process ends next anyway.
    return loop.run_until_complete(run(command, payload_file, deadline, executable, record, os.environ, None))


async def run(
    command: str,
    payload_file: bytes,
    deadline: Deadline,
    executable: str,
    record: CallRecord,
    environ: Mapping[str, str],
    pool: Pool | None,
) -> str:
    """The same inside a running loop. ``pool`` has the channels that earlier calls opened; None: open new ones.

    ``record`` is kept up to date for the log. Raises NetloomError with the exit status.
    """
    record.doing = "checking the payload"
    arguments = (command, payload_file, executable, record.call_id)
    if pool is not None and len(payload_file) > _LARGE_BYTES:
        request = await asyncio.to_thread(check, *arguments)  # guard: a-large-payload-does-not-stop-the-loop
    else:
        request = check(*arguments)
    record.scope_id = request.scope_id
    record.doing = "loading SSH"
    from netloom.extension.dispatch import dispatch  # asyncssh: twenty bare start-ups, and a bad payload needs none
    from netloom.extension.pool import Pool  # the same

    record.doing = f"asking {', '.join(request.details.candidates)}"
    return await dispatch(request, deadline, environ, record, pool or Pool())


def resolve_in_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Give name resolution many threads, so that a resolver that hangs for one host does not delay the others."""
    loop.set_default_executor(ThreadPoolExecutor(_RESOLVER_THREADS_MAX))
