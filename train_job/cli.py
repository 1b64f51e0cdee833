"""Training's command line: a flag for every setting, in groups, with examples first.

In: the fields of `TrainConfig` and `ModelConfig`, whose help stands beside their defaults, and what was typed. Out:
the settings that were given, for `config.build_config`; `--help` and `--presets` print and exit.
"""

import argparse
import inspect
import re
import shutil
import typing
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from gptcore.config import MODEL_FIELDS
from gptcore.errors import ConfigError, did_you_mean
from train_job.config import HINTS, TrainConfig, bare, read_yaml

MODEL_GROUP = "Shape of the model"
WIDEST = 110
"""Columns that help takes at most."""
COMMAND = "python train_job/run.py"
EXAMPLES = {
    "": "the preset quick, on text that Python brings along: minutes",
    "--data notes.txt --name notes": "your own text",
    "--data notes.txt --max-minutes 10": "no longer than that",
    "--preset tiny --data 'books/*.txt'": "another preset",
    "--preset foundry-124m --data 'web/*.parquet' --use-gpu": "a full-sized model on a GPU",
    "--init-from models:/gpt@champion --data new.txt --max-steps 200": "fine-tune the best model so far",
    "--resume notes --max-steps 1200": "go on with a run, further than was planned",
    "--presets": "the presets' shapes, memory and time here",
}


def parse_settings(argv: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line gives, its --config file's below its flags, for `build_config`.

    Raises ConfigError; `--help` and `--presets` print and exit 0.
    """
    parser = settings_parser(
        COMMAND, "Train a GPT on text and register it. Flags win over --config, which wins over --preset.", EXAMPLES
    )
    return given_settings(parser, argv)


def settings_parser(prog: str, description: str, examples: dict[str, str]) -> argparse.ArgumentParser:
    """A command line with a flag for every setting; `examples` are arguments, and what they do."""
    from train_job.planning.presets import notes

    listed = "\n".join(f"  {line}" for line in notes())
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--preset NAME] [--config FILE.yaml] [--SETTING VALUE ...]",
        description=f"{description}\n\n{told(prog, examples)}\n\npresets:\n{listed}",
        allow_abbrev=False,
        formatter_class=Help,
        add_help=False,
    )
    first = parser.add_argument_group("Help")
    first.add_argument("-h", "--help", action="help", help="show this and leave")
    first.add_argument("--presets", action=ShowPresets, help="show what each preset takes on this machine, and leave")
    for title, group in groups():
        place = parser.add_argument_group(title)
        if not any(action.dest == "config" for action in parser._actions):
            place.add_argument("--config", metavar="FILE.yaml", help="settings as YAML, under the names here, _ for -")
        for f in group:
            add_flag(place, f, HINTS[f.name])
    return parser


def told(prog: str, examples: dict[str, str]) -> str:
    """Examples, a line each with what it does, or two where that is too long."""
    commands = {f"  {prog} {arguments}".rstrip(): what for arguments, what in examples.items()}
    room = WIDEST - 5 - max(map(len, commands.values()))
    column = max(len(command) for command in commands if len(command) <= room)
    lines = ["examples:"]
    for command, what in commands.items():
        beside = f"{command.ljust(column)}  # {what}"
        lines += [beside] if len(command) <= column else [f"  # {what}:", command]
    return "\n".join(lines)


@cache
def groups() -> list[tuple[str, list[Any]]]:
    """The settings under the headings that TrainConfig's source has as comments, the model's among them."""
    by_name = {f.name: f for f in fields(TrainConfig)}
    found: list[tuple[str, list[Any]]] = [("Where to begin", [])]
    for line in inspect.getsource(TrainConfig).splitlines():
        if heading := re.fullmatch(r" {4}# (.+)", line):
            found.append((heading[1], []))
        elif (name := re.match(r" {4}(\w+): ", line)) and name[1] in by_name:
            found[-1][1].append(by_name[name[1]])
    for i, (_, group) in enumerate(found):
        if by_name["model"] in group:
            found[i] = (MODEL_GROUP, [*(f for f in group if f.name != "model"), *MODEL_FIELDS])
    return found


def add_flag(parser: argparse._ActionsContainer, f: Any, hint: Any) -> None:
    """A dataclass field as a flag, with its own help."""
    flag, text = "--" + f.name.replace("_", "-"), help_text(f)
    if hint is bool:
        parser.add_argument(flag, help=text, default=None, action=argparse.BooleanOptionalAction)
    else:
        nargs = "+" if typing.get_origin(hint) is tuple else None
        parser.add_argument(flag, help=text, metavar=metavar(f, hint), nargs=nargs)


def given_settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What the command line gives, its --config file's below its flags. Raises ConfigError for an unknown flag."""
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0].split('=')[0], known)}")
    flags = {k: v for k, v in vars(namespace).items() if v is not None and k != "config"}
    return ({} if namespace.config is None else read_yaml(namespace.config)) | flags


class Parser(argparse.ArgumentParser):
    """argparse, with our kind of error."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help in two columns, the second as wide as the terminal allows."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(WIDEST, shutil.get_terminal_size().columns))


class ShowPresets(argparse.Action):
    """`--presets`: prints the table and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from train_job.planning.presets import show

        show()
        parser.exit()


def help_text(f: Any) -> str:
    """A field's help with its unit and default, as argparse takes it."""
    default = f.default if not isinstance(f.default, tuple) else " ".join(map(repr, f.default))
    notes = [f.metadata["unit"]] if f.metadata["unit"] else []
    notes += [f"default: {default}"] if default is not None else []
    return (f.metadata["help"] + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%")


def metavar(f: Any, hint: Any) -> str:
    """What stands for a flag's value."""
    choices = f.metadata["choices"]
    return "{" + ",".join(choices) + "}" if choices else {int: "INT", float: "FLOAT"}.get(bare(hint)[0], "TEXT")
