"""Which pairs a rank and its workers give, in what order, how many, and where they go on."""

import copy
import hashlib
import itertools
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_mimic.data import pair_stream
from lightning_mimic.data.rejects import Rejects
from lightning_mimic.manifest import KeptIds
from support.cases import pairwise
from support.pair_shards import batches_of, flat, module, numbers, of_rank, pair, uid, write, write_shards

SIZES = (7, 3, 9, 5, 2)
ALL = list(range(sum(SIZES)))


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", *SIZES)


@pytest.mark.parametrize(*pairwise(shuffle=[0, 1, 4, 100], pipe=[False, True], num_workers=[0, 2]))
def test_one_process_sees_every_pair_once_in_an_epoch(pipe, shuffle, num_workers, shards):
    given = [f"pipe:cat {shard}" for shard in shards] if pipe else shards
    loader = module(given, shuffle=shuffle, num_workers=num_workers).train_dataloader()
    first, second = batches_of(loader), batches_of(loader)
    for batches in (first, second):
        assert sorted(flat(batches)) == ALL
        assert all(len(batch) <= 4 for batch in batches)
        assert sum(len(batch) < 4 for batch in batches) <= max(1, num_workers)
    if pipe:
        with pytest.raises(TypeError, match="the number of pairs in these shards is unknown"):
            len(loader)
    else:
        assert len(loader) == len(first) == len(second)
    assert (first == second) == (shuffle == 0)
    if shuffle == 0 and num_workers == 0:
        assert flat(first) == ALL


def order(shards, epochs=1, **options):
    loader = module(shards, **({"shuffle": 4} | options)).train_dataloader()
    for _ in range(epochs):
        batches = batches_of(loader)
    return batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_depends_on_seed_and_epoch_alone(num_workers, shards):
    state = torch.random.get_rng_state()
    first = order(shards, num_workers=num_workers)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert order(shards, num_workers=num_workers) == first
    assert order(shards, num_workers=num_workers, seed=1) != first
    second = order(shards, 2, num_workers=num_workers)
    assert second != first
    assert order(shards, 2, num_workers=num_workers) == second


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_ranks_give_as_many_full_batches_and_together_all_pairs(workers, sized, tmp_path):
    shards = write_shards(tmp_path, *SIZES, sized=sized)
    ranks = [
        batches_of(of_rank(shards, rank, 2, num_workers=workers - 1 and workers, shuffle=4).train_dataloader())
        for rank in (0, 1)
    ]
    assert {len(batch) for batches in ranks for batch in batches} == {4}
    assert (
        len(ranks[0])
        == len(ranks[1])
        == len(of_rank(shards, 0, 2, num_workers=workers - 1 and workers).train_dataloader())
    )
    first, second = (set(flat(batches)) for batches in ranks)
    assert first | second == set(ALL)
    assert not first & second
    assert len(ranks[0]) == (5 if workers == 1 else 6)  # 18 of 26 pairs; 9 pairs in the fullest of 4 workers


def test_a_worker_whose_shards_are_all_broken_gives_other_pairs(tmp_path):
    shards = write_shards(tmp_path, 5, 5, sized=True)
    shards[0].write_bytes(b"<html>")
    for rank in (0, 1):
        loader = of_rank(shards, rank, 2).train_dataloader()
        batches = batches_of(loader)
        assert len(batches) == len(loader) == 2
        assert set(flat(batches)) == {5, 6, 7, 8, 9}


def test_too_few_shards_are_refused_with_what_to_do(shards):
    with pytest.raises(
        ValueError, match=re.escape("5 shards for 2 ranks with 3 workers each; every worker needs its own")
    ):
        of_rank(shards, 0, 2, num_workers=3).train_dataloader()
    with pytest.raises(ValueError, match=re.escape("5 shards for 6 ranks; every rank needs its own")):
        of_rank(shards, 0, 6).train_dataloader()
    with pytest.raises(
        ValueError, match=re.escape("the number of pairs is unknown for 1 of 2 shards, such as pipe:cat")
    ):
        of_rank([shards[0], f"pipe:cat {shards[1]}"], 0, 2).train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_with_replacement_an_epoch_has_the_samples_it_was_given(num_workers, shards):
    options = {"with_replacement": True, "samples_per_epoch": 90, "num_workers": num_workers, "shuffle": 6}
    ranks = [of_rank(shards, rank, 2, **options).train_dataloader() for rank in (0, 1)]
    batches = [batches_of(loader) for loader in ranks]
    assert {len(batch) for each in batches for batch in each} == {4}
    assert [len(loader) for loader in ranks] == [len(each) for each in batches] == [12, 12]
    assert batches[0] != batches[1]
    assert max(Counter(flat(batches[0])).values()) > 1
    one = module(shards, **options).train_dataloader()
    assert len(one) == len(batches_of(one)) == (23 if num_workers == 0 else 24)


CASES = {
    "in order": {},
    "shuffled": {"shuffle": 5},
    "workers": {"shuffle": 5, "num_workers": 2},
    "workers, unevenly": {"shuffle": 3, "num_workers": 2, "batch_size": 2},
    "with replacement": {"with_replacement": True, "samples_per_epoch": 30, "num_workers": 2, "shuffle": 5},
}


BROKEN = ["in order", "workers, unevenly", "with replacement"]


@pytest.mark.parametrize(
    ("case", "broken"),
    [
        pytest.param(case, broken, marks=[pytest.mark.slow] * ("num_workers" in CASES[case]))
        for case, broken in [*((case, False) for case in CASES), *((case, True) for case in BROKEN)]
    ],
)
def test_an_epoch_goes_on_where_it_was_and_the_next_follows(case, broken, shards):
    options = CASES[case]
    if broken:  # noticed only when it is decoded, so that what was drawn counts and not what was given
        first = [file for n in range(7) for file in pair(n, **({"png": b"<html>"} if n in (1, 2) else {}))]
        write(shards[0], first)
    whole, saved = (module(shards, **options).train_dataloader() for _ in range(2))
    for _ in range(2):
        batches, running, states = batches_of(whole), iter(saved), []
        for given in range(len(batches) + 1):
            states.append(copy.deepcopy(saved.state_dict()))
            assert [numbers(batch) for batch in itertools.islice(running, 1)] == batches[given : given + 1]
        for given in range(0, len(batches) + 1, 3):
            resumed = module(shards, **options).train_dataloader()
            resumed.load_state_dict(states[given])
            assert batches_of(resumed) == batches[given:]
        following = batches_of(resumed)
    assert following == batches_of(whole)


def test_an_epoch_that_ended_is_followed_by_the_next(shards):
    loader = module(shards, shuffle=5).train_dataloader()
    list(loader)
    resumed = module(shards, shuffle=5).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert batches_of(resumed) == batches_of(loader)


def test_skipped_pairs_are_not_decoded_again(shards, monkeypatch):
    state = module(shards).train_dataloader()
    running = iter(state)
    for _ in range(3):
        next(running)
    decoded = []
    whole = pair_stream.decode_image
    monkeypatch.setattr(pair_stream, "decode_image", lambda *given: decoded.append(1) or whole(*given))
    resumed = module(shards).train_dataloader()
    resumed.load_state_dict(state.state_dict())
    assert sorted(flat(batches_of(resumed))) == ALL[12:]
    assert len(decoded) == len(ALL) - 12


def test_a_state_of_other_settings_starts_its_epoch_anew_and_says_so(shards):
    loader = module(shards, shuffle=5).train_dataloader()
    next(iter(loader))
    other = module(shards, shuffle=5, batch_size=3).train_dataloader()
    with pytest.warns(UserWarning, match=re.escape("(batch_size: 4, now 3). The epoch restarts")):
        other.load_state_dict(loader.state_dict())
    assert sorted(flat(batches_of(other))) == ALL


def manifest(path, ids, keep):
    pq.write_table(pa.table({"id": ids, "keep": keep}), path)
    return path


@pytest.mark.parametrize("hexadecimal", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_manifest_keeps_trains_as_often_as_it_keeps_it(num_workers, hexadecimal, tmp_path):
    def named(number):
        return {} if hexadecimal else {"json": b'{"uid": "id %d"}' % number}

    paths = [
        write(tmp_path / f"{shard}.tar", [f for n in range(shard * 6, shard * 6 + 6) for f in pair(n, **named(n))])
        for shard in (0, 1)
    ]
    name = uid if hexadecimal else "id {}".format
    known = [n for n in range(12) if n != 8]
    keep = manifest(tmp_path / "m.parquet", [name(n) for n in [*known, 3]], [*(n % 2 == 1 for n in known), True])
    loader = module(paths, keep=keep, num_workers=num_workers, shuffle=3, rejects=tmp_path / "out").train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches)
    assert sorted(each for batch in batches for each in batch.ids) == sorted(map(name, [1, 3, 3, 5, 7, 9, 11]))
    rows = Rejects(tmp_path / "out").table.to_pylist()
    assert [(row["id"], row["reason"]) for row in rows] == [(name(8), "unknown to the manifest")]


def test_a_manifest_of_hexadecimal_ids_tells_the_counts_of_a_plain_dict(tmp_path):
    ids = [hashlib.md5(str(n % 700).encode()).hexdigest() for n in range(1000)]
    ids += ["0" * 32, "f" * 32, "0" * 16 + "f" * 16, "f" * 16 + "0" * 16]
    keep = [int(each, 16) % 3 == 0 for each in ids]
    table = pa.table({"id": pa.chunked_array([ids[:5], [], ids[5:400], ids[400:]]), "keep": keep})
    path = tmp_path / "m.parquet"
    pq.write_table(table, path, row_group_size=300)
    kept = KeptIds(path)
    assert kept._columns is not None
    true = Counter(each for each, stays in zip(ids, keep, strict=True) if stays)
    assert [kept.times(each) for each in ids] == [true[each] for each in ids]
    unknown = ["1" + "0" * 31, "0" * 31, ids[0].upper(), "g" * 32, "", "0" * 15 + "g" + "f" * 16]
    assert [kept.times(each) for each in unknown] == [None] * 6


@pytest.mark.parametrize(
    ("ids", "keep", "message"),
    [
        ([1, 2], [True, True], "has ids of type int64; ids of image-text pairs are text"),
        (["a", "b"], [False, False], "keeps none of its 2 samples"),
        (["a", None], [True, True], "1 rows have no id"),
    ],
)
def test_a_manifest_that_cannot_choose_pairs_is_refused(ids, keep, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        KeptIds(manifest(tmp_path / "m.parquet", ids, keep))
