"""Folders of files that appear under their name as a whole."""

import os

import pytest

from lightning_mimic.files import atomic_directory


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_a_folder_appears_with_all_its_files(there, tmp_path):
    final = tmp_path / "a" / "folder"
    if there != "nothing":
        final.mkdir(parents=True)
    with atomic_directory(final) as folder:
        (folder / "file").write_bytes(b"content")
        assert not (final / "file").exists()
    assert (os.listdir(final), (final / "file").read_bytes()) == (["file"], b"content")
    assert list(tmp_path.rglob(".*")) == []
    (tmp_path / "plain").mkdir()
    assert final.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failing", ["block", "replace"])
def test_a_folder_that_fails_is_removed(failing, tmp_path, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    def interrupted():
        with atomic_directory(tmp_path / "folder") as folder:
            (folder / "file").touch()
            if failing == "block":
                fails()

    if failing == "replace":
        monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "while the block runs"])
@pytest.mark.parametrize("place", ["name", "name/file"])
def test_a_folder_does_not_replace_what_is_there(place, when, tmp_path):
    def comes():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"old")

    def writes():
        with atomic_directory(tmp_path / "name"):
            assert when != "before", "the block was run"
            comes()

    if when == "before":
        comes()
    with pytest.raises(FileExistsError if when == "before" else OSError, match="name"):
        writes()
    assert ((tmp_path / place).read_bytes(), os.listdir(tmp_path)) == (b"old", ["name"])
