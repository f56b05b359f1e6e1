"""One HTTP connection of a VM, with limits on time, size and number of requests. h11 parses and writes HTTP/1.1.

A ``Site`` is a function from a request to an answer. It gets no request body: a request with a body is refused.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import h11

from netloom.guest.limits import Unread
from netloom.guest.loop import Loop

# Time for a request to be complete, from the start of the connection or the end of the last answer.
REQUEST_S = 5.0
# Time for the client to receive an answer. The longest answer is a megabyte of user data over a slow link.
ANSWER_S = 30.0
# Time for the client to receive our last bytes and close the connection.
LINGER_S = 1.0
HEAD_BYTES_MAX = 8192
REQUESTS_MAX = 100

_READ_BYTES = 16384


class HttpAnswer(NamedTuple):
    """An HTTP response. Errors have no explanatory text, because scripts would take it for a key or a password."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


METHOD_NOT_ALLOWED = HttpAnswer(405, headers=(("Allow", "GET, HEAD"),))
TOO_MUCH_UNREAD = HttpAnswer(503, headers=(("Retry-After", "1"), ("Connection", "close")))
TOO_MANY_REQUESTS = HttpAnswer(429, headers=(("Retry-After", "1"), ("Connection", "close")))

Site = Callable[[h11.Request], HttpAnswer | None]


class HttpConnection:
    """Answers requests on ``sock`` until the client closes it, a limit is reached, or ``site`` returns None.

    ``ended`` is called once, after the socket is closed. ``unread`` keeps the body of an answer until it is sent.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        site: Site,
        ended: Callable[[HttpConnection], None],
        unread: Unread,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._site = site
        self._ended = ended
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._request: h11.Request | None = None
        self._requests = 0
        self._out: deque[memoryview] = deque()
        self._unread = unread
        self._body: bytes | None = None  # of the answer that is being sent
        self._lingering = False
        self._open = True
        self._descriptor = sock.fileno()
        self._blocked = False  # the socket accepts no more of the answer now
        self._deadline = self._checked_at = loop.time() + REQUEST_S
        self._timer = loop.call_later(REQUEST_S, self._check_deadline)
        loop.add_reader(self._descriptor, self._readable)

    def close(self) -> None:
        """Close the connection at once, even in the middle of an answer."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._sock.close()
        self._release()
        self._ended(self)

    @property
    def unread(self) -> bool:
        """Whether the body of an answer was not sent completely."""
        return self._body is not None

    def _close_after(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        if self._deadline < self._checked_at:
            self._timer.cancel()
            self._check_after(seconds)

    def _check_after(self, seconds: float) -> None:
        self._checked_at = self._loop.time() + seconds
        self._timer = self._loop.call_later(seconds, self._check_deadline)

    def _check_deadline(self) -> None:
        # A later deadline does not change the timer: most connections end before it.
        if (left_s := self._deadline - self._loop.time()) > 0:
            self._check_after(left_s)
        else:
            self.close()

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self._request is None and not self._http.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2: empty lines before a request are ignored
        if data and not self._lingering:
            self._http.receive_data(data)
            self._advance()

    def _advance(self) -> None:
        """Answer at most one request. Further requests in the buffer wait for the next turn of the loop."""
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
                    self._send(HttpAnswer(413, headers=(("Connection", "close"),)))
                    return
                elif event is h11.NEED_DATA:
                    return
                else:
                    self.close()
                    return
        except h11.RemoteProtocolError as error:
            self._send(HttpAnswer(error.error_status_hint, headers=(("Connection", "close"),)))

    def _answer(self) -> None:
        assert self._request is not None
        answer = self._site(self._request)
        if answer is None:
            self.close()
            return
        self._requests += 1
        if self._requests >= REQUESTS_MAX:
            answer = answer._replace(headers=(*answer.headers, ("Connection", "close")))
        self._send(answer)

    def _send(self, answer: HttpAnswer) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.close()
            return
        length = ("Content-Length", str(len(answer.body)))
        headers = [("Content-Type", "text/plain"), length, *answer.headers]
        self._queue(h11.Response(status_code=answer.status, headers=headers))
        if answer.body and not (self._request and self._request.method == b"HEAD"):
            self._body = self._unread.keep(answer.body)
            self._queue(h11.Data(data=self._body))
        self._queue(h11.EndOfMessage())
        self._close_after(ANSWER_S)
        self._write()

    def _queue(self, event: h11.Event) -> None:
        # Without copies: the body of an answer may be large, and its VM may have several connections.
        for data in self._http.send_with_data_passthrough(event) or ():
            if data:
                self._out.append(memoryview(data))

    def _release(self) -> None:
        self._out.clear()
        if self._body is not None:
            self._unread.release(self._body)  # guard: a-sent-answer-is-released
            self._body = None

    def _write(self) -> None:
        lasts = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        # The last bytes of a connection wait for its end, and travel in the same packet.
        flags = socket.MSG_NOSIGNAL | (0 if lasts else socket.MSG_MORE)  # guard: the-end-travels-with-the-answer
        try:
            while self._out:
                sent = self._sock.sendmsg(self._out, [], flags)
                while self._out and sent >= len(self._out[0]):
                    sent -= len(self._out.popleft())
                if sent:
                    self._out[0] = self._out[0][sent:]
        except (BlockingIOError, InterruptedError):
            if not self._blocked:
                self._blocked = True
                self._loop.remove_reader(self._descriptor)
                self._loop.add_writer(self._descriptor, self._write)
            return
        except OSError:
            self.close()
            return
        self._release()
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._descriptor)
            self._loop.add_reader(self._descriptor, self._readable)
        if lasts:
            self._http.start_next_cycle()
            self._request = None
            self._close_after(REQUEST_S)
            if self._http.trailing_data[0]:
                self._loop.call_soon(self._advance)
        else:
            self._linger()

    def _linger(self) -> None:
        # close() with unread bytes in the socket sends a reset, which can reach the client before our answer.
        self._lingering = True
        self._close_after(LINGER_S)
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
