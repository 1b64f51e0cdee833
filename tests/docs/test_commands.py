"""Every command that the README and docs/predecessors.md tell people to run is run here, or named with who runs it."""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docs.commands import Checkout, blocks_of, checkout, commands_of
from tests.hugging_face import publish_gpt2, put_into_cache
from tests.system.conftest import ROOT, Cluster, cluster

__all__ = ["cluster"]  # a fixture, used here too

README, PREDECESSORS = ROOT / "README.md", ROOT / "docs" / "predecessors.md"
COMMANDS = commands_of(README) + commands_of(PREDECESSORS)

ELSEWHERE = {
    r"^make (demo|test)": "tests/system/test_demo.py; this is one",
    r"make ui$": "tests/train_job/test_tracking.py",
    r"^docker ": "no Docker here: tests/deploy/test_image.py builds the image by buildah and runs its entry points",
    r"^(ray |export RAY|RAY_)": "tests/system/conftest.py starts and stops clusters, test_job_ends.py submits to them",
    r"--use-gpu": "wants a GPU",
    r"HOST:|BUCKET|example\.org": "wants another machine; tests/deploy and test_corpus.py have theirs",
    r"mlflow models serve|:5001/invocations": "tests/gptcore/test_pyfunc.py",
    r"^export TIKTOKEN|tiktoken\.get_encoding|--torch-backend": "downloads",
    r"--device mps": "wants Apple's GPU",
    r"-m bench\.(?!plan|gpu_train|decode)": "tests/bench; minutes each",
    r"-m bench\.(plan|decode --peers)": "tests/bench; minutes each",
    r"train_job\.tracking deliver": "tests/train_job/test_tracking.py",
    r"train_job/sweep\.py": "tests/system/test_sweep.py",
    r"jupyter lab": "tests/docs/test_tour.py",
}
"""Commands that are not run here, by a pattern, and where they are or why they cannot be."""


def test_every_exception_is_still_needed():
    stale = [pattern for pattern in ELSEWHERE if not any(re.search(pattern, command) for command in COMMANDS)]
    assert stale == []
    assert len(COMMANDS) > 80


def test_every_exception_names_tests_that_are_there():
    named = [file for reason in ELSEWHERE.values() for file in re.findall(r"tests/[\w/]+(?:\.py)?", reason)]
    assert [file for file in named if not (ROOT / file).exists()] == []


def elsewhere(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in ELSEWHERE)


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout where `make demo` has been: a run called demo, its model promoted; and GPT-2 in the hub's cache."""
    folder = tmp_path_factory.mktemp("checkout")
    with checkout(folder, cluster) as place:
        published = publish_gpt2(folder / "gpt2", context_length=256)
        put_into_cache(folder / "hub" / "hub", "openai-community/gpt2", published)
        for name in ("demo", "NAME"):
            place.run(f".venv/bin/python train_job/run.py --name {name}")
        yield place


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("gpt2_cache", "shakespeare")
@pytest.mark.parametrize("page", [README, PREDECESSORS], ids=lambda page: page.name)
def test_every_command_of_the_page_runs(page: Path, place: Checkout):
    for number, text in enumerate(blocks_of(page, "yaml")):
        (place.folder / f"{re.search('# (.*)', text)[1] if '# ' in text else number}").write_text(text)  # type: ignore[index]
    run_all(place, [command for command in commands_of(page) if not elsewhere(command)])
    place.close()


def run_all(place: Checkout, commands: list[str]) -> None:
    """Runs the commands, two at a time, but each after those that it follows: most of a job is waiting."""
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
    """Whether a command wants the earlier one ended: it uses a run of that name, or one of them is about a service."""
    if any(re.search("serve|curl", text) for text in (command, earlier)):
        return True
    names = [set(re.findall(r"(?:--name |--resume |runs/)([\w-]+)", text)) for text in (command, earlier)]
    return bool(names[0] & names[1])


@pytest.mark.slow
def test_every_python_block_of_the_readme_runs(place: Checkout):
    for text in blocks_of(README, "python"):
        (place.folder / "block.py").write_text(text)
        assert place.run(".venv/bin/python block.py").strip()


def test_the_tables_name_only_files_that_are_there():
    for page in (README, PREDECESSORS, *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} leads to {target}"


def test_predecessors_page_has_a_command_for_every_feature():
    rows = [line for line in PREDECESSORS.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 40
    commands = commands_of(PREDECESSORS)
    assert len(commands) == len(rows) - 5  # each table has a heading
