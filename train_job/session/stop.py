"""Handles the signals of Ctrl-C, `ray job stop` and a closed terminal while a run is open.

In: signals. Out: one call at once, in a thread, and a KeyboardInterrupt at the next `check`. Nothing is interrupted
anywhere else: libraries lose or misread an exception in an unexpected place, and files would be left half-written. A
second signal ends the process at once.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Handles stop signals within its block, in the main thread. `number` is the signal that came, or 0.

    Once `late` is set, a first signal is ignored. `on_stop` is called in a thread.
    """

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self.number, self.late, self._came = 0, False, False
        self._thread = threading.Thread(target=on_stop, daemon=True)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Under nohup SIGHUP is ignored, and stays so.
        numbers = [n for n in SIGNALS if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, last: bool = False) -> None:
        """Raises KeyboardInterrupt if a signal came. After the `last` check, signals come too late."""
        self.late = self.late or last
        if self.number:
            self._thread.join()
            raise KeyboardInterrupt(self.number)

    def _handle(self, number: int, frame: Any) -> None:
        if self._came and number != signal.SIGHUP:  # the shell and the kernel may both send SIGHUP
            os._exit(128 + number)
        if self._came:
            return
        self._came = True
        if not self.late:
            self.number = number
            self._thread.start()
