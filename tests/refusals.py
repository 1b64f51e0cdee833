"""Separates a command's error line from its progress lines."""

import re

PROGRESS = re.compile(r"^\.\.\. .*\n", re.MULTILINE)
"""A line of `gptcore.progress`. On a slow machine anything may take long enough for one."""


def one_error(said: str) -> str:
    """The single error line on stderr. Fails if there is anything else except progress lines."""
    [line] = PROGRESS.sub("", said).splitlines(keepends=True) or [""]
    assert line.startswith("error: "), said
    assert line.endswith("\n"), said
    return line
