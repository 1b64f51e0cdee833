"""Finds the commands on our pages, in fences and tables, and runs them at a small size.

A folder stands in for the checkout: tracked files are linked into it, and runs write there. Training commands get flags
for a model of a few thousand weights, and a name if they have none. Services listen on the test's port. Commands are
not changed otherwise.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests.conftest import SHARED
from tests.ports import free_port
from tests.system.conftest import ROOT, Cluster, environment
from tests.waiting import await_server, is_up
from train_job.data.pieces import builtin_documents

STARTERS = (
    *(".venv/", ".venv-vllm/", "curl ", "ray ", "docker ", "make ", "cat ", "ls ", "echo ", "export ", "mlflow "),
    *("aws ", "git ", "hf ", "prometheus ", "python ", "sed ", "serve ", "ssh "),
)
SHAPE = ["--num-layers=1", "--num-heads=2", "--hidden-size=32", "--context-length=128"]
SHORT = ["--batch-size=4", "--max-steps=2", "--eval-interval=2", "--sample-tokens=2", "--cpus-per-worker=1"]
SHORT += ["--val-fraction=0.02"]  # GPT-2's 50,257 tokens make evaluation slow
MORE_STEPS = "--max-steps 4"
START_SECONDS = 180


def commands_of(page: Path) -> list[str]:
    """Every command of a page, in order: lines in fences without a language, and code in the last column of tables."""
    found: list[str] = []
    fence: str | None = None
    for line in map(str.strip, page.read_text().replace("\\\n", "").splitlines()):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence == "" or fence in ("bash", "sh"):
            command = re.sub(r"\s+#\s.*$", "", line).strip()
            found += [command] if is_command(command) else []
        elif fence is None and line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            code = re.fullmatch(r"\s*`(.+)`\s*", cells[-2])
            found += [code[1].replace("\\|", "|")] if code and is_command(code[1]) else []
    return [re.sub(r"\s+", " ", command) for command in found]


def is_command(text: str) -> bool:
    return re.sub(r"^(\w+=(\"[^\"]*\"|\S*) )*", "", text).startswith(STARTERS)


STARTS_SERVICE, ASKS_SERVICE = re.compile("serve run "), re.compile(r"curl|.*serve_app\.chat")


def shared_out(commands: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The commands to run for each page. A repeated command is run only where it appears first.

    A service is started again if a command for this page needs it.
    """
    shares: dict[str, list[str]] = {}
    seen: set[str] = set()
    for page, on_page in commands.items():
        shares[page] = share = []
        starts: str | None = None
        for command in on_page:
            known = command in seen
            seen.add(command)
            if STARTS_SERVICE.search(command):
                starts = command if known else None
            if known:
                continue
            if starts and ASKS_SERVICE.match(command):
                share.append(starts)
                starts = None
            share.append(command)
    return shares


def blocks_of(page: Path, language: str) -> list[str]:
    """The contents of the page's fences with that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@dataclass
class Checkout:
    """The folder in which the commands run, and the running service, if any."""

    folder: Path
    cluster: Cluster
    port: int = field(default_factory=free_port)
    service: subprocess.Popen[bytes] | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def env(self) -> dict[str, str]:
        more = {
            "RAY_ADDRESS": self.cluster.address,
            "RAY_DASHBOARD_ADDRESS": self.cluster.dashboard,
            "RAY_API_SERVER_ADDRESS": self.cluster.dashboard,
            "GPT_PORT": str(self.port),
            "HF_HOME": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken"),
            "GPT_FOUNDRY_DATA": str(SHARED / "data"),
            "GPT_BACKEND": "torch",
            "GPT_SLOTS": "2",
        }
        return environment(self.folder, **more)

    def run(self, command: str) -> str:
        """The output of the command. Fails with the output if the exit code is not 0."""
        if STARTS_SERVICE.search(command):
            self.serve(self.here(command))
            return ""
        if self.service is None and ASKS_SERVICE.match(command):
            self.start_service()
        command = self.here(command)
        ended = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=self.folder,
            env=self.env(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, f"{command}\nended with {ended.returncode}:\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def start_service(self) -> None:
        """Starts the service that a page tells users to leave running."""
        if self.service is None:
            self.serve(".venv/bin/serve run serve_app:app")

    def here(self, command: str) -> str:
        """The command as the test runs it: small, and on its own port."""
        command = re.sub(r"\b(8000|5001)\b(?!:)", str(self.port), command)
        if "serve_app.chat" in command and "--url" not in command:
            return f"{command} --url http://127.0.0.1:{self.port}"
        if "train_job/run.py" not in command:
            return command
        if "--resume" in command:
            return re.sub(r"--max-steps \d+", MORE_STEPS, command)
        flags = SHORT + ([] if "--init-from" in command else SHAPE)
        if "--name" not in command:  # by default it is the time, to the second
            flags += [f"--name=unnamed-{next(self.numbers)}"]
        return re.sub(r"(train_job/run\.py)(.*)$", lambda m: f"{m[1]}{m[2]} {' '.join(flags)}", command)

    def serve(self, command: str) -> None:
        """Stops the current service, starts this one in the background, and waits until it is ready.

        It runs on torch, which compiles nothing, unless it needs the native kernel to quantise weights.
        """
        self.close()
        native = "-u GPT_BACKEND " if "GPT_WEIGHTS" in command else ""
        log = open(self.folder / "service.log", "ab")  # noqa: SIM115
        self.service = subprocess.Popen(
            ["/bin/bash", "-c", f"exec env {native}{command}"],
            cwd=self.folder,
            env=self.env(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        ready = f"http://127.0.0.1:{self.port}/ready"
        await_server(self.service, lambda: is_up(ready), self.folder / "service.log", START_SECONDS)

    def close(self) -> None:
        """Ends the service, so that its port is free."""
        if self.service is None:
            return
        service, self.service = self.service, None
        service.send_signal(signal.SIGINT)
        try:
            service.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(service.pid, signal.SIGKILL)
            service.wait()
        subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", "shutdown", "--yes"], env=self.env(), capture_output=True
        )


@contextlib.contextmanager
def checkout(folder: Path, cluster: Cluster) -> Iterator[Checkout]:
    """A folder like a checkout with its environment, with every kind of text that the pages mention."""
    for path in sorted(ROOT.iterdir()):
        if path.name.startswith(".") or path.name in ("runs", "mlflow"):
            continue
        (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "mlflow", folder / "mlflow", ignore=shutil.ignore_patterns("mlflow.db*", "artifacts"))
    (folder / ".venv").symlink_to(sys.prefix)
    write_texts(folder)
    here = Checkout(folder, cluster)
    try:
        yield here
    finally:
        here.close()


def write_texts(folder: Path) -> None:
    """notes.txt and all the others."""
    text = "".join(builtin_documents())[:200_000]
    names = "notes.txt mine.txt input.txt story.txt data.txt held_out.txt books/one.txt books/more/two.txt"
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "stories.jsonl").write_text("".join(json.dumps({"story": line}) + "\n" for line in text.splitlines()))
    talks = [[{"role": "user", "content": f"Tea {n}?"}, {"role": "assistant", "content": "Yes."}] for n in range(60)]
    for name in ("tea.jsonl", "votes/earlier.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (folder / "web").mkdir()
    parquet.write_table(pyarrow.table({"text": text.splitlines()}), folder / "web" / "a.parquet")
