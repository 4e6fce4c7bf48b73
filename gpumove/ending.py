"""What a script that ends without ``close`` leaves running. It knows nothing of saves."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor


def finish_at_exit(executor: ThreadPoolExecutor) -> None:
    """Let the work that an executor has been given end before the interpreter does.

    Executors refuse work once the interpreter shuts down; callbacks registered here run before that. The function
    has no public name in python 3.10 to 3.14; without it a save that runs then is lost, and says so.
    """
    register = getattr(threading, "_register_atexit", None)
    thread = weakref.ref(executor)

    def finish() -> None:
        if (found := thread()) is not None:
            found.shutdown()

    if register is not None:
        register(finish)
