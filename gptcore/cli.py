"""What commands share: a parser whose errors are one line and name the nearest flag, and Ctrl-C's signal."""

import argparse
import re
import signal
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


def heed_interrupts() -> None:
    """Lets SIGINT stop this process and those that it starts, also in a shell's background, where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
