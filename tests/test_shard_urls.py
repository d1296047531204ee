"""Shards behind URLs: on a store as on the disk, read on where the network fails, and never too many to list."""

import http.server
import json
import re
import shutil
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from lightning_mimic.data import shard_files
from lightning_mimic.data.rejects import Reason, Rejects, RejectWriter
from lightning_mimic.data.shards import MAX_SHARDS, list_shards, stated_counts
from lightning_mimic.errors import MimicError
from support.pair_shards import SIZES, batches_of, flat, module, of_rank, write_shards

ALL = list(range(sum(SIZES)))


class FlakyFile(MemoryFile):
    """Fails as its file system says, before it gives anything of what was asked for."""

    def __init__(self, data, fails):
        super().__init__(data=data)
        self.fails = fails

    def read(self, size=-1):
        self.fails(self.tell())
        return super().read(size)

    @property
    def size(self):
        return len(self.getbuffer())


class FlakyFileSystem(MemoryFileSystem):
    protocol = "flaky"
    store, pseudo_dirs, opened, cachable = {}, [""], 0, False
    fails = staticmethod(lambda position: None)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        type(self).opened += 1
        return FlakyFile(self.cat_file(path), type(self).fails)

    def cat_file(self, path, start=None, end=None, **options):
        path = self._strip_protocol(path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return self.store[path].getvalue()[start:end]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Shards on a store that fails as ``store.fails`` says, without waiting between two tries."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(FlakyFileSystem, "store", {})
    monkeypatch.setattr(FlakyFileSystem, "opened", 0)
    monkeypatch.setattr(FlakyFileSystem, "fails", staticmethod(lambda position: None))
    monkeypatch.setattr(shard_files, "WAIT", 0.0)
    files = fsspec.filesystem("flaky")
    for path in write_shards(tmp_path / "local", *SIZES):
        files.pipe(f"/pool/{path.name}", path.read_bytes())
    return FlakyFileSystem


URLS = "flaky://pool/{00000000..00000004}.tar"


def read(shards, folder, **options):
    """Numbers that were given, and reasons, expected and found numbers of what was rejected."""
    given = flat(batches_of(module(shards, rejects=folder, **options).train_dataloader()))
    rows = Rejects(folder).table.to_pylist()
    return given, [(row["reason"], row["expected"], row["found"]) for row in rows]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_on_a_store_are_read_as_local_ones(num_workers, store, tmp_path):
    given, rejected = read(URLS, tmp_path / "rejects", num_workers=num_workers)
    assert (sorted(given), rejected) == (ALL, [])


def test_counts_beside_shards_on_a_store_are_read_so_that_ranks_give_as_many_batches(store, tmp_path):
    files = fsspec.filesystem("flaky")
    with pytest.raises(
        MimicError, match="the number of pairs is unknown for 5 of 5 shards, such as flaky://pool/00000000"
    ):
        of_rank(list_shards(URLS), 0, 2).train_dataloader()
    sizes = {f"{place:08d}.tar": size for place, size in enumerate(SIZES)}
    del sizes["00000003.tar"]
    files.pipe("/pool/sizes.json", json.dumps(sizes).encode())
    files.pipe("/pool/00000003_stats.json", json.dumps({"successes": SIZES[3]}).encode())
    assert list(stated_counts(list_shards(URLS)).values()) == list(SIZES)
    ranks = [of_rank(list_shards(URLS), rank, 2, rejects=tmp_path).train_dataloader() for rank in (0, 1)]
    assert [len(batches_of(loader)) for loader in ranks] == [5, 5]


def test_a_store_that_does_not_answer_is_an_error_and_not_an_unknown_count(store, monkeypatch):
    def gone(self, path, **options):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(store, "cat_file", gone)
    with pytest.raises(MimicError, match=r"sizes\.json cannot be read: ConnectionResetError: reset by peer"):
        module(URLS).train_dataloader()


def test_shards_that_are_not_on_the_store_are_refused_before_training(store):
    message = "`shards`: 2 of 7 shards do not exist: flaky://pool/00000005.tar, flaky://pool/00000006.tar. Ranges"
    with pytest.raises(MimicError, match=re.escape(message)):
        list_shards(URLS.replace("04}", "06}"))
    with pytest.raises(MimicError, match=r"1 of 1 shards do not exist: flaky://nowhere/0\.tar"):
        list_shards("flaky://nowhere/0.tar")


def every_third():
    count = iter(range(10**6))

    def fails(position):
        if next(count) % 3 == 2:
            raise ConnectionResetError("reset by peer")

    return fails


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reads_that_fail_now_and_then_lose_no_pair_and_repeat_none(num_workers, store, tmp_path):
    store.fails = staticmethod(every_third())
    given, rejected = read(URLS, tmp_path / "rejects", num_workers=num_workers)
    assert (sorted(given), rejected) == (ALL, [])
    if not num_workers:
        assert store.opened > len(SIZES)


def test_a_shard_is_given_up_after_so_many_tries_and_its_whole_pairs_train(store, tmp_path):
    def fails(position):
        if position >= 9000:
            raise OSError(503, "slow down")

    store.fails = staticmethod(fails)
    given, rejected = read("flaky://pool/00000000.tar", tmp_path)
    assert given == [0, 1, 2]
    assert rejected == [(Reason.CUT_OFF, None, None), (Reason.SHARD_ENDS_EARLY, None, 4)]
    assert store.opened == 1 + shard_files.RETRIES
    details = Rejects(tmp_path).table["detail"].to_pylist()
    assert re.fullmatch(r"OSError: .*slow down; 6 attempts in a row failed at byte \d+", details[1])


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("denied")])
def test_what_is_gone_or_not_allowed_is_not_tried_again(error, store, tmp_path):
    def fails(position):
        raise error

    store.fails = staticmethod(fails)
    with pytest.raises(MimicError, match=f"none of the 1 shards has a usable pair.*{error}"):
        read("flaky://pool/00000000.tar", tmp_path)
    assert store.opened == 1


def test_a_file_that_ends_before_its_size_is_read_on(store, tmp_path, monkeypatch):
    short = iter([9000])

    def read_short(self, size=-1):
        # As a connection that is closed without a word.
        left = next(short, None) if self.tell() > 9000 else size
        return MemoryFile.read(self, size) if left is None or left == size else b""

    monkeypatch.setattr(FlakyFile, "read", read_short)
    given, rejected = read("flaky://pool/00000000.tar", tmp_path)
    assert (given, rejected) == (ALL[: SIZES[0]], [])
    assert store.opened == 2


class Web(http.server.BaseHTTPRequestHandler):
    """Sends a file, of which the first answers break off."""

    content, broken, asked = b"", 0, []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/none.tar":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content if len(self.asked) > self.broken else self.content[:9000])

    def log_message(self, *_):
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http: with curl, which is not installed")
@pytest.mark.parametrize("broken", [0, 2])
def test_a_download_that_breaks_off_goes_on_where_it_was(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "WAIT", 0.0)
    monkeypatch.setattr(Web, "content", write_shards(tmp_path / "local", *SIZES)[0].read_bytes())
    monkeypatch.setattr(Web, "broken", broken)
    monkeypatch.setattr(Web, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        given, rejected = read(f"{url}/0.tar", tmp_path / "rejects")
        assert (given, rejected) == (ALL[: SIZES[0]], [])
        assert len(Web.asked) == 1 + broken
        with pytest.raises(MimicError, match=r"none of the 1 shards has a usable pair.*exit 22"):
            read(f"{url}/none.tar", tmp_path / "none")
        assert Web.asked.count("/none.tar") == 1
        server.shutdown()


TOO_MANY = {
    "{0..999999999}.tar": "1,000,000,000",
    "{000..999}/{000..999}/{00..99}.tar": "100,000,000",
    "{-5..99999999999999999999}.tar": "100,000,000,000,000,000,005",
    "pipe:cat {a,b}/{0..9999999..2}.tar": "10,000,000",
}


@pytest.mark.parametrize("text", TOO_MANY)
def test_a_range_that_would_fill_the_memory_is_refused_before_it_is_expanded(text):
    message = f"`shards`: {text!r} expands to up to {TOO_MANY[text]} shards; at most 4,194,304 are allowed in total."
    with pytest.raises(MimicError, match=re.escape(message)):
        list_shards(text)


def test_the_bound_holds_for_all_entries_of_a_list_and_for_variables(monkeypatch):
    monkeypatch.setattr("lightning_mimic.data.shards.MAX_SHARDS", 6)
    assert len(list_shards(["pipe:cat {0..3}.tar", "pipe:cat {a,b}.tar"])) == 6
    with pytest.raises(MimicError, match="expands to up to 3 shards; at most 6"):
        list_shards(["pipe:cat {0..3}.tar", "pipe:cat {a,b,c}.tar"])
    monkeypatch.setenv("WDS_RANGE", "0..7")
    with pytest.raises(MimicError, match="expands to up to 8 shards"):
        list_shards("pipe:cat {${RANGE}}.tar")
    with pytest.raises(MimicError, match="cannot be expanded: missing environment variable"):
        list_shards("pipe:cat ${NONE}/0.tar")
    assert MAX_SHARDS == 2**22


def test_signed_urls_are_shown_without_their_signature(tmp_path):
    with RejectWriter(tmp_path, "run") as reject:
        url, detail = "https://host/0.tar?X-Amz-Signature=1f", "GET https://me:pw@host/0.tar?a=1 failed"
        reject(url, Reason.SHARD_UNREADABLE, detail)
    row = Rejects(tmp_path).table.to_pylist()[0]
    assert (row["shard"], row["detail"]) == ("https://host/0.tar", "GET https://host/0.tar failed")
    with pytest.raises(MimicError, match="has the unknown scheme nowhere:") as raised:
        list_shards("nowhere://me:secret@host/0.tar?Signature=1f")
    assert "secret" not in str(raised.value)
    assert "1f" not in str(raised.value)
