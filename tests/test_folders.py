"""Folders of files that appear under their name as a whole."""

import os

import pytest

from lightning_mimic.files import atomic_directory


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a link to one"])
def test_a_folder_appears_with_all_its_files(there, tmp_path):
    final, real = tmp_path / "a" / "folder", tmp_path / "a" / "folder"
    if there != "nothing":
        final.parent.mkdir()
        real = final if there == "an empty folder" else tmp_path / "elsewhere"
        real.mkdir()
        if real != final:
            final.symlink_to(real)
    with atomic_directory(final) as folder:
        (folder / "file").write_bytes(b"content")
        assert not (final / "file").exists()
    assert (os.listdir(real), (final / "file").read_bytes()) == (["file"], b"content")
    assert final.is_symlink() == (there == "a link to one")
    assert list(tmp_path.rglob(".*")) == []
    (tmp_path / "plain").mkdir()
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode


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
