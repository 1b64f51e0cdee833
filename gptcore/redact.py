"""The one way to show a URL, or a text with URLs in it: without users, passwords and keys.

In comes any text, such as a tracking URI or a client's error; out comes the same, fit for a terminal, a log, a file.
"""

import re

USER = re.compile(
    r"\b(?!sqlite:|file:)([a-z][\w+.-]*://)"
    r"(?:[^\s/?#:@\[]+:(?!\d{1,5}(?:[/?#\s]|$))[^@\n]*@)?"  # user:password, in which there may be a space
    r"(?:\S*@)?",  # up to the last @ in any case: whatever else a password has in it
    re.IGNORECASE,
)
KEY = re.compile(r"(?<=[?&;])([\w-]*(?:password|passwd|pwd|secret|token|signature|sig|key)=)[^\s&;#]+", re.IGNORECASE)


def without_password(text: str) -> str:
    """`text` in which no URL names a user or a password, whatever characters these have."""
    return KEY.sub(r"\1***", USER.sub(r"\1", text))
