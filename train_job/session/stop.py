"""What Ctrl-C, `ray job stop` and a terminal that closes do to the driver once it has begun something: their signals.

In: signals. Out: a call at once, in a thread, and a KeyboardInterrupt where the driver asks for it. Nothing is
interrupted anywhere else: libraries lose or mistake an exception that comes from nowhere, and files and records would
be left half-written. A second signal ends the process at once.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Listens while it is entered, in the main thread. `number` is the signal to stop by, or 0.

    A first signal that is too `late` changes nothing.
    """

    def __init__(self, heard: Callable[[], None]) -> None:
        self.number, self.late, self._came = 0, False, False
        self._telling = threading.Thread(target=heard, daemon=True)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Of nohup's processes SIGHUP is ignored, and so it stays.
        heard = [n for n in SIGNALS if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, last: bool = False) -> None:
        """Raises KeyboardInterrupt if a stop was asked for. After the `last` check it is too late for one."""
        self.late = self.late or last
        if self.number:
            self._telling.join()
            raise KeyboardInterrupt(self.number)

    def _hear(self, number: int, frame: Any) -> None:
        if self._came and number != signal.SIGHUP:  # that one, shell and kernel may both send
            os._exit(128 + number)
        if self._came:
            return
        self._came = True
        if not self.late:
            self.number = number
            self._telling.start()
