"""A folder or file appears whole or not at all."""

from pathlib import Path

import pytest

from gptcore.files import new_folder, write_file


def fill(folder: Path, text: str, replace: bool = True) -> None:
    with new_folder(folder, replace) as partial:
        assert not folder.exists() or (folder / "text").read_text() != text
        (partial / "text").write_text(text)


def test_a_new_folder_replaces_an_earlier_one_unless_told_to_keep_it(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "folder"
    for text, replace, found in (("a", True, "a"), ("b", True, "b"), ("c", False, "b")):
        fill(folder, text, replace)
        assert (folder / "text").read_text() == found
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_a_failed_block_leaves_no_new_files_and_keeps_the_old_ones(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "a")
    with pytest.raises(UnicodeEncodeError):
        fill(tmp_path / "folder", "\ud800")
    assert (tmp_path / "folder" / "text").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_is_replaced_with_the_mode_asked_for(tmp_path: Path) -> None:
    for content in (b"a", b"b"):
        write_file(tmp_path / "file", content, mode=0o600)
    assert ((tmp_path / "file").read_bytes(), (tmp_path / "file").stat().st_mode & 0o777) == (b"b", 0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
