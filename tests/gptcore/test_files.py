"""A folder or file appears whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore import files
from gptcore.files import remove_drafts, whole_folder, write_file


def fill(folder: Path, text: str, replace: bool = True) -> None:
    with whole_folder(folder, replace) as partial:
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


def test_a_full_disk_keeps_the_earlier_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_file(tmp_path / "file", b"a")
    fill(tmp_path / "folder", "a")
    monkeypatch.setattr(files.os, "fsync", full)  # some file systems find out that late
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", b"b")
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path / "folder", "b")
    assert ((tmp_path / "file").read_bytes(), (tmp_path / "folder" / "text").read_text()) == (b"a", "a")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_file_system_that_cannot_flush_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    write_file(tmp_path / "file", b"a")
    fill(tmp_path / "folder", "a")
    assert ((tmp_path / "file").read_bytes(), (tmp_path / "folder" / "text").read_text()) == (b"a", "a")


def test_the_earlier_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "folder", "a")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith(files.DRAFT):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path / "folder", "b")
    assert (tmp_path / "folder" / "text").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def age(folder: Path) -> None:
    """Makes everything in the folder look as if it was last written long ago."""
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))


def test_a_draft_that_still_grows_stays_where_its_lock_cannot_be_seen(tmp_path: Path) -> None:
    draft = tmp_path / f"{files.DRAFT}{'0' * 32}"  # nobody here has a lock on it
    draft.mkdir()
    (draft / "model.safetensors").write_text("half")
    os.utime(draft, (0, 0))  # a folder's time does not change while a file in it grows
    remove_drafts(tmp_path)
    assert draft.is_dir()
    age(tmp_path)
    remove_drafts(tmp_path)
    assert not draft.exists()


def test_files_that_only_look_like_drafts_stay(tmp_path: Path) -> None:
    (tmp_path / ".draft-posts").mkdir()
    (tmp_path / ".draft-note.md").write_text("mine")
    age(tmp_path)
    remove_drafts(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


WRITER = """
import sys
from pathlib import Path
from gptcore.files import whole_file, whole_folder
with whole_folder(Path(sys.argv[1]) / "folder") as draft, whole_file(Path(sys.argv[1]) / "file") as file:
    (draft / "text").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdin=-1, stdout=-1)
    assert writer.stdout
    try:
        assert writer.stdout.readline() == b"writing\n"
        drafts = list(tmp_path.iterdir())
        age(tmp_path)
        remove_drafts(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(drafts)
        assert len(drafts) == 2
    finally:
        writer.kill()
        writer.communicate()
    age(tmp_path)
    fill(tmp_path / "other", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
