"""How threads are started, so that an interrupt at any moment leaves them whole."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Sequence

__all__: list[str] = []


def start(threads: Sequence[threading.Thread]) -> None:
    """Start threads from one that no interrupt reaches, and wait for that.

    Ctrl-C inside ``Thread.start`` can leave a lock taken that the new thread then waits for
    without end. Only the main thread is interrupted, so another one calls it.
    """
    errors: list[BaseException] = []
    done = _thread.allocate_lock()
    done.acquire()

    def start_each() -> None:
        try:
            for thread in threads:
                thread.start()
        except BaseException as error:  # no memory for a thread, the interpreter shuts down
            errors.append(error)
        finally:
            done.release()

    _thread.start_new_thread(start_each, ())
    done.acquire()
    if errors:
        raise errors[0]
