"""`make demo`: trains, registers and promotes a model on text that comes with Python, and prints what to do next.

Out: the run `demo`. A second call resumes an interrupted demo, or shows a finished one.
"""

import sys

from gptcore.home import home
from train_job.run import main

NEXT = """
next      .venv/bin/python train_job/run.py --data FILE  train on your own text
          .venv/bin/python train_job/run.py --help       every setting, with its unit and default"""


def demo() -> int:
    """Runs or resumes the demo; returns the job's exit code."""
    begun = (home() / "runs" / "demo" / "config.yaml").exists()
    code = main(["--resume", "demo"] if begun else ["--name", "demo"])
    if code == 0:
        print(NEXT)
    return code


if __name__ == "__main__":
    sys.exit(demo())
