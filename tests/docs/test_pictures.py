"""docs/images: each picture has a module that draws it, is small, and shows what it should."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs import pictures

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").glob("*.py")}
PICTURES = sorted((ROOT / "docs" / "images").glob("*.png"))
MOST_BYTES = 300_000


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_each_picture_has_a_module_and_make_pictures_runs_it(path: Path) -> None:
    makers = [maker.stem for maker, text in MAKERS.items() if f"docs/images/{path.name}" in text]
    assert makers
    assert any(f"docs.pictures.{maker}" in (ROOT / "Makefile").read_text(encoding="utf-8") for maker in makers)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_each_picture_is_small_enough_for_a_page(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    with Image.open(path) as picture:
        picture.verify()


def test_a_kept_picture_looks_the_same_and_its_plain_areas_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Image.new("RGB", (600, 400), (246, 246, 244))
    page.paste(Image.radial_gradient("L").convert("RGB"), (40, 40))
    page.paste((181, 69, 26), (400, 100, 500, 150))
    page.save(tmp_path / "screen.png")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    with Image.open(pictures.keep((tmp_path / "screen.png").read_bytes(), "kept")) as kept:
        seen = kept.convert("RGB")
    apart = np.asarray(seen, dtype=int) - np.asarray(page, dtype=int)
    assert abs(apart).mean() < 0.5
    assert seen.getpixel((5, 5)) == (246, 246, 244)
    assert seen.getpixel((450, 120)) == (181, 69, 26)


def test_pictures_are_made_with_their_own_home_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPT_MODEL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "somebody's")
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path))
    monkeypatch.setenv("GPT_FOUNDRY_DATA", "/data")
    env = pictures.environment()
    assert "somebody's" not in env.values()
    assert env["GPT_FOUNDRY_HOME"] == f"{tmp_path}/.cache/pictures"
    assert env["GPT_FOUNDRY_DATA"] == "/data"
    assert env["PATH"] == os.environ["PATH"]


def test_the_loss_curve_is_drawn_from_the_history_of_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / ".cache" / "pictures" / "runs" / pictures.RUN
    run.mkdir(parents=True)
    (run / "outcome.json").write_text("{}")
    (run / "history.jsonl").write_text('{"step": 10, "tokens": 100, "epoch": 0.5, "train_loss": 3.0}\n')
    code = "from pathlib import Path; from docs import pictures; pictures.IMAGES = pictures.ROOT = Path.cwd();"
    code += "from docs.pictures import loss_curve; loss_curve.main()"
    env = os.environ | {"GPT_FOUNDRY_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    with Image.open(tmp_path / "loss_curve.png") as picture:
        assert picture.width > picture.height > 400
