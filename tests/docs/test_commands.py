"""Every command in the README or on a page of docs is run here, or listed with the test that runs it."""

import re
import shlex
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from gptcore.chat import CHATML
from tests.docs.commands import Checkout, blocks_of, checkout, commands_of, shared_out
from tests.hugging_face import publish_gpt2, put_into_cache
from tests.open_tokenizers import QWEN_RANKS, publish, write_tokenizer
from tests.system.conftest import ROOT, Cluster, cluster
from train_job.cli import parse_settings
from train_job.config import build_config

__all__ = ["cluster"]  # a fixture, used here too

README, PREDECESSORS = ROOT / "README.md", ROOT / "docs" / "predecessors.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")
COMMANDS = {page.name: commands_of(page) for page in PAGES}
EVERY = [command for commands in COMMANDS.values() for command in commands]

ELSEWHERE = {
    r"^make (demo|demo-chat|test|check)$|^make demo PYTHON": "tests/system/test_demo.py; this is one; .ci/run",
    r"make ui$": "tests/train_job/tracking/test_tracking.py",
    r"^docker ": "no Docker here: tests/deploy/test_image.py builds the image by buildah and runs its entry points",
    r"^(ray |export RAY|RAY_)": "tests/system/conftest.py starts and stops clusters, test_job_ends.py submits to them",
    r"--use-gpu": "wants a GPU",
    r"HOST:|BUCKET|example\.org": "wants another machine; tests/deploy and test_corpus.py have theirs",
    r"mlflow models serve|:5001/invocations": "tests/gptcore/test_pyfunc.py",
    r"^export TIKTOKEN|tiktoken\.get_encoding|^\.venv/bin/pip install|^git pull|^make .venv": "downloads",
    r"\.venv-vllm/bin/": "tests/system/test_vllm.py",
    r"^hf download": "downloads; tests/gptcore/test_hub.py opens such folders",
    r"^sed |^git (diff|checkout)|-m pytest": "tests/docs/test_contributing_tour.py",
    r"^aws ": "wants an account",
    r"serve deploy": "tests/system/test_serve_commands.py",
    r"^prometheus ": "tests/system/test_prometheus.py",
    r"^(python train_job/run\.py|serve run serve_app:build_app key=value) …": "tests/deploy/test_image.py",
    r"--device mps": "wants Apple's GPU",
    r"-m bench\.(?!plan|gpu|decode)": "tests/bench; minutes each",
    r"^make chaos|-m tests\.(chaos|fuzz)": "tests/chaos and tests/fuzz; an hour",
    r"^make bench$": "tests/bench/test_table.py; an hour",
    r"-m bench\.(plan|decode --(peers|preset))": "tests/bench; minutes each",
    r"train_job\.tracking deliver": "tests/train_job/tracking/test_tracking.py",
    r"train_job/sweep\.py": "tests/system/test_sweep.py",
    r"jupyter lab": "tests/docs/test_tour.py",
    r"--name (wider|target|small-words|samples|books|own-data)$": "tests/docs/test_commands.py parses its settings; "
    "its kind of text and its parent are run on another page",
}
"""Patterns of commands that are not run here, and which test runs them or why none can."""


def test_every_exception_is_still_needed():
    stale = [pattern for pattern in ELSEWHERE if not any(re.search(pattern, command) for command in EVERY)]
    assert stale == []
    assert len(EVERY) > 160


def test_every_exception_names_existing_tests():
    named = [file for reason in ELSEWHERE.values() for file in re.findall(r"tests/[\w/]+(?:\.py)?", reason)]
    assert [file for file in named if not (ROOT / file).exists()] == []


def elsewhere(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in ELSEWHERE)


SHARES = shared_out({name: [c for c in commands if not elsewhere(c)] for name, commands in COMMANDS.items()})
"""The commands to run for each page."""


def test_every_command_is_run_once_or_listed_as_an_exception() -> None:
    run = [command for share in SHARES.values() for command in share]
    assert set(run) == {command for command in EVERY if not elsewhere(command)}
    twice = {command for command in run if run.count(command) > 1}
    assert [command for command in twice if "serve run " not in command] == []


LONG = (PREDECESSORS, ROOT / "docs" / "training.md", ROOT / "docs" / "chat.md")
"""Pages with several jobs each, which only run before a release. All settings on them are checked below."""
TRAINING = [command for command in EVERY if "train_job/run.py --" in command and "--config" not in command]


@pytest.mark.parametrize("command", TRAINING)
def test_the_settings_of_every_training_command_fit_together(command: str) -> None:
    given = parse_settings(shlex.split(command.partition("train_job/run.py ")[2]))
    if "resume" not in given:
        build_config(given)


def test_a_service_is_started_again_only_for_new_commands() -> None:
    pages = {
        "one": ["a serve run 1", "curl 1"],
        "two": ["a serve run 1", "curl 1"],
        "three": ["a serve run 1", "curl 2"],
    }
    assert shared_out(pages) == {"one": pages["one"], "two": [], "three": pages["three"]}


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout after `make demo`: a run named demo with a promoted model, and two models in the hub's cache."""
    folder = tmp_path_factory.mktemp("checkout")
    with checkout(folder, cluster) as place:
        published = publish_gpt2(folder / "gpt2", context_length=256)
        put_into_cache(folder / "hub" / "hub", "openai-community/gpt2", published)
        tokenizer = write_tokenizer("qwen3" if QWEN_RANKS.exists() else "smollm2", folder / "tokenizer")
        qwen = publish(tokenizer, folder / "qwen", 151936)
        put_into_cache(folder / "hub" / "hub", "Qwen/Qwen3-0.6B-Base", qwen)
        (qwen / "chat_template.jinja").write_text(CHATML)
        put_into_cache(folder / "hub" / "hub", "Qwen/Qwen3-0.6B", qwen)
        for name in ("demo", "NAME"):
            place.run(f".venv/bin/python train_job/run.py --name {name}")
        yield place


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("gpt2_cache", "shakespeare")
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.release if p in LONG else ()) for p in PAGES if SHARES[p.name]],
    ids=lambda page: page.name,
)
def test_every_command_of_the_page_runs(page: Path, place: Checkout):
    for number, text in enumerate(blocks_of(page, "yaml")):
        (place.folder / f"{re.search('# (.*)', text)[1] if '# ' in text else number}").write_text(text)  # type: ignore[index]
    run_all(place, SHARES[page.name])
    place.close()


def run_all(place: Checkout, commands: list[str]) -> None:
    """Runs the commands, two at a time, because jobs mostly wait. A command waits for those that it depends on."""
    begun: list[tuple[str, Future[str]]] = []
    with ThreadPoolExecutor(2) as pool:
        for command in commands:
            for earlier, running in begun:
                if follows(command, earlier):
                    running.result()
            begun.append((command, pool.submit(place.run, command)))
        for _, running in begun:
            print(running.result())


def follows(command: str, earlier: str) -> bool:
    """Whether a command depends on the earlier one: both use the same run, or one of them concerns a service."""
    if any(re.search("serve|curl", text) for text in (command, earlier)):
        return True
    names = [set(re.findall(r"(?:--name |--resume |runs/)([\w-]+)", text)) for text in (command, earlier)]
    return bool(names[0] & names[1])


QUOTED = {"contributing-tour.md": "tests/docs/test_contributing_tour.py compares them with the file"}
"""Pages whose Python blocks are excerpts of our files."""
BLOCKS = [(page, text) for page in PAGES if page.name not in QUOTED for text in blocks_of(page, "python")]


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_cache")
def test_every_python_block_of_the_pages_runs(place: Checkout):
    assert len(BLOCKS) == 3
    for page, text in BLOCKS:
        if "127.0.0.1:8000" in text:
            place.start_service()
        (place.folder / "block.py").write_text(place.here(text))
        assert place.run(".venv/bin/python block.py").strip(), f"{page.name}: {text}"
    place.close()


def test_predecessors_page_has_a_command_for_every_feature():
    rows = [line for line in PREDECESSORS.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 40
    commands = commands_of(PREDECESSORS)
    assert len(commands) == len(rows) - 5  # each table has a heading
