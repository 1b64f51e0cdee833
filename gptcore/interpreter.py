"""Checks the Python version and installed packages, to print one line instead of a traceback.

Any Python on a machine may run this file, so it avoids newer syntax.
"""

import os
import sys

OLDEST = (3, 11)
NEEDED = ("fastapi", "mlflow", "numpy", "ray", "safetensors", "tiktoken", "torch")
"""Packages that distinguish this project's environment from others."""
LIGHT = {
    "bench.gpu": ("fsspec", "numpy", "psutil", "safetensors", "tiktoken", "tokenizers", "torch", "yaml"),
    "serve_app.chat": ("httpx2",),
}
"""Commands that need less."""
OURS = ("bench", "docs", "gptcore", "serve_app", "train_job")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def check():
    """End one of our commands with one line and exit code 2 if this Python cannot run it.

    When imported as a library, check the version only, and raise ImportError with that line.
    """
    command = arguments()
    missing = problem(needed(command))
    if not missing:
        return
    line = " ".join([sys.executable or "this Python", missing + "; use", suggested_command(command)])
    if not command:
        raise ImportError(line)
    sys.stderr.write("error: " + line + "\n")
    sys.exit(2)


def arguments():
    """The arguments after the interpreter, if they run one of our commands: "-m MODULE ..." or "FILE ..."; else []."""
    try:
        with open("/proc/self/cmdline") as file:
            line = file.read().split("\0")[1:-1]
    except (OSError, UnicodeDecodeError):
        line = getattr(sys, "orig_argv", ["", *sys.argv])[1:]
    for place, word in enumerate(line):
        if word == "-m" and line[place + 1 : place + 2]:
            return line[place:] if line[place + 1].split(".")[0] in OURS else []
        if not word.startswith("-"):
            folder = os.path.dirname(os.path.abspath(word))
            return line[place:] if folder in [os.path.join(ROOT, name) for name in OURS] else []
        if word.startswith("-c"):
            return []
    return []


def needed(command):
    """The packages that the command needs."""
    if not command:
        return ()
    return LIGHT.get(command[1] if command[0] == "-m" else "", NEEDED)


def problem(packages):
    """What this Python lacks, or an empty string."""
    if sys.version_info[:2] < OLDEST:
        return "is Python " + ".".join(str(part) for part in sys.version_info[:3]) + ", and this needs 3.11 or newer"
    from importlib.util import find_spec

    found = [(name, find_spec(name)) for name in packages]
    # Our folder mlflow/ is not the package of that name.
    lacks = [name for name, spec in found if spec is None or spec.origin is None]
    return "lacks " + ", ".join(lacks) if lacks else ""


def suggested_command(command):
    """A command that works."""
    rest = " ".join(command)
    there = os.path.join(ROOT, ".venv", "bin", "python")
    if os.path.exists(there) and not same_file(there, sys.executable):
        return (".venv/bin/python " if os.getcwd() == ROOT else there + " ") + rest
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return 'ray job submit --working-dir . -- "$PWD/.venv/bin/python" ' + rest
    return "make .venv/installed, then .venv/bin/python " + rest


def same_file(one, other):
    """Whether both paths are the same environment's Python. Links are not followed: environments share targets."""
    return os.path.abspath(one) == os.path.abspath(other or "")
