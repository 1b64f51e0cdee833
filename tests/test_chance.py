"""`make test` tries the same examples in every run; only `make fuzz` tries random ones."""

import importlib.util
import random
import re
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chance import EXAMPLES, FUZZ_TIMES, examples


def drawn() -> list[tuple[int, str, float]]:
    """What a property test tries under the profile "same"."""
    seen: list[tuple[int, str, float]] = []

    @settings(settings.get_profile("same"))
    @given(st.integers(), st.text(max_size=20), st.floats(allow_nan=False))
    def tried(number: int, text: str, value: float) -> None:
        seen.append((number, text, value))

    tried()
    return seen


def test_the_examples_of_a_property_test_depend_only_on_the_test(tmp_path: Path) -> None:
    before = drawn()
    random.seed(1)
    file = tmp_path / "of_the_project.py"
    file.write_text(f"NUMBERS = [{', '.join(str(7_777_000 + n) for n in range(100))}]\nWORDS = 'foundry', 'anvil'\n")
    spec = importlib.util.spec_from_file_location("of_the_project", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["of_the_project"] = module
    try:
        spec.loader.exec_module(module)
        assert len(before) >= EXAMPLES
        assert drawn() == before
    finally:
        del sys.modules["of_the_project"]


def test_the_number_of_examples_scales_with_the_profile() -> None:
    now = settings.get_current_profile_name()
    try:
        for profile, times in (("same", 1), ("fuzz", FUZZ_TIMES)):
            settings.load_profile(profile)
            assert examples(25).max_examples == 25 * times
            assert settings().derandomize == (profile == "same")
            assert examples(25).database is None
    finally:
        settings.load_profile(now)


def test_no_test_has_settings_of_its_own() -> None:
    here = Path(__file__).parent
    own = re.compile(r"max_examples|from hypothesis import .*\bsettings\b")
    found = [path.name for path in here.rglob("*.py") if own.search(path.read_text(encoding="utf-8"))]
    assert set(found) <= {"chance.py", "conftest.py", "test_chance.py"}
