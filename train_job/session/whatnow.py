"""What now: the commands that go on from where a run has ended, each as it can be pasted into a shell.

In: what is there at the end: a package or none, a version, an MLflow run, a command that resumes. Out: lines. A path or
name that the shell would take apart is quoted; what needs another environment than the usual one says so in front.
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
    """What there is when a run has ended, however it did. A text that is empty stands for what there is not."""

    uri: str
    """Of MLflow."""
    experiment_id: str = ""
    run_id: str = ""
    package: Path | None = None
    version: str = ""
    """As `gpt version 3`."""
    promote: str = ""
    """The command that makes the version @champion, where it is not."""
    resume: str = ""
    """The command that goes on with the run."""
    prompt: str = "The"


def lines(ended: Ended) -> list[str]:
    """The block, its first line a heading; empty where nothing can be done."""
    steps: list[tuple[str, str]] = []
    if ended.package:
        steps.append(("serve it", serve_command(ended.package)))
        steps.append(("chat", chat_command() + comment("once it serves, in another terminal")))
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
    """Where the run's page is: on the server, or on the UI that one starts beside the database."""
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
    """What starts MLflow's UI on the database, the usual one if `uri` is that or empty."""
    other = {"MLFLOW_TRACKING_URI": uri} if uri not in ("", f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}") else {}
    folder = checkout()
    if folder is None:  # installed without the Makefile
        mlflow = near(Path(sys.executable).with_name("mlflow"))
        return shlex.join([mlflow, "ui", *(["--backend-store-uri", uri] if uri else [])])
    where = [] if folder == Path.cwd() else ["-C", str(folder)]
    return environment(other) + shlex.join(["make", *where, "ui"])


def script_command(script: str, *arguments: str) -> str:
    """One of our scripts, `train_job/run.py`, with this Python and the home that it has now."""
    called = [script] if Path(script).exists() else ["-m", script.removesuffix(".py").replace("/", ".")]
    return environment({}) + shlex.join([python(), *called, *arguments])


def environment(more: Mapping[str, str]) -> str:
    """The assignments that go before a command: where the home is, if that was said, and `more`."""
    named = {name: os.environ[name] for name in ("GPT_FOUNDRY_HOME",) if os.environ.get(name)} | dict(more)
    return "".join(f"{name}={shlex.quote(value)} " for name, value in named.items())


def python() -> str:
    """This Python, as it is called from here."""
    return near(sys.executable)


def near(path: str | Path) -> str:
    """`path` from the folder that one is in, if it is below it; absolute otherwise, and in a job on a cluster."""
    path, here = Path(os.path.abspath(path)), Path.cwd()  # not resolved: a virtual environment's python is a link
    return str(path.relative_to(here)) if path.is_relative_to(here) and not submitted() else str(path)


def submitted() -> bool:
    """Whether this is a job on a cluster, whose folder is not that of whoever reads its lines."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def place() -> str:
    """Where these commands work, for someone who may be on another machine."""
    return f"  (on {socket.gethostname()}, in {checkout() or home()})" if submitted() else ""


def comment(text: str) -> str:
    """A remark that a shell passes over."""
    return f"  # {text}"
