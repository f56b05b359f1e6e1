"""The least that a metadata server can be: an event loop that reads requests and writes answers with h11.

http_loop.py PORT
"""

from __future__ import annotations

import asyncio
import sys

import h11

BODY = b"0000000a-1111-4000-8000-000000000000"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    http = h11.Connection(h11.SERVER)
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(16_384))
        elif isinstance(event, h11.EndOfMessage):
            length = str(len(BODY))
            response = h11.Response(
                status_code=200, headers=[("Content-Type", "text/plain"), ("Content-Length", length)]
            )
            parts = [http.send(it) for it in (response, h11.Data(data=BODY), h11.EndOfMessage())]
            writer.write(b"".join(part or b"" for part in parts))
            if http.our_state is not h11.DONE:
                break
            http.start_next_cycle()
        elif isinstance(event, h11.ConnectionClosed):
            break
    writer.close()


async def main(port: int) -> None:
    """Serve until the process is killed."""
    server = await asyncio.start_server(answer, "", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
