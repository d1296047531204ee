"""What is damaged in a shard is skipped, counted and listed; what is given is whole."""

import gzip
import hashlib
import json
import random
import re
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from lightning_mimic.data import shards as shards_module
from lightning_mimic.data.rejects import Reason, Rejects, RejectWriter, summary
from lightning_mimic.data.shards import _NO_JSON_AFTER, PairSources, list_shards, scanned_ids, stated_counts
from lightning_mimic.errors import MimicError
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
        with pytest.raises(MimicError, match=re.escape("none of the 1 shards has a usable pair")):
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


def keyed(folder, name, *keys, uid=None):
    """A shard of pairs of these keys, without a json or with one uid for all."""
    described = [] if uid is None else [("json", json.dumps({"uid": uid}).encode())]
    files = [("png", encoded(picture_of(1))), ("txt", b"number 1"), *described]
    return write(folder / name, [(f"{each}.{suffix}", data) for each in keys for suffix, data in files])


def ids_of(shards, **options):
    return [each for batch in module(shards, **options).train_dataloader() for each in batch.ids]


def test_keys_that_start_anew_in_every_shard_name_pairs_with_their_shard(tmp_path):
    shards = [keyed(tmp_path, name, "0000", "0001", "folder/1") for name in ("a.0.tar", "a.1.tar.gz", "b c.tar")]
    ids = ids_of(shards)
    assert ids[:3] == ["a.0/0000", "a.0/0001", "a.0/folder/1"]
    assert ids[6:] == ["b c/0000", "b c/0001", "b c/folder/1"]
    assert len(set(ids)) == 9
    # A command's shard has the name of the file, too.
    assert ids_of([f"pipe:cat '{path}'" for path in shards[:2]]) == ids[:6]


def test_keys_that_begin_with_their_shards_name_are_ids(tmp_path):
    assert ids_of([keyed(tmp_path, "00007.tar", "000070000", "000080000")]) == ["000070000", "00007/000080000"]


CLASHES = {
    "one name in two folders": lambda t: [keyed(t / "a", "0.tar", "7"), keyed(t / "b", "0.tar", "8")],
    "a key that begins with two names": lambda t: [keyed(t, "1.tar", "100"), keyed(t, "10.tar", "7")],
    "a uid in two shards": lambda t: [keyed(t, "0.tar", "7", uid="u"), keyed(t, "1.tar", "7", uid="u")],
    "a uid twice in a shard": lambda t: [keyed(t, "0.tar", "7", "8", uid="u"), keyed(t, "1.tar", "7")],
    "a uid as a number": lambda t: [keyed(t, "0.tar", "7", uid="9"), keyed(t, "1.tar", "7", uid=9)],
}


@pytest.mark.parametrize("pipe", [False, True])
@pytest.mark.parametrize("name", CLASHES)
def test_an_id_that_names_two_pairs_is_refused(name, pipe, tmp_path):
    shards = [f"pipe:cat {path}" if pipe else str(path) for path in CLASHES[name](tmp_path)]
    data = module(shards)
    with pytest.raises(MimicError, match=r"^`shards`: the (id|pair) .*\b7|100\b") as caught:
        list(data.train_dataloader()) if pipe else data.train_dataloader()  # local ones are looked through at once
    assert shards[0] in str(caught.value)
    assert shards[1] in str(caught.value) or name == "a uid twice in a shard"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_id_in_two_shards_is_found_whichever_workers_read_them(num_workers, tmp_path):
    shards = [keyed(tmp_path, f"{name}.tar", "7", uid="u") for name in "ab"]
    data = module([f"pipe:cat {shard}" for shard in shards], num_workers=num_workers, batch_size=1)
    with pytest.raises(
        MimicError, match=r"the id 'u' names two pairs: 7 in pipe:cat .*a\.tar and 7 in pipe:cat .*b\.tar"
    ):
        list(data.train_dataloader())


def test_ids_that_repeat_in_bulk_are_found_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(PairSources, "MOST", 100)
    sources = PairSources(["0.tar", "1.tar"])

    def read(shard):
        for number in range(5000):
            sources.add(f"{number}", shard, f"{number}", by_key=False)
            assert len(sources._pairs) <= 100

    read("0.tar")
    read("0.tar")  # another pass over it
    with pytest.raises(MimicError, match=r"names two pairs: \d+ in 0\.tar and \d+ in 1\.tar"):
        read("1.tar")


NO_PAIRS = {
    "two dots": (
        [f for n in range(4) for f in ((f"{n}.input.jpg", b""), (f"{n}.outputs.txt", b""))],
        "input.jpg, outp",
    ),
    "classes": ([f for n in range(4) for f in ((f"{n}.jpg", b""), (f"{n}.cls", b"1"))], "no caption, files: cls, jpg"),
    "images first": ([*((f"{n}.jpg", b"") for n in range(4)), *((f"{n}.txt", b"") for n in range(4))], "lie apart"),
    "a dot in the key": ([f for n in range(9) for f in ((f"2.{n}.jpg", b""), (f"2.{n}.txt", b""))], "and 12 more"),
    "texts only": ([(f"{n}.txt", b"a") for n in range(4)], "no image, files: txt"),
    "nothing": ([], "0.tar: empty"),
}


@pytest.mark.parametrize("pipe", [False, True])
@pytest.mark.parametrize("name", NO_PAIRS)
def test_shards_without_a_usable_pair_are_an_error_that_says_why(name, pipe, tmp_path):
    files, why = NO_PAIRS[name]
    path = write(tmp_path / "0.tar", files)
    data = module([f"pipe:cat {path}" if pipe else path], rejects=tmp_path / "rejects")
    with pytest.raises(
        MimicError, match=rf"none of the 1 shards has a usable pair.*{why}.*KEY\.jpg.*listed in .*rejects"
    ):
        list(data.train_dataloader())  # where shards are local, by making the loader
    assert bool(Rejects(tmp_path / "rejects").pairs) == bool(files)


def test_a_manifest_that_keeps_no_pair_of_the_shards_is_said_to(tmp_path):
    pq.write_table(pa.table({"id": ["x"], "keep": [True]}), tmp_path / "kept.parquet")
    data = module([keyed(tmp_path, "0.tar", "7")], keep=tmp_path / "kept.parquet")
    with pytest.raises(MimicError, match=r"^`keep`: .*kept\.parquet keeps none of the pairs in '.*0\.tar'\.$"):
        data.train_dataloader()


def test_images_are_compared_with_the_hash_in_their_json(tmp_path):
    def described(number, **more):
        return {"json": json.dumps({"uid": uid(number)} | more).encode()}

    images = {number: encoded(picture_of(number), "BMP") for number in range(4)}
    hashes = {number: hashlib.sha256(image).hexdigest() for number, image in images.items()}
    images[1] = images[1][:-1] + b"\x08"  # another picture
    resized = {"sha256": hashes[0], "width": 4, "height": 4, "original_width": 400, "original_height": 400}
    files = [
        *pair(0, png=images[0], **described(0, sha256=hashes[0])),
        *pair(1, png=images[1], **described(1, sha256=hashes[1])),
        *pair(2, png=images[2], **described(2)),
        *pair(3, png=images[3], **described(3, **resized)),
    ]
    given, pairs, shards = read(tmp_path, [write(tmp_path / "00.tar", files)], verify=True)
    assert given == [0, 2, 3]
    assert pairs == [(key(1), Reason.CHANGED_IMAGE, uid(1))]
    assert shards == [(Reason.NOT_VERIFIED, None, 2)]
    assert summary(Rejects(tmp_path / "rejects")) == (
        "1 image-text pair was skipped (1 image differs from its sha256); 2 images could not be compared with a sha256"
    )


def test_dropped_transparency_is_counted_and_the_pair_taken(tmp_path):
    image = picture_of(2)
    image.putalpha(9)
    given, pairs, _ = read(tmp_path, [write(tmp_path / "0.tar", [*files_of(1), *pair(2, png=encoded(image))])])
    assert (given, pairs) == ([1, 2], [(key(2), Reason.TRANSPARENT, uid(2))])
    rejects = Rejects(tmp_path / "rejects")
    assert rejects.pairs == {}
    assert summary(rejects).startswith("1 image had transparency, which was dropped")


@pytest.mark.parametrize("pipe", [False, True])
def test_files_that_no_pair_needs_in_memory_are_not_taken_there(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_PAIR_BYTES", 5000)
    monkeypatch.setattr(shards_module, "_MAX_TEXT_BYTES", 400)
    big = [(name, bytes(10**5)) for name in (f"{key(3)}.mp4", f"{key(2)}.png", f"{key(1)}.txt", f"{key(0)}.json")]
    files = [file for number in range(4) for file in pair(number)]
    files = [next((b for b in big if b[0] == name), (name, data)) for name, data in files] + big[:1]
    path = write(tmp_path / "0.tar", files + files_of(4))
    given, pairs, _ = read(tmp_path, [f"pipe:cat {path}" if pipe else path])
    assert given == [3, 4]
    assert [(each, reason) for each, reason, _ in pairs] == [(key(number), Reason.TOO_BIG) for number in range(3)]


@pytest.mark.parametrize("suffix", ["jpg", "txt", "bin"])
def test_a_small_compressed_shard_cannot_fill_the_memory(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_PAIR_BYTES", 2**24)
    member = tarfile.TarInfo(f"0.{suffix}")
    member.size = 2**26
    with gzip.open(tmp_path / "0.tar.gz", "wb", compresslevel=1) as file:
        file.write(member.tobuf())
        for _ in range(2**6):
            file.write(bytes(2**20))
        for name, data in pair(1):
            more = tarfile.TarInfo(name)
            more.size = len(data)
            file.write(more.tobuf() + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    tracemalloc.start()
    try:
        given, pairs, _ = read(tmp_path, [tmp_path / "0.tar.gz"])
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert given == [1]
    assert [reason for _, reason, _ in pairs] == [Reason.NO_JSON if suffix == "bin" else Reason.TOO_BIG]


def mutated(data, rng):
    """Bytes of a shard with bits flipped, cut, blocks swapped, removed or repeated, or a header's field replaced."""
    data, blocks = bytearray(data), len(data) // 512
    first, second = (512 * rng.randrange(blocks) for _ in range(2))
    match rng.randrange(6):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            data[first : first + 512], data[second : second + 512] = (
                data[second : second + 512],
                data[first : first + 512],
            )
        case 3:
            del data[first : first + 512]
        case 4:
            data[first:first] = data[second : second + 1024]
        case 5:
            head = rng.choice([at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"])
            sizes = [b"\xff" * 12, b"\x80" + bytes(3) + b"\x7f" * 8, b"77777777777\0", bytes(12)]
            at, value = rng.choice([(124, rng.choice(sizes)), (156, rng.choice([b"x", b"g", b"L", b"K", b"S", b"5"]))])
            data[head + at : head + at + len(value)] = value
            data[head + 148 : head + 156] = b" " * 8
            data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_befalls_a_shard_no_picture_is_given_under_anothers_id(seed, tmp_path):
    rng = random.Random(seed)
    images = {number: encoded(picture_of(number)) for number in range(6)}
    hashes = {number: hashlib.sha256(image).hexdigest() for number, image in images.items()}
    files = [
        file
        for number in images
        for file in pair(number, json=json.dumps({"uid": uid(number), "sha256": hashes[number]}).encode())
    ]
    whole = write(tmp_path / "whole.tar", files).read_bytes()
    for turn in range(25):
        changed = mutated(whole, rng)
        (tmp_path / "0.tar").write_bytes(gzip.compress(changed) if turn % 5 == 0 else changed)
        data = module([tmp_path / "0.tar"], verify=True, rejects=tmp_path / f"rejects {turn}")
        try:
            given = [
                (each, float(image[0]))
                for batch in data.train_dataloader()
                for each, image in zip(batch.ids, batch[0], strict=True)
            ]
        except MimicError as error:
            # A json that was copied to another pair gives two pairs one id, as far as their names tell.
            assert re.search("none of the 1 shards has a usable pair|the id .* names two pairs", str(error))  # noqa: PT017
            continue
        numbers = {uid(number): number for number in images}
        # A bit of an id can flip, too, and nothing tells; it is then that of no other pair.
        assert all(numbers.get(each, image) == image for each, image in given)
        assert len({each for each, _ in given}) == len(given)
        assert len(given) == 6 or Rejects(tmp_path / f"rejects {turn}").table.num_rows


HEADERS = {
    "a long name": (tarfile.GNUTYPE_LONGNAME, 2**40),
    "an extended header": (tarfile.XHDTYPE, 2**40),
    "a negative size": (tarfile.REGTYPE, -1024),
    "a huge size": (tarfile.REGTYPE, 2**62),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_impossible_sizes_end_the_shard(name, tmp_path):
    path = write(tmp_path / "0.tar", files_of(0, 1))
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    bad = tarfile.TarInfo("2.png")
    bad.type, bad.size = HEADERS[name]
    path.write_bytes(data + bad.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    given, _, shards = read(tmp_path, [path])
    assert given == [0]
    assert shards == [(Reason.SHARD_ENDS_EARLY, None, 2)]


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
    "cut inside a header": "it is truncated inside a header",
    "cut between files": "it is truncated between two files",
    "cut between pairs": "it is truncated between two files",
    "a bit of a header": "a damaged header (bad checksum)",
    "zeros within": "data follow after the end mark",
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
        "`shards`: 4 of 6 shards do not exist: {folder}/00000002.tar, {folder}/00000003.tar, {folder}/00000004.tar "
        "and more. {folder} contains 2 of them, 00000000.tar to 00000001.tar. Ranges are written {{000..127}}; * "
        "is not expanded.",
    ),
    "no folder": (
        "{folder}/x/0.tar",
        "`shards`: 1 of 1 shards do not exist: {folder}/x/0.tar. {folder}/x is not a directory",
    ),
    "a folder": (
        "{folder}",
        "`shards`: {folder} is a directory; give its shards. It contains 2 of them, 00000000.tar to 00000001.tar.",
    ),
    "a strange address": (
        "s5://bucket/0.tar",
        "`shards`: 's5://bucket/0.tar' has the unknown scheme s5:; expected a path",
    ),
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
    with pytest.raises(ValueError, match=f"{part} is not a list of rejects"):
        Rejects(tmp_path)


def test_rejects_that_cannot_be_written_stay_and_are_said(tmp_path):
    writer = RejectWriter(tmp_path / "gone", "run")
    writer("0.tar", Reason.NO_IMAGE, key="1")
    with pytest.warns(UserWarning, match="1 rejects could not be written to"):
        writer.flush()
    (tmp_path / "gone").mkdir()
    writer.flush()
    assert Rejects(tmp_path / "gone").pairs == {"no image": 1}


@pytest.mark.parametrize("count", [True, -1, 2**63, 1.5, "3", None])
def test_a_count_that_is_none_is_not_believed(count, tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": count}))
    assert stated_counts([f"{tmp_path}/0.tar"]) == {}


@pytest.mark.parametrize("shards", [None, 5])
def test_what_names_no_shards_is_refused(shards):
    with pytest.raises(MimicError, match=f"^`shards` is {shards}; expected paths"):
        list_shards(shards)
