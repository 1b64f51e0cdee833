"""What a command says when it refuses, told apart from how far it has come."""

import re

PROGRESS = re.compile(r"^\.\.\. .*\n", re.MULTILINE)
"""A line of `gptcore.progress`. On a slow machine anything may take long enough for one."""


def one_error(said: str) -> str:
    """The one line that a refusal writes to stderr; fails where there is anything else but progress."""
    [line] = PROGRESS.sub("", said).splitlines(keepends=True) or [""]
    assert line.startswith("error: "), said
    assert line.endswith("\n"), said
    return line
