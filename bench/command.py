"""What most benchmarks do around a measurement: a folder, the report as a JSON line, and one line for bad input."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptcore.errors import FoundryError


def print_report(measure: Callable[[Path], dict[str, Any]]) -> int:
    """Prints the report of `measure`, which gets an empty folder. Returns 0, or 2 for bad input."""
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
            report = measure(Path(scratch))
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    return 0
