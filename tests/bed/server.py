"""The server side of a bed process: runs each request in a thread of its own; answers may come in any order."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bed import crafted, flow_probes, inventory, observation, probes, trunk
from bed.probes import Control

RUN_TIMEOUT_S = 120.0
WIDTH = 48
OUTPUT_BYTES_MAX = 16 << 20


def run(
    stop: Control,
    argv: list[str],
    *,
    input: str = "",
    environment: dict[str, str] | None = None,
    directory: str = "/",
    uid: int = 0,
    timeout_s: float = RUN_TIMEOUT_S,
) -> dict[str, Any]:
    """Run a program; returns exit status and output.

    After ``timeout_s`` seconds its process group is killed, and TimeoutError raised.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=directory,
        start_new_session=True,
        **_as_user(uid),
    )
    try:
        out, err = process.communicate(input.encode("utf-8", "surrogateescape"), timeout_s)
    except subprocess.TimeoutExpired as expired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise TimeoutError(f"{argv}: still running after {timeout_s:.0f} s") from expired
    return {
        "status": process.returncode,
        "out": out.decode("utf-8", "surrogateescape"),
        "err": err.decode("utf-8", "surrogateescape"),
        "seconds": time.monotonic() - began,
    }


def _as_user(uid: int) -> dict[str, Any]:
    return {"user": uid, "group": uid, "extra_groups": []} if uid else {}


def execute(
    stop: Control,
    argv: list[str],
    *,
    environment: dict[str, str],
    directory: str,
    uid: int,
    patience_s: float,
) -> dict[str, Any]:
    """Run a program as CloudStack's client does.

    stdin is a pipe that stays open and empty. stderr is merged into stdout. The output is read to end of file, then the
    exit is awaited. The client has no time limit; here the process group is killed after ``patience_s`` seconds.
    ``hung`` is then ``reading`` (a process kept the output open), ``exiting``, or ``printing`` (too much output).
    """
    began = time.monotonic()
    stdin_read, stdin_write = os.pipe()
    out_read, out_write = os.pipe()
    hung, output = "", b""
    try:
        process = subprocess.Popen(
            argv,
            stdin=stdin_read,
            stdout=out_write,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
            start_new_session=True,
            **_as_user(uid),
        )
    except OSError:
        for descriptor in (stdin_read, stdin_write, out_read, out_write):
            os.close(descriptor)
        raise
    os.close(stdin_read)
    os.close(out_write)
    deadline = began + patience_s
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([out_read], [], [], left)[0]:
            hung = "reading"
            break
        piece = os.read(out_read, 65536)
        if not piece:
            break
        output += piece
        if len(output) > OUTPUT_BYTES_MAX:
            hung = "printing"
            break
    ended_at = None
    try:
        process.wait(max(0.1, deadline - time.monotonic()) if not hung else 0.1)
        ended_at = time.monotonic()
    except subprocess.TimeoutExpired:
        hung = hung or "exiting"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    os.close(stdin_write)
    os.close(out_read)
    return {
        "status": process.returncode,
        "output": output.decode("utf-8", "surrogateescape"),
        "seconds": (ended_at or time.monotonic()) - began,
        "hung": hung,
    }


def read(stop: Control, path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def write(stop: Control, path: str, text: str, mode: int = 0o644, uid: int = 0) -> None:
    """Write a file and make its directories. Mode and owner do not depend on the umask."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        os.fchmod(file.fileno(), mode)
        os.fchown(file.fileno(), uid, uid)
        file.write(text)


def sysctl(stop: Control, name: str, value: str) -> str:
    """Set a sysctl of this network namespace ("net.ipv4.ip_forward"), unless ``value`` is empty; its present value."""
    path = "/proc/sys/" + name.replace(".", "/")
    if value:
        with open(path, "w") as file:
            file.write(value)
    with open(path) as file:
        return file.read().strip()


def remove(stop: Control, path: str) -> None:
    os.unlink(path)


def listing(stop: Control, path: str) -> list[str]:
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def many(stop: Control, probe: str, calls: list[dict[str, Any]]) -> list[Any]:
    """Run one probe with many sets of arguments, up to 48 at a time; the answers keep their order."""
    with ThreadPoolExecutor(WIDTH) as pool:
        return list(pool.map(lambda arguments: probes.PROBES[probe](stop, **arguments), calls))


OPERATIONS: dict[str, Callable[..., Any]] = {
    **probes.PROBES,
    **{function.__name__: function for function in (run, execute, read, write, sysctl, remove, listing, many)},
    "objects": inventory.objects,
    **{
        function.__name__: function
        for function in (observation.observe, observation.observed, observation.dhcp_answers, crafted.craft_flows)
    },
    **flow_probes.OPERATIONS,
    "switch_trunks": trunk.switch_trunks,
    "add_access": trunk.add_access,
    "frames_seen": trunk.frames_seen,
}


def serve(requests: Iterable[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Answer every request until ``requests`` ends."""
    controls: dict[int, Control] = {}

    def answer(number: int, operation: str, arguments: dict[str, Any], control: Control) -> None:
        try:
            say({"id": number, "value": OPERATIONS[operation](control, **arguments)})
        except Exception as error:  # noqa: BLE001 - told to the test, which raises it
            text = traceback.format_exc()
            kind = "TimeoutError" if isinstance(error, TimeoutError) else type(error).__name__
            say({"id": number, "error": f"{kind}: {error}", "traceback": text, "errno": getattr(error, "errno", None)})
        finally:
            controls.pop(number, None)

    for line in requests:
        request = json.loads(line)
        number: int = request["id"]
        if request["operation"] == "stop":
            if control := controls.get(number):
                control.set()
            continue
        control = Control(lambda number=number: say({"id": number, "ready": True}))  # type: ignore[misc]
        controls[number] = control
        arguments = (number, request["operation"], request["arguments"], control)
        threading.Thread(target=answer, args=arguments, daemon=True).start()
