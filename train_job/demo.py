"""`make demo`: the whole way once, on text that every Python brings along, and what to do next.

Out: run `demo`, trained, registered and promoted. Run again, it goes on with what is there: a finished demo is shown,
an interrupted one is finished.
"""

import sys

from gptcore.home import home
from train_job.run import main

NEXT = """
next      .venv/bin/python train_job/run.py --data FILE  train on a text of your own
          .venv/bin/python train_job/run.py --help       every setting, with its unit and default"""


def demo() -> int:
    """Runs or finishes the demo; returns the job's exit code."""
    begun = (home() / "runs" / "demo" / "config.yaml").exists()
    code = main(["--resume", "demo"] if begun else ["--name", "demo"])
    if code == 0:
        print(NEXT)
    return code


if __name__ == "__main__":
    sys.exit(demo())
