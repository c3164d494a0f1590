"""Worker process of a launched function: it reads the call, makes it, and writes how it ended.

``python function_worker.py CALL RESULT PATH``, a script: two descriptors of files (see
``shared_pickle.py``), and as JSON the folders from which the caller imports. So everything that the
caller can import can be imported here, this package as well.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback

_POLL_SECONDS = 0.5


def main() -> None:
    """Make the call, and write ``(is_error, value, text, when)`` to the file of the result."""
    call_fd, result_fd = map(int, sys.argv[1:3])
    sys.path[:] = json.loads(sys.argv[3])
    sys.argv[:] = [""]
    _end_with(os.getppid())
    from dvkernels import pickling
    from dvkernels.launcher import shared_pickle

    try:
        fn, args, kwargs = shared_pickle.read(call_fd)
        os.close(call_fd)
        try:
            result = (False, fn(*args, **kwargs), "", 0.0)
        except SystemExit as end:
            if end.code != 0:
                raise
            result = (False, None, "", 0.0)  # a process of parameter servers, which are done
        try:
            shared_pickle.write(result_fd, result)
        except Exception as error:
            raise _unpicklable(error) from None
    except BaseException as error:
        when = time.monotonic()
        os.ftruncate(result_fd, 0)
        is_sent = pickling.can_be_sent(error)
        result = (True, error if is_sent else None, _text_of(error, is_sent), when)
        shared_pickle.write(result_fd, result)
        status = 1
    else:
        status = 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or None
            stream.flush()
    sys.exit(status)


def _unpicklable(error: Exception) -> Exception:
    from dvkernels import user_errors
    from dvkernels.errors import LaunchError

    return LaunchError(
        f"launch: the result of the function cannot be pickled: {user_errors.describe(error)}; "
        f"return arrays, numbers, text and containers of them"
    )


def _end_with(parent: int) -> None:
    """End this process, and those that it has started, soon after its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="dvkernels-parent").start()


def _text_of(error: BaseException, is_sent: bool) -> str:
    """Return the traceback of an exception, as users see it; what is sent speaks for itself."""
    from dvkernels import tracebacks

    tracebacks.trim(error)
    trace = error.__traceback__
    try:
        lines = traceback.format_exception(type(error), error, trace)
        said = traceback.format_exception_only(error) if is_sent else []
        if said and lines[-len(said) :] == said:  # message and notes; not of an exception group
            del lines[-len(said) :]
        return "".join(lines)
    except Exception:  # its __str__ may fail
        return "".join(traceback.format_tb(trace)) + type(error).__name__


if __name__ == "__main__":
    main()
