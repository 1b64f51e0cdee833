"""Disturbs every Python process that finds this file on its path, as the JSON file of CHAOS_SHIM says at that moment.

`clock_seconds` is added to the time of day. `write_seconds` is how much longer each fsync and each renaming takes.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

TIME, FSYNC, REPLACE = time.time, os.fsync, os.replace


def setting(name: str) -> float:
    """What the file says; 0 if there is none. Leaves a file that shows that it had an effect."""
    with contextlib.suppress(OSError, ValueError), open(path := os.environ["CHAOS_SHIM"]) as file:
        value = float(json.load(file).get(name, 0))
        if value and not os.path.exists(seen := f"{path}.{name}"):
            open(seen, "w").close()
        return value
    return 0.0


def late(call: Callable[..., Any]) -> Callable[..., Any]:
    def wait_and_call(*args: Any, **options: Any) -> Any:
        if seconds := setting("write_seconds"):
            time.sleep(seconds)
        return call(*args, **options)

    return wait_and_call


if "CHAOS_SHIM" in os.environ:
    time.time = lambda: TIME() + setting("clock_seconds")
    os.fsync, os.replace = late(FSYNC), late(REPLACE)
