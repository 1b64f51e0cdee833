"""Files of version 0.1 still work: its package, its registered model and its run, which is resumed."""

import gzip
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptcore.package import open_package
from gptcore.sampling import SamplingParams, generate
from tests.system.conftest import ROOT, Cluster, Job, environment
from tests.system.runs import points, status, versions

KEPT = ROOT / "tests" / "data" / "home-0.1"
"""A home with one run of six steps, made by that version; /HOME stands for where it was."""
GREEDY = [117, 109, 112, 115, 109, 112, 115, 109]
"""Tokens that it generated."""


def test_a_kept_package_generates_the_same_text_as_before() -> None:
    package = open_package(KEPT / "runs" / "kept" / "package")
    torch.set_num_threads(1)
    params = SamplingParams(max_new_tokens=8, temperature=0)
    tokens = list(generate(package.load_model(), package.tokenizer, "The quick", params))
    assert tokens == GREEDY


def test_a_kept_registered_model_loads_by_its_recorded_name() -> None:
    code = (
        "import mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model({str(KEPT / 'registered')!r})\n"
        "print(len(model.predict(pandas.DataFrame({'prompt': ['The', 'x']}), params={'max_new_tokens': 4})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "2", done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the home in a place of its own, as a user who moved it would have it."""
    home = tmp_path / "home"
    shutil.copytree(KEPT / "runs", home / "runs")
    for file in home.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml"):
            file.write_text(file.read_text().replace("/HOME", str(home)))
    database = home / "mlflow" / "mlflow.db"
    database.parent.mkdir()
    database.write_bytes(gzip.decompress((KEPT / "mlflow.db.gz").read_bytes()))
    with sqlite3.connect(database) as connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, '/HOME', ?)", (str(home),))
    sentences = (f"The quick brown fox jumps over the lazy dog. {n}\n" for n in range(1, 401))
    (home / "fox.txt").write_text("".join(sentences))
    return home


@pytest.mark.slow
@pytest.mark.release
def test_a_kept_run_is_resumed_and_registered(cluster: Cluster, home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "train_job/run.py", "--resume=kept", "--max-steps=9", "--promote=always"],
        cwd=ROOT,
        env=environment(home, RAY_ADDRESS=cluster.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    job = Job(process, home / "runs" / "kept", f"sqlite:///{home}/mlflow/mlflow.db")
    code, output = job.finish()
    assert code == 0, output
    assert "resumed   from step 6" in output
    assert status(job) == "FINISHED"
    assert [step for step, _ in points(job, "train/loss")] == list(range(1, 10))
    assert sorted(version.version for version in versions(job)) == [1, 2]
    assert os.path.exists(job.run_dir / "outcome.json")
