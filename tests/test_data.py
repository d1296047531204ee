"""Ids stay with their samples, noise is known and its own, and the digits' parts never overlap."""

import copy
import functools
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_mimic.data import AsymmetricNoise, SymmetricNoise, WithIds, collate_with_ids
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.models.backbones import torchvision_backbone
from support.cases import case, for_each

PAIRS = [(torch.full((3,), float(i)), i) for i in range(10)]
DICTS = [{"x": x, "y": y} for x, y in PAIRS]
LABELS = torch.arange(9000) % 10


def tuple_collate(samples):
    return tuple(default_collate(samples))


KINDS = {"list": (PAIRS, default_collate), "tuple": (PAIRS, tuple_collate), "dict": (DICTS, default_collate)}
IDS = {"int": [100 + i for i in range(10)], "str": [f"s{i}" for i in range(10)], "own": None}


def loader(kind="list", ids="int", **options):
    samples, collate = KINDS[kind]
    collate_fn = functools.partial(collate_with_ids, collate_fn=collate)
    return DataLoader(WithIds(samples, IDS[ids]), 4, collate_fn=collate_fn, **options)


def listed(ids):
    return ids if isinstance(ids, list) else ids.tolist()


def plain(batch):
    return [batch["x"], batch["y"]] if isinstance(batch, dict) else list(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", IDS)
def test_ids_belong_to_their_samples_in_a_shuffled_loader(kind, ids):
    seen = []
    for batch in loader(kind, ids, shuffle=True, num_workers=2):
        x, y = plain(batch)
        torch.testing.assert_close(x[:, 0], y.float())
        assert isinstance(batch.ids, list) if ids == "str" else batch.ids.dtype == torch.int64
        assert listed(batch.ids) == [i if ids == "own" else IDS[ids][i] for i in y.tolist()]
        seen += y.tolist()
    assert sorted(seen) == list(range(10))


@for_each("kind", KINDS)
def test_a_batch_is_otherwise_what_it_was(kind):
    samples, collate = KINDS[kind]
    before, batch = collate(samples[:4]), next(iter(loader(kind)))
    assert isinstance(batch, type(before))
    assert len(batch) == len(before) == 2
    torch.testing.assert_close(type(before)(batch), before)
    first, second = batch  # a dict unpacks into its keys
    assert (first, second) == ("x", "y") if kind == "dict" else torch.equal(second, torch.arange(4))


COPIES = {
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "to": lambda batch: batch.to("cpu", non_blocking=True),
    "lightning's transfer": lambda batch: move_data_to_device(batch, torch.device("cpu")),
    "pin_memory": lambda batch: batch.pin_memory(),
    "a loader's pinning": pin_memory,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("ids", ["int", "str"])
def test_copies_transfers_and_pinning_keep_ids_and_type(way, ids, monkeypatch):
    pinned = []  # pinning needs CUDA
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: pinned.append(tensor) or tensor)
    for kind in KINDS:
        pinned.clear()
        changed = COPIES[way](batch := next(iter(loader(kind, ids))))
        with case(kind):
            assert changed is not batch
            if (way, kind) == ("a loader's pinning", "tuple") and isinstance(pin_memory(()), list):
                continue  # torch 2.9 and before makes a plain list of any tuple
            assert type(changed) is type(batch)
            assert listed(changed.ids) == listed(batch.ids) == IDS[ids][:4]
            torch.testing.assert_close(plain(changed), plain(batch))
            assert len(pinned) == (2 if "pin" in way else 0)


def test_transfer_moves_the_tensors_and_leaves_the_ids_on_the_host():
    batch = next(iter(loader("dict"))).to("meta")
    assert [t.device.type for t in (batch["x"], batch["y"], batch.ids)] == ["meta", "meta", "cpu"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([*"aaabbcdefg"], "3 of 10 ids repeat"),
        ([1, 2], "2 ids for 10 samples"),
        ([True, *range(2, 11)], "ids have types bool, int; expected all int or all str"),
        ([2**64, *range(9)], "WithIds: the id 18446744073709551616 is out of range"),
        ([2**63, *range(-1, 8)], "WithIds: the ids -1 and 9223372036854775808 do not go together"),
    ],
)
def test_ids_that_repeat_are_missing_or_of_two_types_are_refused(ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WithIds(PAIRS, ids)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(PAIRS)


@pytest.mark.parametrize("dataset", [Stream(), iter(PAIRS)])
def test_a_dataset_without_indices_is_refused_with_the_way_out(dataset):
    with pytest.raises(TypeError, match=f"map-style dataset, but {type(dataset).__name__} has no indices.*`id_from=`"):
        WithIds(dataset)


def test_a_forgotten_collate_function_is_noticed():
    with pytest.raises(TypeError, match="SampleWithId"):
        next(iter(DataLoader(WithIds(PAIRS), 2)))


@for_each(("rate", "wrong"), [(0, 0), (0.1, 900), (0.33333, 2999), (0.4, 3600), (1, 9000)])
def test_symmetric_noise_corrupts_exactly_its_share_and_knows_where(rate, wrong):
    noisy, mask = SymmetricNoise(rate, seed=3)(LABELS, 10)
    assert int(mask.sum()) == wrong
    assert torch.equal(mask, noisy != LABELS)
    assert noisy.dtype == torch.int64
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < 10


def test_symmetric_noise_takes_every_other_class_equally_often():
    noisy, _ = SymmetricNoise(1.0, seed=0)(LABELS, 10)
    taken = torch.zeros(10, 10).index_put_((LABELS, noisy), torch.tensor(1.0), accumulate=True)
    expected = 100 * (1 - torch.eye(10))
    torch.testing.assert_close(taken, expected, rtol=0, atol=45)  # 4.8 standard deviations
    torch.testing.assert_close(taken.diagonal(), torch.zeros(10), rtol=0, atol=0)


@pytest.mark.parametrize("noise", [SymmetricNoise, AsymmetricNoise])
def test_noise_depends_on_its_seed_alone_and_touches_neither_labels_nor_the_global_generator(noise):
    labels, state = LABELS.clone(), torch.random.get_rng_state()
    first = noise(0.3, seed=1)(labels, 10)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(labels, LABELS)
    torch.rand(7)
    torch.testing.assert_close(noise(0.3, seed=1)(labels, 10), first)
    assert not torch.equal(noise(0.3, seed=2)(labels, 10)[1], first[1])


@for_each("rate", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_rate_that_is_no_share_is_refused(rate):
    message = re.escape(f"`rate` is {rate}; expected the share of wrong labels")
    for noise in (SymmetricNoise, AsymmetricNoise):
        with case(noise), pytest.raises(ValueError, match=message):
            noise(rate)


@for_each("rate", [0, 0.25, 1])
def test_asymmetric_noise_confuses_the_listed_classes_and_no_others(rate):
    noisy, mask = AsymmetricNoise(rate, {7: 1, 1: 2})(LABELS, 10)  # what became a 1 stays a 1
    assert torch.equal(mask, noisy != LABELS)
    for source, taken_for in {7: 1, 1: 2}.items():
        assert noisy[mask & LABELS.eq(source)].tolist() == [taken_for] * int(rate * 900)
    assert int(mask.sum()) == 2 * int(rate * 900)


def test_asymmetric_noise_without_a_list_goes_round_through_all_classes():
    noisy, _ = AsymmetricNoise(1.0)(LABELS, 10)
    assert torch.equal(noisy, (LABELS + 1) % 10)


def test_bad_confusions_are_named_and_refused():
    with pytest.raises(ValueError, match=re.escape("{1: 2, 3: 3} confuses a class with itself")):
        AsymmetricNoise(0.1, {1: 2, 3: 3})
    for source, taken_for in [(1, 10), (-1, 2), (12, 0)]:
        with pytest.raises(ValueError, match=re.escape(f"{source}: {taken_for} is outside the 10 classes")):
            AsymmetricNoise(0.1, {source: taken_for})(LABELS, 10)


def digits(train="noisy", rate=0.4, seed=0, **options):
    module = DigitsDataModule(train, SymmetricNoise(rate, seed=5), seed=seed, **options)
    module.setup()
    return module


def read(batches):
    """Ids, labels and images of a loader, joined."""
    rows = [(batch.ids, batch[1], batch[0]) for batch in batches]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def test_the_digits_parts_are_disjoint_and_together_all():
    names = ("trusted", "trusted_fit", "trusted_held", "noisy")
    parts = {name: read(digits(name).train_dataloader())[0] for name in names}
    parts |= {"val": read(digits().val_dataloader())[0], "test": read(digits().test_dataloader())[0]}
    sizes = {"trusted": 200, "trusted_fit": 150, "trusted_held": 50, "noisy": 1097, "val": 50, "test": 500}
    assert {name: len(part) for name, part in parts.items()} == sizes
    ids = {name: set(part.tolist()) for name, part in parts.items()}
    assert ids["test"] | ids["trusted"] | ids["noisy"] == set(range(1797))
    assert ids["trusted_fit"] | ids["val"] == ids["trusted"]
    assert ids["trusted_held"] == ids["val"]


def test_the_digits_ids_are_rows_and_only_noisy_labels_are_corrupted():
    source = load_digits()
    images, labels = torch.tensor(source.images).float().unsqueeze(1) / 16, torch.tensor(source.target)
    module = digits()
    clean = [digits("trusted").train_dataloader(), digits("trusted_fit").train_dataloader()]
    for batches in [*clean, module.val_dataloader(), module.test_dataloader()]:
        ids, given, shown = read(batches)
        torch.testing.assert_close(shown, images[ids])
        assert torch.equal(given, labels[ids])
    ids, given, shown = read(module.train_dataloader())
    torch.testing.assert_close(shown, images[ids])
    torch.testing.assert_close(module.images(ids), images[ids])
    assert torch.equal(module.true_labels, labels[module.noisy_ids])
    assert torch.equal(module.wrong, module.given_labels != module.true_labels)
    assert int(module.wrong.sum()) == 438
    assert set(ids[given != labels[ids]].tolist()) == set(module.noisy_ids[module.wrong].tolist())


def test_the_digits_order_depends_on_the_seed_and_their_split_on_its_own():
    first, again, order, split = (
        read(digits(seed=seed, split_seed=split).train_dataloader())[0].tolist()
        for seed, split in ((1, 5), (1, 5), (2, 5), (1, 6))
    )
    assert first == again != order
    assert set(first) == set(order) != set(split)


@for_each(("rate", "wrong"), [(0, 0), (0.4, 20), (1, 50)])
def test_the_trusted_images_that_are_held_out_are_corrupted_by_the_noise_alone(rate, wrong):
    labels = torch.tensor(load_digits().target)
    module = digits("trusted_held", rate=rate)
    ids, given, shown = read(module.train_dataloader())
    assert int((given != labels[ids]).sum()) == wrong
    assert torch.equal(shown, module.images(ids))
    others, again, _ = read(digits("trusted_held", rate=rate, batch_size=7).train_dataloader())
    assert set(zip(others.tolist(), again.tolist(), strict=True)) == set(zip(ids.tolist(), given.tolist(), strict=True))
    val_ids, val_labels, _ = read(module.val_dataloader())
    assert torch.equal(val_labels, labels[val_ids])


def manifest(folder, ids, keep):
    pq.write_table(pa.table({"id": ids, "keep": keep}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def test_the_digits_that_a_manifest_keeps_train_with_their_labels_and_no_others(tmp_path):
    whole = digits()
    ids = whole.noisy_ids.tolist()
    given = dict(zip(ids, whole.given_labels.tolist(), strict=True))
    backwards = sorted(ids, reverse=True)
    path = manifest(tmp_path, backwards, [each % 3 == 0 for each in backwards])
    for named in (path, str(path)):
        module = digits(keep=named)
        shown, labels, images = read(module.train_dataloader())
        assert sorted(shown.tolist()) == sorted(each for each in ids if each % 3 == 0)
        assert labels.tolist() == [given[each] for each in shown.tolist()]
        torch.testing.assert_close(images, whole.images(shown))
    for name in ("val_dataloader", "test_dataloader"):
        assert torch.equal(read(getattr(module, name)())[0], read(getattr(whole, name)())[0])


def test_a_manifest_for_other_digits_or_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`keep` selects among the noisy images, but `train` is 'trusted_held'"):
        digits("trusted_held", keep="curated/manifest.parquet")
    ids = digits(split_seed=1).noisy_ids.tolist()
    with pytest.raises(ValueError, match="decides on 1097 samples and the data set has 1097"):
        digits(keep=manifest(tmp_path, ids, [True] * 1097)).train_dataloader()
    with pytest.raises(ValueError, match="keeps none of its 1097 samples"):
        digits(keep=manifest(tmp_path, digits().noisy_ids.tolist(), [False] * 1097)).train_dataloader()


def test_an_unknown_part_is_refused_with_the_known():
    known = "'trusted', 'trusted_fit', 'trusted_held', 'noisy'"
    with pytest.raises(ValueError, match=f"`train` is 'nosy'; expected one of {known}"):
        DigitsDataModule("nosy")


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_a_torchvision_backbone_gives_features(name, width):
    assert torchvision_backbone(name).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, width)


def test_an_unknown_or_unfit_backbone_is_refused():
    with pytest.raises(ValueError, match="torchvision has no classification model 'resnet81'; nearest: 'resnet18'"):
        torchvision_backbone("resnet81")
    with pytest.raises(ValueError, match="'squeezenet1_0' ends in a AdaptiveAvgPool2d; expected a linear layer"):
        torchvision_backbone("squeezenet1_0")


def test_ids_from_arrays_are_plain(tmp_path):
    pairs = [(torch.zeros(2), 0)] * 3
    assert WithIds(pairs, np.arange(3)).ids == [0, 1, 2]
    assert WithIds(pairs, np.array(["a", "b", "c"])).ids == ["a", "b", "c"]
    assert [type(i) for i in WithIds(pairs, torch.arange(3)).ids] == [int] * 3
    with pytest.raises(ValueError, match="2 of 3 ids repeat"):
        WithIds(pairs, torch.ones(3))
