"""The argument parser of every command: its errors are one line and name the nearest flag."""

import argparse
import re
from typing import NoReturn

from gptcore.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of printing the usage, and suggests the nearest flag for a typo."""

    @property
    def flags(self) -> list[str]:
        """Every flag, such as --help."""
        return list(self._option_string_actions)  # private, and in argparse since Python 2.7

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        raise ConfigError(message + (f".{did_you_mean(flag[1], self.flags)}" if flag else ""))
