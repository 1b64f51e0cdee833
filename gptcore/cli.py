"""The argument parser of every command: its errors are one line and name the nearest flag."""

import argparse
import re
from typing import NoReturn

from gptcore.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of printing the usage, and suggests the nearest flag for a typo."""

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        raise ConfigError(message + (f".{did_you_mean(flag[1], self._option_string_actions)}" if flag else ""))
