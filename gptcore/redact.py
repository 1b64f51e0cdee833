"""Text without the users, passwords and keys that its URLs contain, for terminals, logs and files."""

import re

USER = re.compile(
    r"\b(?!sqlite:|file:)([a-z][\w+.-]*://)"
    r"(?:[^\s/?#:@\[]+:(?!\d{1,5}(?:[/?#\s]|$))[^@\n]*@)?"  # user:password, which may contain a space
    r"(?:\S*@)?",  # up to the last @, whatever else the password contains
    re.IGNORECASE,
)
KEY = re.compile(r"(?<=[?&;])([\w-]*(?:password|passwd|pwd|secret|token|signature|sig|key)=)[^\s&;#]+", re.IGNORECASE)


def without_password(text: str) -> str:
    """`text` without the users, passwords and keys of its URLs, whatever characters these contain."""
    return KEY.sub(r"\1***", USER.sub(r"\1", text))


def reason(error: BaseException) -> str:
    """The first line of an error, without passwords and with a full stop; its type if it says nothing."""
    return without_password((str(error) or type(error).__name__).splitlines()[0]).rstrip(".") + "."
