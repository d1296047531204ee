"""Ids are looked up through every nesting of subsets and joined data sets, and none names two samples in silence."""

import random
import warnings
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    random_split,
)

from lightning_mimic import GradMimic, WithIds, collate_with_ids
from lightning_mimic.data.ids import SampleWithId
from lightning_mimic.dataset_ids import check_loader_ids, row_ids, sample_ids
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import kept_subset
from lightning_mimic.reweighting.repeated_ids import RepeatedIds
from support.toys import parameters_of, toy, toy_data, trainer


def data(count, start=0):
    """Samples that hold what they are."""
    return TensorDataset(torch.arange(start, start + count))


def scored(dataset):
    """What is trained on, and under which id, as a loader gives it."""
    loader = DataLoader(dataset, 3, collate_fn=collate_with_ids)
    ids = [each for batch in loader for each in (batch.ids if isinstance(batch.ids, list) else batch.ids.tolist())]
    return list(zip((value for batch in loader for value in batch[0].tolist()), ids, strict=True))


def content(dataset, row):
    sample = dataset[row]
    return int((sample.sample if isinstance(sample, SampleWithId) else sample)[0])


def keep(folder, ids, kept):
    path = folder / "kept.parquet"
    pq.write_table(pa.table({"id": ids, "keep": [each in kept for each in ids]}), path)
    return path


def nested(rng, depth, tagged):
    """A random nesting over data of distinct content, with ids at the bottom or none."""
    if not depth:
        start = rng.randrange(10**6) * 100
        base = data(rng.randrange(3, 9), start)
        return WithIds(base, [f"{start + k}" for k in range(len(base))]) if tagged else base
    inner = nested(rng, depth - 1, tagged)
    if len(inner) < 2:
        return inner
    kind = rng.randrange(4)
    if kind == 0:
        return Subset(inner, rng.sample(range(len(inner)), rng.randrange(1, len(inner))))
    if kind == 1:
        return Subset(inner, rng.sample(range(-len(inner), 0), len(inner)))
    if kind == 2:
        return random_split(inner, [0.5, 0.5], torch.Generator().manual_seed(rng.randrange(99)))[rng.randrange(2)]
    return ConcatDataset([inner, nested(rng, depth - 1, tagged)])


@pytest.mark.parametrize("tagged", [True, False])
def test_a_manifest_keeps_what_was_scored_under_the_kept_ids_through_every_nesting(tagged, tmp_path):
    rng, refused, right = random.Random(tagged), 0, 0
    for number in range(150):
        dataset = nested(rng, number % 4, tagged)
        if not len(dataset):
            continue
        try:
            trained = dataset if tagged else WithIds(dataset)
        except MimicError as error:
            assert "subsets of several data sets" in str(error)  # noqa: PT017
            refused += 1
            continue
        rows = scored(trained)
        assert list(sample_ids(trained)) == [each for _, each in rows]
        kept = {each for _, each in rows if rng.random() < 0.5} or {rows[0][1]}
        manifest = keep(tmp_path, [each for _, each in rows], kept)
        # The data set that was trained on, and the same without ids.
        for given in {trained, dataset}:
            subset = kept_subset(given, manifest)
            expected = [value for value, each in rows if each in kept]
            assert [content(subset, row) for row in range(len(subset))] == expected
        if tagged:
            shuffled = Subset(dataset, rng.sample(range(len(dataset)), len(dataset)))
            subset = kept_subset(shuffled, manifest)
            assert sorted(content(subset, row) for row in range(len(subset))) == sorted(expected)
        right += 1
    assert right > 80
    assert tagged or refused


def test_a_sample_keeps_its_id_whatever_subset_it_is_in(tmp_path):
    whole = data(10)
    first, second = random_split(whole, [0.5, 0.5], torch.Generator().manual_seed(0))
    ids = [*sample_ids(WithIds(first)), *sample_ids(WithIds(second))]
    assert sorted(ids) == list(range(10))
    assert sample_ids(WithIds(Subset(whole, [7, 3]))) == sample_ids(Subset(WithIds(whole), [7, 3])) == [7, 3]
    assert sample_ids(ConcatDataset([WithIds(first), WithIds(second)])) == ids
    assert row_ids(ConcatDataset([first, second])) == ids
    manifest = keep(tmp_path, ids, {0, 4})
    for given in (whole, ConcatDataset([first, second]), Subset(whole, list(range(9, -1, -1)))):
        assert sorted(content(kept_subset(given, manifest), row) for row in range(2)) == [0, 4]
    # Of fewer samples than the manifest decides on it says so.
    with pytest.raises(MimicError, match="decides on 10 samples and the data set has 5"):
        kept_subset(first, manifest)


def test_ids_are_given_anew_to_samples_that_have_some():
    renamed = WithIds(Subset(WithIds(data(4)), [3, 0]), ["a", "b"])
    assert scored(renamed) == [(3, "a"), (0, "b")]
    assert scored(WithIds(Subset(WithIds(data(4), "wxyz"), [3, 0]))) == [(3, "z"), (0, "w")]


class Stream(IterableDataset):
    def __init__(self, ids):
        self.ids = ids

    def sample_ids(self):
        return self.ids

    def __iter__(self):
        return iter(SampleWithId((torch.zeros(2),), each) for each in self.ids)


class Named(Dataset):
    """A data set of the user's own that knows its ids."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"x": torch.zeros(2), "id": self.ids[row]}

    def sample_ids(self):
        return self.ids


class Unnamed(Named):
    sample_ids = None


TWO = {
    "joined": (
        lambda: ConcatDataset([WithIds(data(3)), WithIds(data(4))]),
        r"samples 0 and 3.*row 0.*part 1.*row 0.*2",
    ),
    "joined subsets": (
        lambda: Subset(ConcatDataset([WithIds(data(3)), Subset(WithIds(data(4)), [2, 3])]), [3, 1, 2]),
        "samples 0 and 2 of the Subset have the same id, 2: row 2 of a T.* in part 2 and row 2 of a T.* in part 1",
    ),
    "joined joined": (
        lambda: ConcatDataset([WithIds(data(2), "ab"), ConcatDataset([WithIds(data(2), "cd"), WithIds(data(1), "b")])]),
        "samples 1 and 4.*'b': row 1 of a TensorDataset in part 1 and row 0 of a TensorDataset in part 2 in part 2",
    ),
    "chained": (lambda: ChainDataset([Stream([1, 2]), Stream([2])]), "samples 1 and 2 of the ChainDataset .*id, 2"),
    "of one's own": (lambda: Named([5, 6, 5]), "samples 0 and 2 of the Named .*row 0 of a Named and row 2 of a Named"),
}


@pytest.mark.parametrize("name", TWO)
def test_an_id_of_two_samples_is_refused_with_both_sources(name, tmp_path):
    make, message = TWO[name]
    with pytest.raises(MimicError, match=message):
        sample_ids(make())
    with pytest.raises(MimicError, match=message):
        check_loader_ids(DataLoader(make(), collate_fn=collate_with_ids))
    with pytest.raises(MimicError, match=message if name != "chained" else "a ChainDataset has no rows"):
        kept_subset(make(), keep(tmp_path, [0], {0}))


def test_one_sample_may_come_several_times():
    whole = WithIds(data(4))
    assert sample_ids(Subset(whole, [1, 1, 3])) == [1, 1, 3]
    assert scored(WithIds(Subset(data(4), [1, 1, 3]))) == [(1, 1), (1, 1), (3, 3)]
    assert sample_ids(ConcatDataset([whole, Subset(whole, [2])])) == [0, 1, 2, 3, 2]
    same = whole.dataset
    assert len(sample_ids(ConcatDataset([WithIds(same), WithIds(Subset(same, [2]))]))) == 5
    loaders = {"a": DataLoader(whole), "b": DataLoader(WithIds(data(4, 9)))}
    check_loader_ids(CombinedLoader(loaders))  # each has ids of its own
    check_loader_ids([torch.zeros(2)])


REFUSED = {
    "with and without": (lambda: ConcatDataset([WithIds(data(3)), data(3)]), "joins a WithIds.*and a TensorDataset"),
    "rows that are not there": (lambda: Subset(WithIds(data(3)), [1, 3]), "the Subset takes row 3 of 3"),
    "several wholes": (lambda: ConcatDataset([Subset(data(3), [0]), data(1)]), "subsets of several data sets"),
    "samples with ids": (lambda: Unnamed([4, 5]), "the samples of the Unnamed carry ids of their own"),
    "a part of those": (lambda: Subset(Unnamed([4, 5]), [1, 0]), "the samples of the Subset carry ids of their own"),
    "no rows": (lambda: iter([1, 2]), "has no rows to choose from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_does_not_choose_where_ids_cannot_be_known(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(MimicError, match=message):
        kept_subset(make(), keep(tmp_path, [0, 1], {0}))


def test_ids_that_repeat_are_found_before_anything_is_trained_or_written(tmp_path):
    joined = ConcatDataset([WithIds(toy_data(8)), WithIds(toy_data(4, seed=1))])
    callback, module = GradMimic(toy(seed=1), "head", ledger=tmp_path / "ledger"), toy()
    before = {name: value.clone() for name, value in parameters_of(module).items()}
    with pytest.raises(MimicError, match=r"samples 0 and 8 of the ConcatDataset have the same id"):
        trainer(callback).fit(module, DataLoader(joined, 4, collate_fn=collate_with_ids))
    assert not (tmp_path / "ledger").exists()
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


class Labelled(NamedTuple):
    x: torch.Tensor
    label: torch.Tensor


def test_rows_of_one_id_must_have_one_label():
    x = torch.arange(8.0).view(4, 2)
    check = RepeatedIds().check
    check(Labelled(x, torch.tensor([0, 1, 2, 3])), ["a", "b", "c", "d"])
    check(Labelled(x[[0, 1, 2, 1]], torch.tensor([0, 1, 2, 1])), torch.tensor([7, 8, 9, 8]))
    nan = torch.tensor([[float("nan"), 1.0]]).expand(2, 2)
    check(Labelled(nan, nan[:, 0]), [3, 3])
    for ids in (["a", "b", "c", "b"], torch.tensor([7, 8, 9, 8])):
        with pytest.raises(MimicError, match=r"^rows 1 and 3 of a batch have the same id, ('b'|8), but 1 and 3 in a "):
            check(Labelled(x, torch.tensor([0, 1, 2, 3])), ids)


def test_rows_of_one_id_that_may_be_changed_at_random_are_said_once():
    x, label = torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 1, 0])
    repeats = RepeatedIds()
    with pytest.warns(
        UserWarning, match=r"^rows 1 and 2 .*'b', but differ in a tensor of shape \(4, 2\)\. This is expected"
    ):
        repeats.check({"x": x, "label": label}, ["a", "b", "b", "d"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeats.check({"x": x, "label": label}, ["a", "b", "b", "d"])


def test_a_sampler_may_draw_a_sample_twice():
    dataset = WithIds(data(4))
    loader = DataLoader(dataset, 8, sampler=RandomSampler(dataset, True, 16), collate_fn=collate_with_ids)
    check_loader_ids(loader)
    repeats = RepeatedIds()
    for batch in loader:
        repeats.check(batch, batch.ids)


def test_an_id_with_two_labels_in_one_epoch_is_refused_although_never_in_one_batch():
    x, repeats = torch.zeros(2, 3), RepeatedIds()
    many = {"a": torch.tensor([0, 1]), "b": torch.tensor([True, False]), "y": torch.tensor([0.5, 0.25])}
    for ids in (["a", "b"], ["b", "a"]):  # drawn twice, floats may be drawn at random
        same = {name: values if ids[0] == "a" else values.flip(0) for name, values in many.items()}
        repeats.remember(same | {"x": x, "y": torch.rand(2)}, ids, 0)
    repeats.compare()
    repeats.remember({"a": torch.tensor([1, 0])}, ["a", "b"], 1)  # another epoch may draw others
    repeats.remember({"x": x}, ["a", "b"], 1)
    repeats.compare()
    repeats.remember({"a": torch.tensor([0])}, torch.tensor([2**40]), 2)
    repeats.remember({"a": torch.tensor([1])}, torch.tensor([2**40]), 2)
    with pytest.raises(
        MimicError, match=rf"^the id {2**40} came twice in epoch 2, with different values in a tensor of sh"
    ):
        repeats.remember({}, ["z"], 3)
    for at in range(RepeatedIds.BATCHES - 1):
        repeats.remember({"a": torch.tensor([0])}, [at], 4)
    with pytest.raises(MimicError, match="the id 7 came twice in epoch 4"):
        repeats.remember({"a": torch.tensor([1])}, [7], 4)


class Bare(Dataset):
    """Samples with ids that only the samples show."""

    def __init__(self, seed):
        self.samples = WithIds(toy_data(6, seed))

    def __len__(self):
        return 6

    def __getitem__(self, row):
        return self.samples[row]


@pytest.mark.slow
def test_data_sets_whose_ids_only_the_run_sees_are_not_mixed(tmp_path):
    joined = DataLoader(ConcatDataset([Bare(0), Bare(1)]), 3, collate_fn=collate_with_ids)
    callback = GradMimic(parameters_of(toy(seed=1)), "head", ledger=tmp_path, diagnose_reference=False)
    with pytest.raises(MimicError, match=r"the id \d came twice in epoch 0, with different values in a tensor"):
        trainer(callback).fit(toy(), joined)
