"""`make demo`: trains, registers and promotes a model on text that comes with Python, and prints what to do next.

Out: the run `demo`. A second call resumes an interrupted demo, or shows a finished one. Arguments are those of
`train_job/run.py`, such as `--max-steps 20`.
"""

import sys

from gptcore.home import home
from train_job.run import main

NEXT = """
next      .venv/bin/python train_job/run.py --data FILE  train on your own text
          .venv/bin/python train_job/run.py --help       every setting, with its unit and default"""


def demo(argv: list[str]) -> int:
    """Runs or resumes the demo with more settings; returns the job's exit code."""
    begun = (home() / "runs" / "demo" / "config.yaml").exists()
    code = main(["--resume" if begun else "--name", "demo", *argv])
    if code == 0:
        print(NEXT)
    return code


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
