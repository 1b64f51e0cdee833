"""What fuzzing has found, once more: each input is taken or refused, and nothing else happens."""

from pathlib import Path

import pytest

from tests.fuzz.guard import Violation, watched
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_right_inputs_are_taken_and_what_fuzzing_found_harms_nothing(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for seed in target.seeds(tmp_path):
        with watched(tmp_path):
            assert target(seed, tmp_path), seed[:200]
    for file in sorted((CORPUS / name).glob("*")):
        with watched(tmp_path):
            target(file.read_bytes(), tmp_path)


def test_the_guard_sees_files_outside_and_pickles(tmp_path: Path) -> None:
    with watched(tmp_path):
        (tmp_path / "inside").write_text("fine")
        with pytest.raises(Violation, match="open /etc/hostname"):
            Path("/etc/hostname").read_text()
        with pytest.raises(Violation, match=r"pickle\.find_class"):
            __import__("pickle").loads(b"cos\ngetcwd\n.")
    Path("/etc/hostname").read_text()
