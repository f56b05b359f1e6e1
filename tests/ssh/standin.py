"""A stand-in for the agent: uses the real protocol, behaves as /run/standin.json says, and records its calls.

It is started like the real agent, as ``standin.py agent connect``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "internal"))

from netloom.standbywire import SET_GROUP, GroupAnswer, SetGroup, packed, unpacked
from netloom.wire import Call, FrameReader, Hello, Reply, encode

SCRIPT = "/run/standin.json"
JOURNAL = "/run/standin.log"

answered: Counter[str] = Counter()  # over this connection


def main() -> int:
    with open(SCRIPT) as file:
        script = json.load(file)
    how = script.get("how", "answer")
    if how == "refuse":
        sys.stderr.write("netloom agent: the socket is on fire\n")
        return 3
    if how == "cut-once" and not deaths():
        journal_death()
        os.kill(ssh_session(), 9)
    if how == "noise":
        os.write(1, script["noise"].encode())
    if how == "silent":
        time.sleep(600)
    protocol = script.get("protocol", 1)
    hello = Hello(version="9.9", build="standin", protocol=protocol, oldest=script.get("oldest", protocol))
    write = drip if how == "drip" else write_at_once
    (write if script.get("what") == "hello" else write_at_once)(encode(hello))
    reader = FrameReader()
    while data := os.read(0, 1 << 20):
        for message in reader.feed(data):
            if isinstance(message, Call):
                journal(message)
                if message.command in script.get("on", [message.command]):
                    if how == "frame":
                        os.write(1, script["length"].to_bytes(4, "big") + b"x" * 4096)
                        time.sleep(600)
                    if how == "flood":  # until the connection is closed
                        chunk = bytes.fromhex(script["chunk"]) * script.get("times", 1)
                        for _ in range(script.get("chunks", 1 << 40)):
                            os.write(1, chunk)
                        time.sleep(600)
                    if how == "hang":
                        time.sleep(600)
                    if how == "die" or (how == "die-once" and deaths() == 0):
                        journal_death()
                        os.kill(os.getppid(), 9) if script.get("with_shell") else os._exit(9)
                answer(message, script, write if script.get("what") == "reply" else write_at_once)
    return 0


def ssh_session() -> int:
    """The process of sshd that this one was started by."""
    pid = os.getppid()
    while True:
        with open(f"/proc/{pid}/stat") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
        if name.startswith("sshd"):
            return pid
        pid = int(rest.split()[1])


def write_at_once(data: bytes) -> None:
    os.write(1, data)


def drip(data: bytes) -> None:
    """One byte a second."""
    for at in range(len(data)):
        os.write(1, data[at : at + 1])
        time.sleep(1)


def answer(call: Call, script: dict[str, object], write: Callable[[bytes], None]) -> None:
    replies = script.get("replies", {})
    assert isinstance(replies, dict)
    holds = script.get("holds", [])
    assert isinstance(holds, list)
    reply = replies.get(call.command, {})
    if isinstance(reply, list):  # one after the other; the last one stays
        reply = reply[min(answered[call.command], len(reply) - 1)]
    answered[call.command] += 1
    fields = {"holds": call.scope_id in holds, **reply}
    if call.command == SET_GROUP:  # every host has the group that it gets
        fields["data"] = packed(GroupAnswer(group=unpacked(call.payload, SetGroup).group))
    write(encode(Reply(call_id=call.call_id, **fields)))


def journal(call: Call) -> None:
    asked = {
        "call_id": call.call_id,
        "command": call.command,
        "scope_id": call.scope_id,
        "payload": call.payload.decode(errors="replace"),
        "epoch": call.epoch,
        "owner": call.registration.owner,
        "signers": None if call.signers is None else [call.signers.host, *(it.hex() for it in call.signers.keys)],
        "remaining_ms": call.remaining_ms,
        "uid": os.getuid(),
    }
    with open(JOURNAL, "a") as file:
        file.write(json.dumps(asked) + "\n")


def deaths() -> int:
    return os.path.exists(JOURNAL + ".died")


def journal_death() -> None:
    with open(JOURNAL + ".died", "w"):
        pass


if __name__ == "__main__":
    sys.exit(main())
