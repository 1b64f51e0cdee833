"""The wheel has everything that the packages need, and its commands run without a checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gptcore", "serve_app", "train_job")
DATA = (
    "gptcore/engine/native.cpp",
    "gptcore/engine/native_quantised.h",
    "gptcore/engine/native_vectors.h",
    "train_job/sweeps/quick.yaml",
    *(f"{package}/py.typed" for package in PACKAGES),
)
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy: a build in the checkout would leave a `build` folder there."""
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("setuptools is not installed, and the wheel is built without a network")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=SKIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", out], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = out.glob("gpt_foundry-*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_module_and_every_data_file(unpacked: Path) -> None:
    modules = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    playground = {path.relative_to(ROOT) for path in (ROOT / "serve_app/playground").iterdir()}
    expected = modules | playground | {Path(name) for name in DATA}
    assert len(playground) > 5
    assert sorted(path for path in expected if not (unpacked / path).is_file()) == []


def test_the_wheel_holds_nothing_but_the_three_packages(unpacked: Path) -> None:
    found = {path.name for path in unpacked.iterdir()}
    assert found - {name for name in found if name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("module", ["train_job.run", "gptcore.generate", "serve_app.chat"])
def test_a_command_of_the_wheel_prints_its_help_outside_the_checkout(
    module: str, unpacked: Path, tmp_path: Path
) -> None:
    env = os.environ | {"PYTHONPATH": str(unpacked), "GPT_FOUNDRY_HOME": str(tmp_path)}
    package = module.partition(".")[0]
    where = subprocess.run(
        [sys.executable, "-c", f"import {package}; print({package}.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(unpacked)
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "usage:" in shown.stdout
    assert list(tmp_path.iterdir()) == []
