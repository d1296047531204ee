"""Paths on stores: what names one, what it can do, and what is written there. A store in memory, as fsspec has it."""

import contextlib
import errno
import io
import os
import shutil
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lightning_mimic import Ledger, MimicError, stores
from lightning_mimic.curation import curate, select
from lightning_mimic.errors import CurationError, LedgerError
from lightning_mimic.files import atomic_directory, atomic_path, atomic_write, fetched, write_json
from lightning_mimic.ledger import LedgerWriter, open_run
from lightning_mimic.manifest import Manifest
from lightning_mimic.manifest.writer import write_manifest
from lightning_mimic.reference import ReferenceLoadError, read_reference
from lightning_mimic.stores import StorePath, hide_secrets, path_of
from lightning_mimic.tables import Table
from lightning_mimic.user_files import user_path
from support.ledgers import CONFIG, write_ledger

ROWS = {"id": list(range(12)), "score": [k - 5.5 for k in range(12)], "label": 1, "predicted": 1}


class Flaky(MemoryFileSystem):
    """Raises what is asked for, once each, before it does what it should."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    errors: list = []  # noqa: RUF012
    requests: list = []  # noqa: RUF012

    def _maybe(self, name):
        self.requests.append(name)
        if self.errors:
            raise self.errors.pop(0)

    def info(self, path, **options):
        return super().info(path, **options)

    def put_file(self, source, place, **options):
        self._maybe("put")
        super().put_file(source, place, **options)

    def cat_file(self, path, **options):
        self._maybe("cat")
        return super().cat_file(path, **options)


@pytest.fixture
def place(request):
    """A folder of its own in the memory."""
    url = f"memory://{request.node.name}"
    yield StorePath(url)
    MemoryFileSystem.store.clear()


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(stores, "WAITS", (0.0,) * 3)
    yield Flaky
    Flaky.errors, Flaky.requests = [], []
    Flaky.store.clear()


def names_in(place):
    return sorted(str(path).removeprefix(f"{place}/") for path in place.rglob("*"))


def write(path, content, **options):
    with atomic_write(path, **options) as file:
        file.write(content)


def test_paths_of_the_disk_are_those_of_pathlib(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/a", "x") == tmp_path / "a"
    assert path_of(Path("b"), "x") == Path("b")
    assert path_of(f"file://{tmp_path}/a", "x") == path_of(f"file:{tmp_path}/a".replace(":", "://", 1), "x")
    assert path_of(f"file://{tmp_path}/a", "x") == tmp_path / "a"
    assert path_of("s3:bucket/a", "x") == Path("s3:bucket/a")  # no URL, but a name
    assert type(path_of("a", "x")) is type(Path("a"))
    assert path_of(StorePath("memory://a"), "x") == StorePath("memory://a")


REFUSED = {
    "s3:/bucket/run": "`ledger`: s3:/bucket/run has one slash behind s3:; a URL is text with two (a pathlib.Path drops "
    "one), s3://bucket/run.",
    "s4://bucket/run": "`ledger`: s4://bucket/run has the scheme 's4', which fsspec does not know; nearest: 's3', "
    "'gs', 'tos', 'ssh'.",
    "s3://": "`ledger`: 's3://' names no place on a store; expected such as s3://bucket/folder.",
    "zip://a::s3://b/c": "`ledger`: zip://a::s3://b/c joins several file systems; give the URL of one.",
    "simplecache::s3://b/c": "`ledger`: simplecache::s3://b/c joins several file systems; give the URL of one.",
    "ftp://me:s3cret@host/run": "`ledger`: the URL has a password in it, which would come into logs and ledgers. Give "
    "ftp://host/run, and the password in fsspec's configuration or the environment (FSSPEC_FTP_PASSWORD), or in the "
    "store's own.",
    "s3://AKIA:s3cr/et+x@bucket/run": "`ledger`: the URL has a password in it, which would come into logs and ledgers. "
    "Give s3://bucket/run, and the password in fsspec's configuration or the environment (FSSPEC_S3_PASSWORD), or in "
    "the store's own.",
}


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_name_no_place_are_refused_in_a_sentence_without_their_secrets(url):
    with pytest.raises(MimicError) as raised:
        path_of(url, "ledger")
    assert str(raised.value) == REFUSED[url]
    with pytest.raises(CurationError) as raised:
        user_path(url, "ledger")
    assert str(raised.value) == REFUSED[url]
    with pytest.raises(ReferenceLoadError) as raised:
        read_reference(url, argument="ledger")
    assert str(raised.value) == REFUSED[url]


def test_a_path_object_of_a_url_has_lost_a_slash_and_is_refused():
    with pytest.raises(MimicError, match="has one slash behind s3:"):
        path_of(Path("s3://bucket/run"), "ledger")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "'lightning-mimic[s3]'"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_scheme_without_its_package_names_the_package(scheme, package, monkeypatch):
    def missing(scheme):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MimicError) as raised:
        path_of(f"{scheme}://bucket/run", "ledger")
    assert str(raised.value) == (
        f"`ledger`: {scheme}://bucket/run needs a package that is not installed (Install it): pip install {package}."
    )


def test_secrets_of_urls_are_hidden_in_any_text():
    assert hide_secrets("'https://h/a.ckpt?X-Amz-Signature=1&b=2' https://me:pw@h:80/b") == (
        "'https://h/a.ckpt' https://h:80/b"
    )
    for plain in ("http://host:80/a@b", "http://host:80", "s3://bucket/what?", "why? a=b", "me@host:a"):
        assert hide_secrets(plain) == plain


def test_a_signed_url_is_shown_without_its_signature_and_opened_with_it(monkeypatch):
    path = StorePath("https://host/run/ref.ckpt?Signature=1f")
    assert (str(path), path.name, path.suffix) == ("https://host/run/ref.ckpt", "ref.ckpt", ".ckpt")
    assert repr(path) == "StorePath('https://host/run/ref.ckpt')"
    assert os.fspath(path) == "https://host/run/ref.ckpt?Signature=1f"
    asked = []

    class Refuses:
        def invalidate_cache(self):
            pass

        def info(self, place):
            asked.append(place)
            raise ValueError(f"GET {place} failed\nin two lines")

    monkeypatch.setattr(stores, "url_to_fs", lambda url: (Refuses(), url))
    with pytest.raises(ReferenceLoadError) as raised:
        read_reference(os.fspath(path))
    assert asked == [os.fspath(path)]
    error = raised.value
    while error is not None:  # nor in the traceback
        assert "1f" not in str(error)
        error = error.__cause__
    assert "GET https://host/run/ref.ckpt failed in two lines" in str(raised.value)


def test_a_path_on_a_store_answers_as_one_on_the_disk_does(place, tmp_path):
    for each in (place, tmp_path):
        write_json(each / "a.json", [1])
        (each / "deep").mkdir()
        write(each / "deep" / "b.txt", b"two")
    for each in (place, tmp_path):
        assert sorted(path.name for path in each.iterdir()) == ["a.json", "deep"]
        assert [path.name for path in each.glob("*.json")] == ["a.json"]
        assert list((each / "none").glob("*")) == []
        with pytest.raises(FileNotFoundError):
            list((each / "none").iterdir())
        assert {path.name for path in each.rglob("*.*")} == {"a.json", "b.txt"}
        here = [(p.exists(), p.is_file(), p.is_dir()) for p in (each / "a.json", each / "deep", each / "none")]
        assert here == [(True, True, False), (True, False, True), (False, False, False)]
        assert (each / "a.json").read_text(encoding="utf-8").split() == ["[", "1", "]"]
        assert (each / "deep" / "b.txt").stat().st_size == 3
        assert (each / "deep" / "b.txt").with_name("c.d.txt").stem == "c.d"
        with (each / "deep" / "b.txt").open("rb") as file:
            file.seek(1)
            assert file.read(1) == b"w"
        assert not (each / "a.json").is_symlink()
        assert sorted([each / "b", each / "a"]) == [each / "a", each / "b"]
        assert len({each / "a", each / "a", each / "b"}) == 2
        with pytest.raises(FileNotFoundError):
            (each / "none").unlink()
        (each / "none").unlink(missing_ok=True)
        (each / "a.json").unlink()
        assert not (each / "a.json").exists()
    with pytest.raises(ValueError, match="read as bytes"):
        (place / "deep" / "b.txt").open()


def test_a_file_that_was_fetched_shows_as_itself_and_is_read_from_the_disk(place):
    write(place / "a.txt", b"one\n")
    with fetched(place / "a.txt") as content, fetched(content) as again:
        assert content is again
        assert str(content) == f"{place}/a.txt"
        (place / "a.txt").unlink()
        assert (content.read_text(), content.stat().st_size, content.is_file()) == ("one\n", 4, True)
        with content.open(encoding="utf-8", newline="") as text:
            assert text.read() == "one\n"
        copy = Path(os.fspath(content))
        assert copy.read_bytes() == b"one\n"
    assert not copy.exists()
    with pytest.raises(FileNotFoundError), fetched(place / "a.txt"):
        pass


def test_a_file_is_there_whole_or_not_at_all(place):
    with contextlib.suppress(ZeroDivisionError), atomic_write(place / "a") as file:
        file.write(b"half")
        assert not (place / "a").exists()
        1 / 0  # noqa: B018
    assert names_in(place.parent) == []
    with pytest.raises(FileNotFoundError), atomic_path(place / "a"):
        pass
    with contextlib.suppress(ZeroDivisionError), atomic_directory(place / "folder") as folder:
        (folder / "a").touch()
        1 / 0  # noqa: B018
    assert names_in(place.parent) == []
    with atomic_directory(place / "folder", last="b") as folder:
        for name in "abc":
            (folder / name).write_text(name)
    assert names_in(place) == ["folder/a", "folder/b", "folder/c"]


def test_the_file_that_readers_begin_with_appears_last(flaky, monkeypatch):
    put, seen = Flaky.put_file, []
    monkeypatch.setattr(Flaky, "put_file", lambda self, s, p, **o: (seen.append(p), put(self, s, p, **o)))
    with atomic_directory(StorePath("flaky://folder"), last="b") as folder:
        for name in "cba":
            (folder / name).write_text(name)
    assert [path[-1] for path in seen] == ["a", "c", "b"]


def test_of_writers_at_the_same_time_one_is_first(place):
    won, lost, start = [], [], threading.Barrier(8)

    def compete(number):
        start.wait()
        for k in range(20):
            try:
                write(place / str(k), b"%d" % number, exclusive=True)
            except FileExistsError as error:
                lost.append((error.errno, error.filename == f"{place}/{k}"))
            else:
                won.append((k, number))

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(k for k, _ in won) == list(range(20))
    assert set(lost) == {(errno.EEXIST, True)}
    assert all((place / str(k)).read_bytes() == b"%d" % number for k, number in won)


class ConnectionError(Exception):  # noqa: A001 as botocore has one that is not Python's
    pass


class NoCredentialsError(Exception):
    pass


PASSING = [OSError(errno.EBUSY, "busy"), OSError("unknown"), TimeoutError("late"), ConnectionError("no answer")]
FINAL = [
    (PermissionError("Forbidden"), PermissionError, "Forbidden"),
    (
        FileNotFoundError("The specified bucket does not exist"),
        FileNotFoundError,
        "The specified bucket does not exist",
    ),
    (NoCredentialsError("Unable to locate"), PermissionError, "there are no credentials for it (Unable to locate)"),
    (ValueError("Invalid bucket\nname"), OSError, "ValueError: Invalid bucket name"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__ + str(error))
def test_what_passes_is_tried_again_and_in_the_end_is_an_error_of_the_system(error, flaky):
    path = StorePath("flaky://run/a")
    flaky.errors = [error] * 3
    write(path, b"content")
    assert flaky.requests == ["put"] * 4
    assert path.read_bytes() == b"content"
    flaky.errors, flaky.requests = [error] * 4, []
    with pytest.raises(OSError, match=r"busy|unknown|late|no answer"):
        write(path, b"other")
    assert flaky.requests == ["put"] * 4
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize(("error", "kind", "said"), FINAL, ids=lambda value: getattr(value, "__name__", ""))
def test_what_does_not_pass_is_an_error_of_the_system_at_once(error, kind, said, flaky):
    flaky.errors = [error]
    with pytest.raises(kind) as raised:
        write(StorePath("flaky://run/a"), b"content")
    assert raised.value.strerror == said
    assert flaky.requests == ["put"]


def test_a_put_that_was_carried_out_although_it_failed_is_no_other_writers(flaky, monkeypatch):
    put = Flaky.put_file

    def lost_answer(self, source, place, **options):
        put(self, source, place, **options)
        monkeypatch.setattr(Flaky, "put_file", put)
        raise TimeoutError

    monkeypatch.setattr(Flaky, "put_file", lost_answer)
    write(StorePath("flaky://run/a"), b"content", exclusive=True)
    with pytest.raises(FileExistsError):
        write(StorePath("flaky://run/a"), b"contend", exclusive=True)
    assert StorePath("flaky://run/a").read_bytes() == b"content"


def opened(place, start=0, run=None, **notes):
    return open_run(place, CONFIG, start, run, {"ranks": 1, **notes})


def writer_of(run, place):
    return LedgerWriter(place, run.run, run.attempt, 0, token=run.token)


def row(number, step=0):
    return {"id": [number], "epoch": [0], "step": [step], "batch": [step], "position": [0], "flag": ["ok"]}


def test_a_ledger_on_a_store_holds_what_one_on_the_disk_does(place, tmp_path):
    for folder in (place, tmp_path / "run"):
        write_ledger(folder, ROWS | {"part": [k // 4 for k in range(12)]}, notes={"ranks": 1, "rows": [12]})
    found, expected = (Ledger(folder).table() for folder in (str(place), tmp_path / "run"))
    assert found.equals(expected)
    assert len(list(place.glob("*.parquet"))) == 3
    # Other programs pass over the descriptions, whose folder's name begins with an underscore.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy" / "_meta").mkdir()
    (tmp_path / "copy" / "_meta" / "000001.json").write_text("{}")
    assert pa.dataset.dataset(tmp_path / "copy").count_rows() == pq.read_table(tmp_path / "copy").num_rows == 12


def test_of_two_that_begin_a_run_at_once_one_does(place, monkeypatch):
    first = opened(place)
    monkeypatch.setattr("lightning_mimic.ledger.run.meta_path", lambda directory: directory / "_meta.json")
    monkeypatch.setattr("lightning_mimic.ledger.run.read_meta", lambda directory: None)  # it looked too early
    with pytest.raises(LedgerError, match=r"another run started in .* just now\. Give each its own\."):
        opened(place)
    monkeypatch.undo()
    first.note({"rows": [0]})
    assert names_in(place) == ["_meta/000001.json", "_meta/000002.json"]
    assert [each["token"] for each in Ledger(place).meta["attempts"]] == [first.token]


def test_of_two_that_go_on_with_a_run_at_once_one_does(place, monkeypatch):
    run = opened(place).run
    before = place / "_meta" / "000001.json"
    with pytest.warns(UserWarning, match=r"has not ended\. If its process still runs, it stops"):
        second = opened(place, 5, run)
    monkeypatch.setattr("lightning_mimic.ledger.run.meta_path", lambda directory: before)
    with (
        pytest.warns(UserWarning, match="has not ended"),
        pytest.raises(LedgerError, match="another run started in"),
    ):
        opened(place, 5, run)
    assert [each["token"] for each in Ledger(place).meta["attempts"]][1:] == [second.token]


def test_an_attempt_ends_where_another_process_goes_on_with_its_run(place):
    first = opened(place)
    writer = writer_of(first, place)
    writer.append(row(1))
    writer.flush()
    with pytest.warns(UserWarning, match="has not ended"):
        second = opened(place, 1, first.run)
    writer.append(row(2, step=1))
    with pytest.raises(LedgerError, match=r"attempt 1 of run .* goes on in .*, and this is attempt 0 of run"):
        writer.flush()
    assert (writer.rows, writer.pending) == (2, 0)  # written, and not lost
    with pytest.raises(LedgerError, match="was replaced while the run was writing: it describes 2 attempts"):
        first.note({"rows": [2]})
    other = writer_of(second, place)
    other.append(row(3, step=1))
    other.flush()
    second.note({"rows": [1]})
    assert Ledger(place).table()["id"].to_pylist() == [1, 3]


def test_a_note_is_refused_where_another_was_written_meanwhile(place, monkeypatch):
    first = opened(place)
    before = stores.StorePath(f"{place}/_meta/000001.json")
    first.note({"score_kind": "own"})
    monkeypatch.setattr("lightning_mimic.ledger.run.meta_path", lambda directory: before)
    with pytest.raises(LedgerError, match=r"000001\.json was replaced .* by another process"):
        first.note({"rows": [2]})
    assert Ledger(place).meta["attempts"][0]["score_kind"] == "own"


def copied(source, to):
    for path in source.rglob("*"):
        if path.is_file() and path.name != "_lock":
            there = to / str(path).removeprefix(f"{source}/")
            there.parent.mkdir(parents=True, exist_ok=True)
            write(there, path.read_bytes())


def test_a_ledger_that_is_copied_from_or_to_a_store_goes_on_there(place, tmp_path):
    for source, to in ((tmp_path / "disk", place / "up"), (place / "store", tmp_path / "down")):
        run = opened(source)
        writer = writer_of(run, source)
        writer.append(row(1))
        writer.flush()
        run.note({"rows": [1]})
        run.close()
        copied(source, to)
        again = opened(to, 1, run.run)
        writer = writer_of(again, to)
        writer.append(row(2, step=1))
        writer.flush()
        again.note({"rows": [1]})
        again.close()
        assert Ledger(to).table()["id"].to_pylist() == [1, 2]
        assert len(Ledger(source).meta["attempts"]) == 1
    assert names_in(place / "up")[:2] == ["_meta.json", "_meta/000001.json"]
    assert not (tmp_path / "down" / "_meta.json").exists()


def test_rows_stay_in_memory_while_the_store_is_away_and_are_written_when_it_is_back(flaky):
    place = StorePath("flaky://run")
    run = opened(place)
    writer = writer_of(run, place)
    writer.append(row(1))
    flaky.errors = [TimeoutError()] * 4
    writer.flush()
    assert (writer.rows, writer.pending) == (0, 1)
    writer.append(row(2))
    writer.flush()
    assert (writer.rows, writer.pending) == (2, 0)
    writer.append(row(3))
    flaky.errors = [TimeoutError()] * 8
    writer.flush()
    with pytest.raises(LedgerError, match="1 rows could not be written to flaky://run, twice in a row"):
        writer.flush()
    assert writer.pending == 1
    # What was written counts, also where the description cannot be read just then.
    flaky.requests.clear()
    run.note({"score_kind": "own"})
    cat = [index for index, name in enumerate(flaky.requests) if name == "cat"]
    assert cat
    writer.flush()
    assert Ledger(place).table(allow_partial=True)["id"].to_pylist() == [1, 2, 3]


def test_decisions_on_a_store_are_those_on_the_disk(place, tmp_path):
    tables = []
    for folder in (tmp_path, place):
        write_ledger(folder / "run", ROWS, notes={"ranks": 1, "rows": [12]})
        clip = pa.table({"id": list(range(12)), "clip": [k % 5 for k in range(12)]})
        pool = io.BytesIO()
        pq.write_table(clip, pool)
        write(folder / "pool.parquet", pool.getvalue())
        done = curate(folder / "run", out=folder / "out", pool=folder / "pool.parquet", exports=["csv", "cleanlab"])
        assert [path.name for path in done.files] == ["label_issues.csv", "manifest.csv", "manifest.parquet"]
        recipe = f"{folder}/out/manifest.parquet and {folder}/pool.parquet:clip top 50%"
        chosen = select(recipe, folder / "chosen.parquet", exports=["csv"])
        csv = Table(folder / "chosen.manifest.csv")
        tables.append((done.manifest.table(), chosen.table(), csv.path.name, done.manifest.provenance["pool"]))
        assert Manifest(str(folder / "out" / "manifest.parquet")).provenance["ledger"]["directory"] == f"{folder}/run"
        chosen.to_csv(folder / "again.csv")
        with fetched(folder / "again.csv") as one, fetched(folder / "chosen.manifest.csv") as other:
            assert one.read_bytes() == other.read_bytes()
        with pytest.raises(CurationError, match="is there already; name another directory"):
            curate(folder / "run", out=folder / "out")
        with pytest.raises(CurationError, match="is there already; name another file"):
            select(recipe, folder / "chosen.parquet")
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1].equals(tables[1][1])
    assert tables[1][3] == f"{place}/pool.parquet"


def test_of_two_that_write_one_manifest_the_first_stays_with_its_exports(place):
    rows = pa.table({"id": [1, 2], "keep": [True, False], "reason": [None, "x"]})
    write_manifest(place / "m.parquet", rows.to_reader(), {"made_by": "first"}, ["csv"])
    csv = (place / "m.manifest.csv").read_bytes()
    others = pa.table({"id": [1, 2], "keep": [False, False], "reason": [None, "x"]})
    with pytest.raises(CurationError, match="is there already; name another place"):
        write_manifest(place / "m.parquet", others.to_reader(), {"made_by": "second"}, ["csv"])
    assert Manifest(place / "m.parquet").provenance == {"made_by": "first"}
    assert (place / "m.manifest.csv").read_bytes() == csv


def test_a_directory_of_tables_on_a_store_is_one_table(place):
    for k in range(3):
        content = io.BytesIO()
        pq.write_table(pa.table({"id": [2 * k, 2 * k + 1], "score": [0.5, float(k)]}), content)
        write(place / "tables" / f"{k}.parquet", content.getvalue())
    chosen = select(f"{place}/tables/:score top 3", place / "out.parquet")
    assert [each["id"] for each in chosen.table().to_pylist() if each["keep"]] == [0, 3, 5]
    with pytest.raises(CurationError, match=r"none\.parquet is not there"):
        Table(place / "none.parquet")


def test_a_damaged_part_or_manifest_on_a_store_is_refused_by_its_name(place):
    write_ledger(place / "run", ROWS, notes={"ranks": 1, "rows": [12]})
    curate(place / "run", out=place / "out")
    (part,) = (place / "run").glob("*.parquet")
    reads = {part: lambda: Ledger(place / "run").table()}
    reads[place / "out" / "manifest.parquet"] = lambda: Manifest(place / "out" / "manifest.parquet")
    for path, read in reads.items():
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        write(path, bytes(content))
        with pytest.raises(MimicError, match=path.name):
            read()


def test_references_on_a_store_are_those_on_the_disk(place, tmp_path):
    from support.checkpoints import weights, write_distributed, write_shards

    torch.save(weights(), tmp_path / "a.pt")
    torch.save(weights(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_shards(tmp_path / "shards", weights())
    write_distributed(tmp_path / "parts", {"model": weights()})
    copied(tmp_path, place)
    for name in ("a.pt", "old.pt", "shards", "shards/model.safetensors.index.json", "parts"):
        found = read_reference(f"{place}/{name}")
        assert sorted(found) == sorted(weights())
        assert all(torch.equal(found[key], value) for key, value in weights().items())
    write(place / "cut.pt", (tmp_path / "a.pt").read_bytes()[:900])
    with pytest.raises(ReferenceLoadError, match=f"`reference`: {place}/cut.pt .*cut off or damaged|not a complete"):
        read_reference(f"{place}/cut.pt")
    with pytest.raises(ReferenceLoadError, match=f"no file {place}/b.pt; there are: a.pt, cut.pt, old.pt"):
        read_reference(f"{place}/b.pt")
