"""What is damaged in a shard is skipped, counted and listed; what is given is whole."""

import gzip
import json
import re
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset

from lightning_mimic.data.rejects import Reason, Rejects, RejectWriter, summary
from lightning_mimic.data.shards import _NO_JSON_AFTER, list_shards, scanned_ids
from support.cases import pairwise
from support.pair_shards import batches_of, encoded, flat, module, pair, picture_of, uid, write, write_shards

WHOLE = [0, 1, 2, 3]


def read(tmp_path, shards, **options):
    """Numbers that were given, and what was rejected: (key, reason, id) and (reason, expected, found) of shards."""
    directory = tmp_path / "rejects"
    loader = module(shards, rejects=directory, **options).train_dataloader()
    given = flat(batches_of(loader))
    rows = Rejects(directory).table.to_pylist()
    pairs = [(row["key"], row["reason"], row["id"]) for row in rows if row["key"] is not None]
    shards = [(row["reason"], row["expected"], row["found"]) for row in rows if row["key"] is None]
    return given, pairs, shards


def files_of(*numbers):
    return [file for number in numbers for file in pair(number)]


def key(number):
    return f"{number:09d}"


BAD_JSON = {"half": b'{"uid": "a', "list": b"[1]", "not text": b"\xff\xfe\x00", "odd id": b'{"uid": "\\ud800"}'}
HTML = b"<!DOCTYPE html><html><body>404</body></html>"
BROKEN = {
    "no caption": ({"txt": None, "json": json.dumps({"uid": uid(2), "caption": None}).encode()}, Reason.NO_CAPTION),
    "empty caption": ({"txt": b" \n"}, Reason.EMPTY_CAPTION),
    "latin-1": ({"txt": "café 2".encode("latin-1")}, Reason.CAPTION_NOT_UTF8),
    "half a character": (
        {"txt": None, "json": b'{"uid": "%s", "caption": "\\ud83d 2"}' % uid(2).encode()},
        Reason.CAPTION_NOT_UTF8,
    ),
    "no image": ({"png": None}, Reason.NO_IMAGE),
    "html": ({"png": None, "jpg": HTML}, Reason.UNDECODABLE_IMAGE),
    "empty image": ({"png": b""}, Reason.UNDECODABLE_IMAGE),
    "truncated": ({"png": encoded(picture_of(2))[:50]}, Reason.UNDECODABLE_IMAGE),
    "no json": ({"json": None}, Reason.NO_JSON),
    **{f"json: {name}": ({"json": data}, Reason.UNREADABLE_JSON) for name, data in BAD_JSON.items()},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pair_is_listed_by_its_reason_and_the_others_keep_their_ids(name, tmp_path):
    changes, reason = BROKEN[name]
    files = [*files_of(0, 1), *pair(2, **changes), *files_of(3, 4)]
    given, pairs, shards = read(tmp_path, [write(tmp_path / "0.tar", files)])
    assert given == [0, 1, 3, 4]
    assert pairs == [(key(2), reason, None if "json" in reason else uid(2))]
    assert shards == []


def test_a_flipped_bit_in_a_picture_is_noticed_where_the_format_has_a_checksum(tmp_path):
    image = bytearray(encoded(picture_of(2)))
    image[image.index(b"IDAT") + 8] ^= 1
    given, pairs, _ = read(tmp_path, [write(tmp_path / "0.tar", [*files_of(1), *pair(2, png=bytes(image))])])
    assert (given, pairs) == ([1], [(key(2), Reason.UNDECODABLE_IMAGE, uid(2))])


def split_at(files, *moved):
    """The files of these names go to the end."""
    return [f for f in files if f[0] not in moved] + [f for f in files if f[0] in moved]


TWISTED = {
    "a file twice": ([*pair(0), *pair(1), pair(1)[1], *pair(2)], {1: [Reason.DUPLICATE_FILE]}),
    "a pair twice": ([*pair(0), *pair(1), *pair(2), *pair(1)], {}),
    "json elsewhere": (split_at(files_of(0, 1, 2), f"{key(1)}.json"), {1: [Reason.NO_JSON]}),
    "json of the first elsewhere": (split_at(files_of(0, 1, 2), f"{key(0)}.json"), {0: [Reason.NO_JSON]}),
    "picture elsewhere": (split_at(files_of(0, 1, 2), f"{key(1)}.png"), {1: [Reason.NO_IMAGE]}),
    "by kind": (sorted(files_of(0, 1, 2), key=lambda file: file[0].rpartition(".")[2]), {0: [], 1: [], 2: []}),
}


@pytest.mark.parametrize("name", TWISTED)
def test_a_pair_whose_files_lie_apart_is_never_given_by_halves(name, tmp_path):
    files, lost = TWISTED[name]
    loader = module([write(tmp_path / "0.tar", files)], rejects=tmp_path / "rejects")
    if len(lost) == 3:
        with pytest.raises(RuntimeError, match=re.escape("none of the 1 shards gave a pair")):
            batches_of(loader.train_dataloader())
        given = []
    else:
        given = flat(batches_of(loader.train_dataloader()))
    assert given == [number for number in (0, 1, 2) if number not in lost]
    rows = Rejects(tmp_path / "rejects").table.to_pylist()
    first = {row["key"] for row in rows if row["reason"] != Reason.SPLIT_KEY}
    if name != "a pair twice":
        assert {row["key"] for row in rows} == {key(number) for number in lost}
    for number, reasons in lost.items():
        assert key(number) in first
        assert {row["reason"] for row in rows if row["key"] == key(number)} >= set(reasons)
    apart = {row["key"] for row in rows if row["reason"] == Reason.SPLIT_KEY}
    assert apart == ({key(1)} if name == "a pair twice" else set() if name == "a file twice" else set(map(key, lost)))


def test_pairs_without_any_json_go_by_their_key(tmp_path):
    many = _NO_JSON_AFTER + 3
    files = [file for number in range(many) for file in pair(number, json=None)]
    batches = list(module([write(tmp_path / "0.tar", files)], rejects=tmp_path / "rejects").train_dataloader())
    assert [each for batch in batches for each in batch.ids] == [key(number) for number in range(many)]
    assert Rejects(tmp_path / "rejects").table.num_rows == 0


def member_starts(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def damaged(path, how):
    """A copy of a shard of six pairs, corrupted in the files of the pair 4 (members 12 to 14)."""
    data, starts = bytearray(path.read_bytes()), member_starts(path)
    if how == "cut inside a file":
        data = data[: starts[13] + 512 + 3]
    elif how == "cut inside a header":
        data = data[: starts[13] + 100]
    elif how == "cut between files":
        data = data[: starts[13]]
    elif how == "cut between pairs":
        data = data[: starts[15]]
    elif how == "a bit of a header":
        data[starts[13] + 125] ^= 1
    elif how == "zeros within":
        data[starts[13] : starts[13] + 1024] = bytes(1024)
    path.write_bytes(data)
    return path


DAMAGES = {
    "cut inside a file": "unexpected end of data",
    "cut inside a header": "it is cut inside a header",
    "cut between files": "it is cut between two files",
    "cut between pairs": "it is cut between two files",
    "a bit of a header": "a damaged header (bad checksum)",
    "zeros within": "more follows after the end mark",
}


@pytest.mark.parametrize(*pairwise(how=DAMAGES, sized=[False, True], pipe=[False, True]))
def test_a_damaged_shard_is_noticed_and_gives_its_whole_pairs(how, sized, pipe, tmp_path):
    one, two = write_shards(tmp_path, 6, 2, sized=sized)
    damaged(one, how)
    urls = [f"pipe:cat {one}", f"pipe:cat {two}"] if pipe else [one, two]
    given, pairs, shards = read(tmp_path, urls, batch_size=100)
    assert given == [0, 1, 2, 3, 6, 7]
    assert pairs == [(key(4), Reason.CUT_OFF, None)]
    assert shards == [(Reason.SHARD_ENDS_EARLY, 6 if sized and not pipe else None, 5)]
    assert DAMAGES[how] in Rejects(tmp_path / "rejects").table["detail"].to_pylist()[1]


def test_a_whole_tar_is_compared_with_its_count(tmp_path):
    paths = write_shards(tmp_path, 2, 2, 2, sized=True)
    (tmp_path / "sizes.json").write_text(json.dumps({paths[0].name: 3, paths[1].name: 1}))
    (tmp_path / "00000002_stats.json").write_text('{"successes": 2, "count": 9}')
    given, pairs, shards = read(tmp_path, paths, batch_size=100)
    assert (given, pairs) == ([*range(6)], [])
    assert shards == [(Reason.SHARD_ENDS_EARLY, 3, 2), (Reason.SHARD_HAS_MORE, 1, 2)]


def unreadable(tmp_path):
    (tmp_path / "page.tar").write_bytes(HTML)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "noise.tar").write_bytes(bytes(range(1, 200)) * 20)
    return [*(tmp_path / f"{name}.tar" for name in ("page", "empty", "noise")), "pipe:cat nowhere.tar 2>/dev/null"]


@pytest.mark.parametrize(("number", "num_workers"), [(0, 0), (1, 2), (2, 0), (3, 2), (3, 0)])
def test_what_is_no_shard_is_listed_and_the_others_train(number, num_workers, tmp_path):
    shards = [unreadable(tmp_path)[number], *write_shards(tmp_path / "whole", 3, 1)]
    given, pairs, found = read(tmp_path, shards, num_workers=num_workers)
    assert (sorted(given), pairs) == (WHOLE, [])
    assert found == [(Reason.SHARD_UNREADABLE, None, 0)]


def test_a_command_that_fails_at_its_end_says_so(tmp_path):
    write_shards(tmp_path, 4)
    shard = f"pipe:head -c 9000 {tmp_path}/00000000.tar; exit 3"
    given, _, found = read(tmp_path, shard)
    assert given == [0, 1]
    assert found[0][0] == Reason.SHARD_ENDS_EARLY
    assert "exit 3" in Rejects(tmp_path / "rejects").table["detail"].to_pylist()[1]


def test_compressed_shards_and_those_of_webdatasets_own_writer_are_read(tmp_path):
    plain = write_shards(tmp_path, 2)[0]
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert scanned_ids([str(packed)]) == {}
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for number in (2, 3):
            files = {name.partition(".")[2]: data for name, data in pair(number)}
            writer.write({"__key__": f"folder/{key(number)}", **files})
    assert read(tmp_path, [packed, tmp_path / "theirs.tar"]) == (WHOLE, [], [])


def test_directories_and_names_without_a_suffix_are_no_pairs(tmp_path):
    path = write(tmp_path / "0.tar", [("README", b"hello"), ("__info__.json", b"{}"), *files_of(0, 1), (".x", b"")])
    assert read(tmp_path, [path]) == ([0, 1], [], [])


def test_lists_ranges_and_commands_are_expanded(tmp_path):
    paths = write_shards(tmp_path, 2, 2)
    ranged = f"{tmp_path}/{{00000000..00000001}}.tar"
    for given in (ranged, [ranged], paths, f"pipe:cat {ranged}", [f"file:{paths[0]}", f"pipe:cat {paths[1]}"]):
        assert flat(batches_of(module(given).train_dataloader())) == WHOLE
    assert list_shards(ranged) == [str(path) for path in paths]


REFUSED = {
    "none": ([], "`shards` is empty; give paths such as"),
    "missing": (
        "{folder}/{{00000000..00000005}}.tar",
        "`shards`: 4 of 6 shards are not there: {folder}/00000002.tar, {folder}/00000003.tar, {folder}/00000004.tar "
        "and more. {folder} holds 2 of them, 00000000.tar to 00000001.tar. Ranges are written {{000..127}}; * "
        "is not expanded.",
    ),
    "no folder": (
        "{folder}/x/0.tar",
        "`shards`: 1 of 1 shards are not there: {folder}/x/0.tar. {folder}/x is no directory",
    ),
    "a folder": (
        "{folder}",
        "`shards`: {folder} is a directory; name its shards. It holds 2 of them, 00000000.tar to 00000001.tar.",
    ),
    "a strange address": ("s3://bucket/0.tar", "`shards`: 's3://bucket/0.tar' begins with s3:, which cannot be opened"),
    "a half brace": ("{{0..1.tar", "`shards`: '{{0..1.tar' cannot be expanded: Unbalanced braces"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shards_that_are_not_there_are_refused_before_training(name, tmp_path):
    write_shards(tmp_path, 1, 1)
    shards, message = REFUSED[name]
    shards = shards.format(folder=tmp_path) if isinstance(shards, str) else shards
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))):
        module(shards)


def test_rejects_are_kept_flushed_and_read_without_repeats(tmp_path):
    writer = RejectWriter(tmp_path, "run-e0", every=2)
    for epoch in range(2):
        writer("0.tar", Reason.NO_IMAGE, key=f"bad \udcff {epoch // 2}", id="a")
    assert len(list(tmp_path.glob("*.parquet"))) == 1  # before the end
    with RejectWriter(tmp_path, "run-e0") as again:
        again("0.tar", Reason.NO_IMAGE, key="bad \udcff 0", id="a")
        again("0.tar", Reason.EMPTY_CAPTION, key="c")
        again("1.tar", Reason.SHARD_ENDS_EARLY, "cut", expected=3, found=2)
    with RejectWriter(tmp_path, "other-e0") as other:
        other("2.tar", Reason.SHARD_UNREADABLE)
    assert len(list(tmp_path.iterdir())) == 3
    rejects = Rejects(tmp_path, "run")
    assert rejects.table.num_rows == 3
    assert rejects.table["key"].to_pylist() == ["bad \\udcff 0", "c", None]
    assert rejects.pairs == {"empty caption": 1, "no image": 1}
    assert summary(Rejects(tmp_path)) == (
        "2 image-text pairs were skipped (1 empty caption, 1 no image); 1 shard ended early; 1 shard could not be read"
    )
    part = next(tmp_path.glob("*.parquet"))
    assert pq.ParquetFile(part).metadata.row_group(0).column(0).statistics is None
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{part} is no list of rejects"):
        Rejects(tmp_path)


def test_rejects_that_cannot_be_written_stay_and_are_said(tmp_path):
    writer = RejectWriter(tmp_path / "gone", "run")
    writer("0.tar", Reason.NO_IMAGE, key="1")
    with pytest.warns(UserWarning, match="1 rejects could not be written to"):
        writer.flush()
    (tmp_path / "gone").mkdir()
    writer.flush()
    assert Rejects(tmp_path / "gone").pairs == {"no image": 1}
