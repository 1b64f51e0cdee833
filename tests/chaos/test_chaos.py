"""`make chaos`: its parts by themselves, and every broken package that it tries."""

from pathlib import Path

import pytest

from gptcore.errors import FoundryError
from gptcore.package import open_package
from tests.chaos import __main__ as chaos
from tests.chaos import packages
from tests.chaos.fault import Fault, Result, row, table
from tests.serve_app.conftest import MakePackage, make_package

__all__ = ["make_package"]  # a fixture, used here too

BROKEN = dict(packages.broken())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_refused(make_package: MakePackage, tmp_path: Path, kind: str) -> None:
    folder = packages.copy(make_package().path, tmp_path / "package")
    open_package(folder)
    BROKEN[kind](folder)
    with pytest.raises(FoundryError) as error:
        open_package(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_row_says_what_was_lost_and_which_promise_was_not_kept() -> None:
    fault = Fault("serving", "kill", "kill -9", "nothing is lost", lambda scene, rng: Result())
    kept = Result(times=3, touched=1200, told=2, recovery=[0.5, 2.0, 1.0])
    assert row(fault, kept) == ("kill -9", "3", "1,200 requests", "0", "2", "1.0 s, 2.0 s", "nothing is lost", "yes")
    broken = Result(times=1, touched=9, unit="steps", lost=1)
    broken.expect(True, "this was kept")
    broken.expect(False, "step 5 is | missing")
    assert row(fault, broken)[-1] == "**no**: step 5 is | missing"
    assert table([row(fault, broken)]).splitlines()[-1].endswith("step 5 is \\| missing |")


def test_the_page_shows_all_seeds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "RECORD", tmp_path / "reliability.json")
    setting, fault = chaos.SETTINGS[0], chaos.FAULTS[0]
    chaos.keep(2, "The second.", [(setting, fault, Result(times=2, touched=10, recovery=[3.0]))])
    chaos.keep(1, "An old one.", [(setting, fault, Result(times=7, lost=7))])
    chaos.keep(1, "The first.", [(setting, fault, Result(times=1, touched=5, recovery=[1.0]))])
    text = chaos.all_seeds()
    assert text.startswith("- Seed 1. The first.\n- Seed 2. The second.\n\n**Training**\n")
    assert f"| {fault.what} | 3 | 15 requests | 0 | 0 | 2.0 s, 3.0 s |" in text
    assert text.count(fault.what) == 1


def test_its_page_has_a_place_for_the_tables() -> None:
    before, behind = chaos.parts_of(chaos.PAGE, chaos.BEGIN, chaos.END)
    assert "make chaos" in before
    assert chaos.BEGIN not in before + behind


def test_an_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--only", "kil"]) == 2
    assert "Did you mean 'kills'?" in capsys.readouterr().err


def test_an_unforeseen_error_is_a_broken_promise(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(scene: object, rng: object) -> Result:
        raise ValueError("no such process")

    result = chaos.run(Fault("training", "x", "x", "x", fail), chaos.SETTINGS[0], None, 1)
    assert result.broken == ["ValueError: no such process"]
    assert "NOT KEPT" in capsys.readouterr().out
