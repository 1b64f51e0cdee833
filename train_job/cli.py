"""The command line of training: one flag per setting.

In: the fields of `TrainConfig` and `ModelConfig`, and the arguments. Out: the settings that were given, for
`config.build_config`. `--help` and `--presets` print and exit.
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

from gptcore.cli import Parser
from gptcore.config import MODEL_FIELDS
from gptcore.errors import ConfigError, did_you_mean
from train_job.config import HINTS, TrainConfig
from train_job.fields import bare
from train_job.yaml_files import read_yaml

PRESET_GROUP, MODEL_GROUP = "Preset", "Shape of the model"
WIDEST = 110
"""The most columns that help takes."""
COMMAND = "python train_job/run.py"
EXAMPLES = {
    "": "the preset quick, on text that comes with Python: minutes",
    "--data notes.txt --name notes": "your own text",
    "--data notes.txt --max-minutes 10": "stop after ten minutes",
    "--preset tiny --data 'books/*.txt'": "another preset",
    "--preset foundry-124m --data 'web/*.parquet' --use-gpu": "a full-sized model on a GPU",
    "--init-from models:/gpt@champion --data new.txt --max-steps 200": "fine-tune the best model so far",
    "--resume notes --max-steps 1200": "continue a run, with more steps than planned",
    "--presets": "shape, memory and time of each preset on this machine",
}


def parse_settings(argv: Sequence[str]) -> dict[str, Any]:
    """Parses a command line into settings for `build_config`; flags win over the --config file.

    Raises ConfigError; `--help` and `--presets` print and exit 0.
    """
    parser = settings_parser(
        COMMAND, "Train a GPT on text and register it. Flags win over --config, which wins over --preset.", EXAMPLES
    )
    return given_settings(parser, argv)


def settings_parser(prog: str, description: str, examples: dict[str, str]) -> Parser:
    """A parser with a flag for every setting; `examples` maps arguments to what they do."""
    from train_job.planning.presets import notes

    listed = "\n".join(f"  {line}" for line in notes())
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--preset NAME] [--config FILE.yaml] [--SETTING VALUE ...]",
        description=f"{description}\n\n{format_examples(prog, examples)}\n\npresets:\n{listed}",
        allow_abbrev=False,
        formatter_class=Help,
        add_help=False,
    )
    first = parser.add_argument_group("Help")
    first.add_argument("-h", "--help", action="help", help="show this help and exit")
    first.add_argument("--presets", action=ShowPresets, help="show what each preset needs on this machine, and exit")
    for title, group in groups():
        place = parser.add_argument_group(title)
        if title == PRESET_GROUP:
            place.add_argument(
                "--config", metavar="FILE.yaml", help="YAML file of settings; names as here, with _ for -"
            )
        for f in group:
            add_flag(place, f, HINTS[f.name])
    return parser


def format_examples(prog: str, examples: dict[str, str]) -> str:
    """The examples as text, one line each, or two where one is too long."""
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
    """The settings by group; the groups' titles are the comments in TrainConfig's source."""
    by_name = {f.name: f for f in fields(TrainConfig)}
    found: list[tuple[str, list[Any]]] = [(PRESET_GROUP, [])]
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
    """Adds a flag for a dataclass field."""
    flag, text = "--" + f.name.replace("_", "-"), help_text(f)
    if hint is bool:
        parser.add_argument(flag, help=text, default=None, action=argparse.BooleanOptionalAction)
    else:
        nargs = "+" if typing.get_origin(hint) is tuple else None
        parser.add_argument(flag, help=text, metavar=metavar(f, hint), nargs=nargs)


def given_settings(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The settings of the --config file and the flags; flags win. Raises ConfigError for an unknown flag."""
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0].split('=')[0], parser.flags)}")
    flags = {k: v for k, v in vars(namespace).items() if v is not None and k != "config"}
    return ({} if namespace.config is None else read_yaml(namespace.config)) | flags


class Help(argparse.RawDescriptionHelpFormatter):
    """Formats help in two columns, up to the terminal's width."""

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
    """A field's help with its unit and default, escaped for argparse."""
    default = f.default if not isinstance(f.default, tuple) else " ".join(map(repr, f.default))
    notes = [f.metadata["unit"]] if f.metadata["unit"] else []
    notes += [f"default: {default}"] if default is not None else []
    return (f.metadata["help"] + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%")


def metavar(f: Any, hint: Any) -> str:
    """The placeholder for a flag's value."""
    choices = f.metadata["choices"]
    return "{" + ",".join(choices) + "}" if choices else {int: "INT", float: "FLOAT"}.get(bare(hint)[0], "TEXT")
