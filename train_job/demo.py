"""`make demo`: trains, registers and promotes a model on text that comes with Python, and prints what to do next.

`make demo-chat` gives the argument `chat`: it trains a base on that text, and then tunes it to answer, on the built-in
conversations. Out: the run `demo`, or `demo-chat-base` and `demo-chat`. A second call resumes an interrupted demo, or
shows a finished one. Further arguments are those of `train_job/run.py`, such as `--max-steps 20`.
"""

import sys

from gptcore.home import home
from train_job.run import main

NEXT = """
next      .venv/bin/python train_job/run.py --data FILE  train on your own text
          .venv/bin/python train_job/run.py --help       every setting, with its unit and default"""
CHAT_NEXT = """
next      .venv/bin/python train_job/run.py --objective chat --data FILE  train on your own conversations (docs/chat.md)
          .venv/bin/python -m bench.chat                                  count the right answers by kind of task"""


def demo(argv: list[str]) -> int:
    """Runs or resumes the demo with more settings; returns the job's exit code."""
    chat = argv[:1] == ["chat"]
    runs = chat_runs() if chat else {"demo": []}
    for name, settings in runs.items():
        begun = (home() / "runs" / name / "config.yaml").exists()
        code = main(["--resume", name, *argv[chat:]] if begun else ["--name", name, *settings, *argv[chat:]])
        if code:
            return code
    print(CHAT_NEXT if chat else NEXT)
    return 0


def chat_runs() -> dict[str, list[str]]:
    """The settings of the chat demo's two runs, by their names."""
    base = str(home() / "runs" / "demo-chat-base" / "package")
    return {
        "demo-chat-base": ["--preset", "chat", "--register-as", "gpt-chat-base", "--max-steps", "100"],
        "demo-chat": ["--preset", "chat", "--objective", "chat", "--init-from", base],
    }


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
