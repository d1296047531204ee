"""Atomic writes: complete or not there, whoever else writes and whatever fails."""

import csv
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic import files
from lightning_mimic.files import (
    TemporaryFolder,
    atomic_directory,
    atomic_path,
    atomic_write,
    remove_leftovers,
    write_json,
)
from support.cases import for_each

WORKERS = 4


def by_file(path, content, **options):
    with atomic_write(path, **options) as file:
        file.write(content)


def by_name(path, content, **options):
    with atomic_path(path, **options) as temporary:
        temporary.write_bytes(content)


def as_json(path, content, **options):
    write_json(path, {"content": content.decode()}, **options)


WAYS = pytest.mark.parametrize("write", [by_file, by_name, as_json])


def held(path: Path) -> bytes:
    content = path.read_bytes()
    return json.loads(content)["content"].encode() if content.startswith(b"{") else content


@WAYS
def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(write, tmp_path):
    path = tmp_path / "file"
    for content in (b"a long first content", b"new"):
        write(path, content)
        assert held(path) == content
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "exclusive", "there"),
    [
        (OSError, True, True),
        (OSError, False, True),
        (KeyboardInterrupt, False, False),
        (KeyboardInterrupt, True, False),
    ],
)
@pytest.mark.parametrize("opened", [atomic_write, atomic_path])
def test_an_error_in_the_block_keeps_what_was_there(opened, error, exclusive, there, tmp_path):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")

    def interrupted():
        with opened(path, exclusive=exclusive) as to:
            to.write(b"half") if opened is atomic_write else to.write_bytes(b"half")
            raise error

    with pytest.raises(FileExistsError if there and exclusive else error):
        interrupted()
    assert (os.listdir(tmp_path), there and held(path)) == (["file"] * there, there and b"old")


@WAYS
@for_each("failing", ["fsync", "replace"])
def test_a_failure_of_the_disk_keeps_what_was_there(write, failing, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "file", b"new")
    assert (os.listdir(tmp_path), held(tmp_path / "file")) == (["file"], b"old")


@WAYS
@pytest.mark.parametrize("exclusive", [True, False])
def test_content_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(write, exclusive, tmp_path, monkeypatch):
    path, done = tmp_path / "file", []
    real = {name: getattr(os, name) for name in ("fsync", "replace", "link")}

    def synced(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else "unknown"
        size = os.fstat(descriptor).st_size
        done.append("folder" if target == str(tmp_path) else "content" if size and not path.exists() else "too late")
        real["fsync"](descriptor)

    def named(name):
        def act(*given):
            done.append("name")
            real[name](*given)

        return act

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named("replace"))
    monkeypatch.setattr(os, "link", named("link"))
    write(path, b"content", exclusive=exclusive)
    assert done == ["content", "name", "folder"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    by_file(tmp_path / "file", b"content")
    assert held(tmp_path / "file") == b"content"


def no_links(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)


@WAYS
@pytest.mark.usefixtures("links")
def test_exclusive_writes_a_new_file_and_refuses_one_that_is_there(write, tmp_path):
    path = tmp_path / "file"
    write(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError) as info:
        write(path, b"second", exclusive=True)
    assert (info.value.filename, info.value.errno) == (str(path), errno.EEXIST)
    assert (os.listdir(tmp_path), held(path)) == (["file"], b"first")
    assert path.stat().st_nlink == 1


@pytest.mark.usefixtures("links")
def test_exclusive_refuses_a_file_that_comes_while_it_writes(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileExistsError), atomic_write(path, exclusive=True):
        path.write_bytes(b"early")
    assert (os.listdir(tmp_path), held(path)) == (["file"], b"early")


def test_a_reserved_name_is_given_up_if_the_rename_fails(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"):
        by_file(tmp_path / "file", b"content", exclusive=True)
    assert os.listdir(tmp_path) == []


def test_an_exclusive_file_is_never_seen_empty(tmp_path):
    path, seen, over = tmp_path / "file", set(), threading.Event()

    def watch():
        while not over.is_set():
            try:
                seen.add(path.read_bytes())
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(100):
        by_file(path, b"content", exclusive=True)
        path.unlink()
    over.set()
    watcher.join()
    assert seen <= {b"content"}


COMPETE = """
import importlib.util, pathlib, sys
source, folder, number, exclusive, workers = sys.argv[1:]
spec = importlib.util.spec_from_file_location("files", source)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
folder = pathlib.Path(folder)
for k in range(20):
    (folder / f"ready{k}-{number}").touch()
    while not all((folder / f"ready{k}-{other}").exists() for other in range(int(workers))):
        pass
    try:
        with files.atomic_write(folder / f"file{k}", exclusive=exclusive == "True") as file:
            file.write(number.encode() * 100_000)
    except FileExistsError:
        continue
    (folder / f"won{k}-{number}").touch()
"""


@pytest.mark.parametrize("exclusive", [True, False])
def test_of_processes_at_the_same_time_each_writes_whole_files_and_one_wins(exclusive, tmp_path):
    # Isolated and without site-packages: the module needs the standard library only.
    command = [sys.executable, "-I", "-S", "-c", COMPETE, files.__file__, str(tmp_path)]
    several = [subprocess.Popen([*command, str(n), str(exclusive), str(WORKERS)]) for n in range(WORKERS)]
    try:
        assert [process.wait(60) for process in several] == [0] * WORKERS
    finally:
        for process in several:  # one that fails leaves the others waiting
            process.kill()
    for k in range(20):
        won = sorted(path.name.split("-")[1] for path in tmp_path.glob(f"won{k}-*"))
        assert len(won) == (1 if exclusive else WORKERS)
        assert held(tmp_path / f"file{k}") in [number.encode() * 100_000 for number in won]
    assert list(tmp_path.glob(".*")) == []


@WAYS
def test_a_folder_that_is_not_there_or_is_a_file_is_an_os_error(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "file", b"content")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file" / "file", b"content")


@WAYS
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_is_read_only_is_a_permission_error(write, tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            write(tmp_path / "file", b"content")
    finally:
        tmp_path.chmod(0o755)


@WAYS
def test_the_mode_is_that_of_any_new_file(write, tmp_path):
    (tmp_path / "plain").touch()
    write(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_other_libraries_write_to_the_file(tmp_path):
    table, array = pa.table({"id": [1, 2]}), np.arange(6).reshape(2, 3)
    with atomic_write(tmp_path / "a.parquet") as file, pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
    with atomic_write(tmp_path / "b.parquet") as file:
        pq.write_table(table, file)
    with atomic_write(tmp_path / "c.npy") as file:
        np.save(file, array)
    with atomic_write(tmp_path / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name"], ["Zoë"]])
    assert pq.read_table(tmp_path / "a.parquet").equals(table)
    assert pq.read_table(tmp_path / "b.parquet").equals(table)
    assert np.array_equal(np.load(tmp_path / "c.npy"), array)
    assert (tmp_path / "d.csv").read_bytes() == "name\r\nZoë\r\n".encode()


def test_a_block_that_creates_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == []


def by_folder(path, content):
    with atomic_directory(path) as folder:
        (folder / "in").mkdir()
        (folder / "in" / "it").write_bytes(content)


EVERY_WAY = for_each("write", [by_file, by_name, as_json, by_folder])


def killed(act, *given):
    """Run a function in a forked process that is killed by its first rename."""
    child = os.fork()
    if child == 0:
        os.replace = os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        act(*given)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@EVERY_WAY
def test_the_next_writer_in_a_folder_removes_what_a_killed_one_left(write, tmp_path):
    for name in ("it", "other"):
        killed(write, tmp_path / name, b"half")
    assert [each.name[:4] for each in tmp_path.iterdir()] == [".oth"]
    write(tmp_path / "it", b"whole")
    assert os.listdir(tmp_path) == ["it"]


def test_one_of_many_files_is_written_without_listing_the_folder(tmp_path):
    killed(by_file, tmp_path / "it", b"half")
    by_file(tmp_path / "it", b"whole", tidy=False)
    assert len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["it"]


@EVERY_WAY
def test_what_is_being_written_is_no_leftover_and_neither_is_a_users_file(write, tmp_path, monkeypatch):
    users = {".it.tmp", "it.tmp", f".it.{'g' * 32}.tmp", f"it.{'a' * 32}.tmp"}
    for name in users:
        (tmp_path / name).touch()
    real, seen = os.replace, []

    def replace(temporary, path):
        remove_leftovers(tmp_path)
        seen.append(os.path.exists(temporary))
        real(temporary, path)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "it", b"content")
    remove_leftovers(tmp_path)
    assert (seen, set(os.listdir(tmp_path))) == ([True], {"it", *users})


def test_leftovers_of_a_folder_that_is_not_there_are_none(tmp_path):
    remove_leftovers(tmp_path / "missing")
    assert os.listdir(tmp_path) == []


@EVERY_WAY
def test_nothing_is_written_through_a_symbolic_link(write, tmp_path):
    for target in ("file", "folder", "missing"):
        (tmp_path / f"to {target}").symlink_to(tmp_path / target)
    (tmp_path / "file").write_bytes(b"of somebody else")
    (tmp_path / "folder").mkdir()
    there = sorted(os.listdir(tmp_path))
    for target in ("file", "folder", "missing"):
        with pytest.raises(OSError, match="symbolic link.*to " + target):
            write(tmp_path / f"to {target}", b"content")
    assert (sorted(os.listdir(tmp_path)), (tmp_path / "file").read_bytes()) == (there, b"of somebody else")
    assert os.listdir(tmp_path / "folder") == []


def test_a_name_that_a_killed_process_reserved_can_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "file"
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        by_file(path, b"content", exclusive=True)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == b""
    by_file(path, b"content", exclusive=True)
    assert (held(path), os.listdir(tmp_path)) == (b"content", ["file"])


def test_a_file_system_without_locks_keeps_leftovers_and_writes_as_ever(tmp_path, monkeypatch):
    killed(by_file, tmp_path / "file", b"half")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    for write in (by_file, by_name):
        write(tmp_path / "file", b"content")
    by_folder(tmp_path / "folder", b"content")
    assert len(os.listdir(tmp_path)) == 3
    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "empty").touch()
    with pytest.raises(FileExistsError):
        by_file(tmp_path / "empty", b"content", exclusive=True)
    by_file(tmp_path / "new", b"content", exclusive=True)
    assert held(tmp_path / "new") == b"content"


def test_a_folder_is_durable_with_all_that_it_holds_before_it_has_its_name(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def fsync(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".")[0])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    by_folder(tmp_path / "folder", b"content")
    assert synced == ["it", "in", "", tmp_path.name]


def test_a_temporary_folder_goes_with_its_object_and_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mine-notes").mkdir()
    folder = TemporaryFolder("mine-")
    ready, child = tmp_path / "ready", os.fork()
    if child == 0:
        del folder  # of the parent
        kept = TemporaryFolder("mine-")
        (kept.path / "file").touch()
        ready.touch()
        signal.pause()
    while not ready.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    ready.unlink()
    assert len(os.listdir(tmp_path)) == 3
    TemporaryFolder("mine-").close()
    assert len(os.listdir(tmp_path)) == 3
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with TemporaryFolder("mine-") as other:
        assert {each.name for each in tmp_path.iterdir()} == {"mine-notes", folder.path.name, other.path.name}
        assert stat.S_IMODE(other.path.stat().st_mode) == 0o700
    assert folder.path.is_dir()
    del folder
    assert os.listdir(tmp_path) == ["mine-notes"]
