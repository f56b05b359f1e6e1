"""One HTTP connection of a VM: bounded in time, size and number of requests; h11 reads and writes the protocol.

A site is a function from a request to an answer. It never sees a body: nothing here takes one.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import h11

# From the connection's start, or the last answer's end, until a request is complete.
REQUEST_S = 5.0
# Until an answer is taken; a megabyte of user data over a slow link is the longest.
ANSWER_S = 30.0
# After our last byte, for the client to take it and close.
LINGER_S = 1.0
HEAD_BYTES_MAX = 8192
REQUESTS_MAX = 100

_READ_BYTES = 16384


class HttpAnswer(NamedTuple):
    """``body`` goes out as it is. No page of words on an error: scripts take what they get for a key or a password."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


ONLY_READING = HttpAnswer(405, headers=(("Allow", "GET, HEAD"),))
TOO_MANY = HttpAnswer(429, headers=(("Retry-After", "1"), ("Connection", "close")))

Site = Callable[[h11.Request], HttpAnswer | None]


class HttpConnection:
    """Answers requests on ``sock`` until the client, a limit, or a site that returns None ends it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, site: Site, ended: Callable[[HttpConnection], None]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._site = site
        self._ended = ended
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._request: h11.Request | None = None
        self._requests = 0
        self._out: deque[memoryview] = deque()
        self._lingers = False
        self._open = True
        self._timer = loop.call_later(REQUEST_S, self.close)
        loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """End it now, whatever is under way."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._ended(self)

    def _within(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self.close)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif not self._lingers:
            self._http.receive_data(data)
            self._advance()

    def _advance(self) -> None:
        """Answer one request at most; the next one that is already here waits for its turn among the others'."""
        if not self._open:
            return
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.EndOfMessage):
                    self._answer()
                    return
                elif isinstance(event, h11.Data):
                    self._say(HttpAnswer(413, headers=(("Connection", "close"),)))
                    return
                elif event is h11.NEED_DATA:
                    return
                else:
                    self.close()
                    return
        except h11.RemoteProtocolError as error:
            self._say(HttpAnswer(error.error_status_hint, headers=(("Connection", "close"),)))

    def _answer(self) -> None:
        assert self._request is not None
        answer = self._site(self._request)
        if answer is None:
            self.close()
            return
        self._requests += 1
        if self._requests >= REQUESTS_MAX:
            answer = answer._replace(headers=(*answer.headers, ("Connection", "close")))
        self._say(answer)

    def _say(self, answer: HttpAnswer) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.close()
            return
        length = ("Content-Length", str(len(answer.body)))
        headers = [("Content-Type", "text/plain"), length, *answer.headers]
        self._put(h11.Response(status_code=answer.status, headers=headers))
        if answer.body and not (self._request and self._request.method == b"HEAD"):
            self._put(h11.Data(data=answer.body))
        self._put(h11.EndOfMessage())
        self._within(ANSWER_S)
        self._loop.remove_reader(self._sock)
        self._write()

    def _put(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            self._out.append(memoryview(data))

    def _write(self) -> None:
        try:
            while self._out:
                sent = self._sock.sendmsg(self._out, [], socket.MSG_NOSIGNAL)
                while self._out and sent >= len(self._out[0]):
                    sent -= len(self._out.popleft())
                if sent:
                    self._out[0] = self._out[0][sent:]
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._sock, self._write)
            return
        except OSError:
            self.close()
            return
        self._loop.remove_writer(self._sock)
        self._loop.add_reader(self._sock, self._readable)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._request = None
            self._within(REQUEST_S)
            self._loop.call_soon(self._advance)
        else:
            self._linger()

    def _linger(self) -> None:
        # Closing with unread bytes would reset the connection, and the reset could overtake our answer.
        self._lingers = True
        self._within(LINGER_S)
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
