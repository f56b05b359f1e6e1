"""Work that goes on in a thread while a test does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Repeat ``work`` until the block ends. Then raise the exception that ended the repetition early, if one did.

    ``work`` waits by itself between two repetitions, if it has to.
    """
    done = threading.Event()
    failures: list[BaseException] = []

    def repeat() -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread of the test
            failures.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]
