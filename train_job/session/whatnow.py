"""The "what now" block: commands that continue from where a run has ended, ready to paste into a shell.

In: what there is at the end: a package, a version, an MLflow run, a command that resumes. Out: lines. Arguments are
quoted where a shell needs it; environment variables that a command needs stand in front of it.
"""

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gptcore.home import checkout, home
from gptcore.redact import without_password
from train_job.tracking.pages import UI, experiment_page, run_page


@dataclass(frozen=True)
class Ended:
    """What there is when a run has ended. An empty text means that there is none."""

    uri: str
    """Of MLflow."""
    experiment_id: str = ""
    run_id: str = ""
    package: Path | None = None
    version: str = ""
    """As `gpt version 3`."""
    promote: str = ""
    """The command that makes the version @champion, if it is not."""
    resume: str = ""
    """The command that resumes the run."""
    prompt: str = "The"


def lines(ended: Ended) -> list[str]:
    """The block with its heading; empty if there is nothing to do."""
    steps: list[tuple[str, str]] = []
    if ended.package:
        steps.append(("serve it", serve_command(ended.package)))
        steps.append(("chat", chat_command() + comment("once it serves, in another terminal")))
        if ended.prompt:  # a model that answers does not continue one
            generate = [python(), "-m", "gptcore.generate", near(ended.package), "--prompt", ended.prompt]
            steps.append(("ask it", shlex.join(generate) + comment("without a service")))
    if ended.experiment_id:
        steps += page_steps(ended)
    if ended.promote:
        steps.append(("promote", ended.promote + comment(f"{ended.version} is not @champion; this makes it so")))
    if ended.resume:
        steps.append(("go on", ended.resume))
    if not steps:
        return []
    width = max(len(name) for name, _ in steps)
    return [f"what now{place()}", *(f"  {name.ljust(width)}  {command}" for name, command in steps)]


def serve_command(package: Path) -> str:
    """`serve run` of this very package."""
    serve = str(Path(sys.executable).with_name("serve"))
    return shlex.join([near(serve), "run", "serve_app:build_app", f"model={near(package)}"])


def chat_command() -> str:
    """The chat with a service that is started from this environment."""
    port = os.environ.get("GPT_PORT", "")
    return shlex.join([python(), "-m", "serve_app.chat", *(["--url", f"http://127.0.0.1:{port}"] if port else [])])


def page_steps(ended: Ended) -> list[tuple[str, str]]:
    """The run's page: on the server, or in a UI that the user starts on the database."""
    scheme = urlsplit(ended.uri).scheme
    base, steps = UI, []
    if scheme in ("http", "https"):
        base = without_password(ended.uri).rstrip("/")
    elif scheme == "sqlite":
        steps = [("see runs", ui_command(ended.uri))]
    else:  # another database's address may have a password
        steps = [("see runs", ui_command("") + comment("with MLFLOW_TRACKING_URI as it is here"))]
    page, all_runs = run_page(ended.experiment_id, ended.run_id), experiment_page(ended.experiment_id)
    return [*steps, ("its page", f"{base}/#{page}"), ("all runs", f"{base}/#{all_runs}")]


def ui_command(uri: str) -> str:
    """The command that starts MLflow's UI on the database; an empty `uri` is the default one."""
    other = {"MLFLOW_TRACKING_URI": uri} if uri not in ("", f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}") else {}
    folder = checkout()
    if folder is None:  # installed without the Makefile
        mlflow = near(Path(sys.executable).with_name("mlflow"))
        return shlex.join([mlflow, "ui", *(["--backend-store-uri", uri] if uri else [])])
    where = [] if folder == Path.cwd() else ["-C", str(folder)]
    return environment(other) + shlex.join(["make", *where, "ui"])


def script_command(script: str, *arguments: str) -> str:
    """A command for one of our scripts, such as `train_job/run.py`, with this Python and this home."""
    called = [script] if Path(script).exists() else ["-m", script.removesuffix(".py").replace("/", ".")]
    return environment({}) + shlex.join([python(), *called, *arguments])


def environment(more: Mapping[str, str]) -> str:
    """The assignments in front of a command: GPT_FOUNDRY_HOME, if it is set, and `more`."""
    named = {name: os.environ[name] for name in ("GPT_FOUNDRY_HOME",) if os.environ.get(name)} | dict(more)
    return "".join(f"{name}={shlex.quote(value)} " for name, value in named.items())


def python() -> str:
    """The path of this Python."""
    return near(sys.executable)


def near(path: str | Path) -> str:
    """`path` relative to the working folder if it is below it; absolute otherwise, and in a submitted job."""
    path, here = Path(os.path.abspath(path)), Path.cwd()  # not resolved: a virtual environment's python is a link
    return str(path.relative_to(here)) if path.is_relative_to(here) and not submitted() else str(path)


def submitted() -> bool:
    """Whether `ray job submit` started this: then the reader's working folder is another one."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def place() -> str:
    """The machine and folder where these commands work, if the reader may be elsewhere."""
    return f"  (on {socket.gethostname()}, in {checkout() or home()})" if submitted() else ""


def comment(text: str) -> str:
    """A shell comment."""
    return f"  # {text}"
