"""Settings as YAML files, of runs and of sweeps."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptcore.errors import ConfigError
from train_job.files import one_line, written_whole


@functools.cache
def _loader() -> Any:
    """YAML's safe loader, except that 1:4 is text: YAML 1.1 reads it as a number in base 60."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads no numbers in base 60."""

    text = ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$"))
    Loader.yaml_implicit_resolvers = {
        first: [text, *rules] for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def read_yaml(path: str) -> dict[str, Any]:
    """Reads settings from a YAML file. Raises ConfigError if it cannot be read or is not a mapping."""
    import yaml

    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _loader())  # a subclass of SafeLoader
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an invalid date
        raise ConfigError(f"cannot read the config file {path}: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"the config file {path} holds no settings; expected lines such as `batch_size: 16`")
    return loaded


def write_yaml(settings: Mapping[str, Any], path: Path) -> None:
    """Writes settings in the form that `read_yaml` reads."""
    import yaml

    with written_whole(path) as file:
        file.write(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())
