"""Batches of every kind: their samples are counted, NaN are blanked in a copy, and ids stay with the samples."""

import copy
import functools
import itertools
import pickle
import re

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_mimic import (
    AtCheckpoints,
    GradMimic,
    Ledger,
    MimicError,
    Reweighter,
    WithIds,
    collate_with_ids,
    diagnose,
)
from lightning_mimic.batches import sample_count, tensors_of, to_device
from lightning_mimic.reference.diagnose import exchange_labels
from lightning_mimic.reweighting.batch import blank_nan_samples, sample_ids
from support.batch_kinds import (
    COLLATE,
    FEATURES,
    Encoding,
    FromAny,
    Graphs,
    Pair,
    Slots,
    inputs_of,
)
from support.cases import case, for_each
from support.toys import Toy, parameters_of, toy, toy_data, trainer

SAMPLES = [(torch.full((FEATURES,), float(i)), i) for i in range(8)]
IDS = [f"s{i}" for i in range(8)]
#: Those that take attributes; a class with slots does not.
CARRYING = {name: collate for name, collate in COLLATE.items() if name != "slots"}
#: Lightning moves no frozen dataclass.
FITTING = {name: collate for name, collate in CARRYING.items() if name != "frozen"}


def batch_of(kind, count=4):
    return COLLATE[kind](SAMPLES[:count])


def carrying(kind, ids=IDS, **options):
    collate = functools.partial(collate_with_ids, collate_fn=COLLATE[kind])
    return DataLoader(WithIds(SAMPLES, ids), 4, collate_fn=collate, **options)


def ids_of(batch):
    return sample_ids(batch, None, needed=True)


def values_of(batch):
    """All tensors, and those of a joined graph, too."""
    store = batch.store.values() if isinstance(batch, Graphs) else ()
    return [t.clone() for t in tensors_of([batch, *store])]


# Reading, counting, blanking


@for_each("kind", COLLATE)
def test_the_samples_of_a_batch_are_counted(kind):
    assert sample_count(batch_of(kind)) == 4


def test_samples_are_not_counted_where_sizes_differ_or_there_are_none():
    assert sample_count((torch.zeros(4), torch.zeros(3))) is None
    assert sample_count({"names": ["a", "b"]}) is None
    assert sample_count((batch_of("graphs"), torch.zeros(4))) == 4
    assert sample_count((batch_of("graphs"), torch.zeros(3))) is None


@for_each("kind", COLLATE)
def test_reading_a_batch_neither_copies_nor_changes_it(kind, monkeypatch):
    batch = batch_of(kind)
    before = values_of(batch)
    with monkeypatch.context() as patched:
        for name in ("copy", "deepcopy"):
            patched.setattr(copy, name, lambda *_: pytest.fail("copied"))
        found = list(tensors_of(batch))
        sample_count(batch)
        sample_ids(batch, None, needed=False, wanted=True)
    assert len(found) == {"tensor": 1, "nested": 3, "derived": 3, "graphs": 0}.get(kind, 2)
    torch.testing.assert_close(values_of(batch), before)


@for_each(
    ("kind", "ids"),
    [(kind, ids) for ids in (False, True) for kind in CARRYING if kind != "graphs"] + [("slots", False)],
)
def test_a_sample_that_holds_nan_is_blanked_in_a_copy_of_the_batch_s_own_type(kind, ids):
    batch = next(iter(carrying(kind))) if ids else batch_of(kind)
    x = inputs_of(batch)
    x[1, 0] = torch.nan
    before = values_of(batch)
    copied, clean = blank_nan_samples(batch, 4)
    assert clean.tolist() == [True, False, True, True]
    assert type(copied) is type(batch) or (ids and kind == "tensor")
    assert not ids or ids_of(copied) == ids_of(batch) == IDS[:4]
    assert copied is not batch
    torch.testing.assert_close(values_of(batch), before, equal_nan=True)
    assert inputs_of(batch) is x
    expected = torch.arange(4.0).unsqueeze(1).expand(4, FEATURES).clone()
    expected[1] = 0
    torch.testing.assert_close(inputs_of(copied), expected)
    others = [t for t in tensors_of(copied) if not t.is_floating_point()]
    assert all(t.tolist() == [0, 1, 2, 3] for t in others)


def test_what_a_dataclass_computed_from_its_fields_is_computed_anew_for_the_copy():
    batch = batch_of("dataclass")
    batch.x[2] = torch.nan
    assert torch.isnan(batch.doubled).any()
    copied, _ = blank_nan_samples(batch, 4)
    assert not torch.isnan(copied.doubled).any()
    assert copied.names is batch.names
    derived = batch_of("derived")
    derived.total[0] = torch.nan
    copied, _ = blank_nan_samples(derived, 4)
    torch.testing.assert_close(copied.total, torch.tensor([0.0, 3.0, 6.0, 9.0]))


def test_collections_that_hold_no_rows_are_not_copied():
    names, other = ["a"], {"scale": torch.ones(())}
    batch = {"x": torch.tensor([[torch.nan], [1.0]]), "names": names, "other": other}
    copied, _ = blank_nan_samples(batch, 2)
    assert copied["names"] is names
    assert copied["other"] is other


def test_an_image_stays_an_image_when_it_is_blanked():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    mask = tv_tensors.Mask(torch.tensor([[[torch.nan]], [[1.0]]]))
    copied, _ = blank_nan_samples({"mask": mask}, 2)
    assert type(copied["mask"]) is tv_tensors.Mask
    assert copied["mask"].flatten().tolist() == [0.0, 1.0]
    assert torch.isnan(mask).any()


def test_joined_graphs_are_not_blanked_because_rows_are_no_samples():
    batch = Graphs(x=torch.tensor([[torch.nan], [1.0]]), ptr=torch.tensor([0, 1, 2]))
    assert blank_nan_samples(batch, 2) == (batch, None)


@for_each("kind", COLLATE)
def test_a_transfer_keeps_the_type_and_the_original_but_for_what_moves_itself(kind):
    batch = batch_of(kind)
    before = [t.device.type for t in values_of(batch)]
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert {t.device.type for t in values_of(moved)} == {"meta"}
    if kind not in ("encoding", "graphs"):  # their `to` changes them
        assert [t.device.type for t in values_of(batch)] == before


def test_exchanged_labels_keep_the_batch_s_type():
    for batch in (batch_of("list"), batch_of("tuple"), batch_of("named tuple"), next(iter(carrying("tuple")))):
        changed, _ = exchange_labels(batch)
        assert type(changed) is type(batch)
        assert changed[1].tolist() == [3, 0, 1, 2]
        assert batch[1].tolist() == [0, 1, 2, 3]


@for_each("kind", COLLATE)
def test_a_reference_is_diagnosed_on_batches_of_any_kind(kind):
    module, reference = FromAny(), FromAny()
    read = diagnose(module, parameters_of(reference), [batch_of(kind)] * 3, samples=5)
    assert read.samples == 8


# Ids


def test_ids_reach_a_loader_s_consumer_from_its_workers_in_batches_of_every_kind():
    kinds = list(CARRYING)
    samples = SAMPLES[:2] * len(kinds)
    turn = {f"{i}": kinds[i // 2] for i in range(len(samples))}

    def collate(given):
        return collate_with_ids(given, collate_fn=COLLATE[turn[given[0].id]])

    batches = DataLoader(
        WithIds(samples, list(turn)), 2, num_workers=1, persistent_workers=True, collate_fn=collate, timeout=60
    )
    for _ in range(2):
        for k, (kind, batch) in enumerate(zip(kinds, batches, strict=True)):
            with case(kind):
                assert ids_of(batch) == [str(2 * k), str(2 * k + 1)]
                assert isinstance(batch, type(batch_of(kind)))
                torch.testing.assert_close(values_of(batch), values_of(batch_of(kind, 2)))


COPIES = {
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "a transfer": lambda batch: move_data_to_device(batch, torch.device("cpu")),
    "a transfer to another device": lambda batch: move_data_to_device(batch, torch.device("meta")),
    "a plain loop's transfer": lambda batch: to_device(batch, torch.device("meta")),
    "a loader's pinning": pin_memory,
    "blanking": lambda batch: blank_nan_samples(batch, 4)[0],
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_keep_type_ids_and_values(way, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: tensor)  # needs CUDA
    for kind, ids in itertools.product(CARRYING, (IDS, None)):
        batch = next(iter(carrying(kind, ids)))
        if kind == "frozen" and "transfer" in way and "loop" not in way:
            continue
        if way == "a loader's pinning" and "tuple" in kind and isinstance(pin_memory(()), list):
            continue  # torch 2.9 and before makes a new tuple or list
        before = values_of(batch)
        changed = COPIES[way](batch)
        with case(kind):
            assert isinstance(changed, type(batch_of(kind)))
            found = ids_of(changed)
            assert found == IDS[:4] if ids else found.tolist() == [0, 1, 2, 3]
            if "device" not in way and "loop" not in way:
                torch.testing.assert_close(values_of(changed), before)


def test_a_dict_keeps_its_order_and_a_defaultdict_its_factory():
    ordered = next(iter(carrying("OrderedDict")))
    assert list(ordered) == ["x", "y"]
    ordered.move_to_end("x")
    assert list(copy.copy(ordered)) == ["y", "x"]
    for each in (next(iter(carrying("defaultdict"))), copy.deepcopy(next(iter(carrying("defaultdict"))))):
        assert each["more"] == []


def test_a_batch_that_is_a_tensor_is_still_one_and_operations_on_it_are_plain():
    batch = next(iter(carrying("tensor")))
    assert isinstance(batch, torch.Tensor)
    assert type(batch + 1) is type(batch.double()) is type(batch[:2]) is type(torch.stack([batch])) is torch.Tensor
    layer = torch.nn.Linear(FEATURES, 1)
    layer(batch).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((1, FEATURES), 6.0))
    assert batch.to(torch.float64).ids == IDS[:4]
    assert batch.to(dtype=torch.float16).dtype == torch.float16
    assert "s0" not in repr(batch)


def test_a_field_or_key_named_id_serves_as_ids():
    named = torch.tensor([5, 6])
    for batch in (Encoding({"x": torch.zeros(2, 1), "id": named}), Graphs(id=named, ptr=torch.arange(3))):
        assert ids_of(batch).tolist() == [5, 6]
    row = Untied(torch.zeros(2), named)
    assert ids_of(row).tolist() == [5, 6]
    assert ids_of({"x": torch.zeros(2), "id": named.numpy()}) == [5, 6]


def test_ids_give_the_number_of_samples_where_sizes_differ():
    module = FromAny()
    words = torch.zeros(7)
    batches = [
        {"x": batch_of("tensor"), "words": words, "id": IDS[:4]},
        {"first": words, "x": batch_of("tensor"), "labelled": next(iter(carrying("dict")))},
    ]
    with Reweighter(module, parameters_of(FromAny()), "head", diagnose_reference=False) as reweighter:
        for batch in batches:
            with reweighter.step(batch) as step:
                assert len(step.backward(module.sample_losses(step.batch).mean()).scores) == 4


class Untied(Pair):
    """A named tuple with an attribute `id`."""

    @property
    def id(self):
        return self.y


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "32-true"])
def test_ids_survive_the_precision_of_a_fit(precision, tmp_path):
    for kind in FITTING:
        with case(kind):
            reference = parameters_of(FromAny())
            callback = GradMimic(reference, "head", ledger=tmp_path / kind, diagnose_reference=False)
            fit = trainer(callback, precision=precision, limit_train_batches=1)
            fit.fit(FromAny(), carrying(kind))
            assert Ledger(tmp_path / kind).table()["id"].to_pylist() == IDS[:4]
            assert "convert_input" not in vars(fit.precision_plugin)


def test_a_plain_loop_takes_ids_with_a_batch_of_any_kind(tmp_path):
    for kind in COLLATE:
        with case(kind):
            module = FromAny()
            reference = parameters_of(FromAny())
            with Reweighter(
                module, reference, "head", ledger=tmp_path / kind, diagnose_reference=False, reweight="none"
            ) as reweighter:
                with reweighter.step(batch_of(kind), ids=IDS[:4]) as step:
                    step.backward(module.sample_losses(step.batch).mean())
                with pytest.raises(MimicError, match="`ids` holds 3 ids for 4 samples"):
                    reweighter.step(batch_of(kind), ids=IDS[:3]).__enter__()
                if kind in CARRYING:
                    with reweighter.step(list(carrying(kind))[1]) as step:
                        step.backward(module.sample_losses(step.batch).mean())
            expected = IDS if kind in CARRYING else IDS[:4]
            assert Ledger(tmp_path / kind).table()["id"].to_pylist() == expected


def test_scores_do_not_depend_on_the_kind_of_batch():
    module, reference = FromAny(), parameters_of(FromAny())
    scores = {}
    for kind in COLLATE:
        engine = Reweighter(module, reference, "head", diagnose_reference=False)
        with engine as reweighter, reweighter.step(batch_of(kind)) as step:
            scores[kind] = step.backward(module.sample_losses(step.batch).mean()).scores
    for kind, found in scores.items():
        with case(kind):
            torch.testing.assert_close(found, scores["tuple"])


# Several loaders


class Two(Toy):
    """Trains on one of two loaders' batches."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["labelled"], batch_idx)


def toy_loader(count, ids=None, size=4):
    return DataLoader(WithIds(toy_data(count), ids), size, collate_fn=collate_with_ids)


def scored(module, batches, folder, **options):
    callback = GradMimic(parameters_of(toy(Two, seed=1)), "head", ledger=folder, **options)
    trainer(callback, precision="64-true").fit(toy(module), batches)
    return Ledger(folder).table()["id"].to_pylist()


@for_each("mode", ["max_size_cycle", "min_size", "max_size"])
def test_the_one_loader_that_has_ids_gives_them(mode, tmp_path):
    batches = {"labelled": toy_loader(8), "other": DataLoader(toy_data(6, seed=1), 3)}
    assert scored(Two, CombinedLoader(batches, mode), tmp_path / "s") == [*range(8)]
    swapped = {"other": DataLoader(toy_data(6, seed=1), 3), "labelled": toy_loader(8)}
    assert scored(Two, swapped, tmp_path / "t") == [*range(8)]


def test_ids_of_two_loaders_have_to_be_chosen(tmp_path):
    batches = {"labelled": toy_loader(8), "other": toy_loader(6, list("abcdef"), 3)}
    message = (
        "several parts of the batch have ids: 'labelled', 'other'. .* `id_from=lambda batch: batch['labelled'].ids`"
    )
    with pytest.raises(MimicError, match=re.escape(message).replace(r"\.\*", ".*")):
        scored(Two, batches, tmp_path / "s")
    assert scored(Two, batches, tmp_path / "t", id_from=lambda batch: batch["labelled"].ids) == [*range(8)]


def test_loaders_without_ids_are_refused(tmp_path):
    plain = {"labelled": DataLoader(toy_data(8), 4), "other": DataLoader(toy_data(8), 4)}
    with pytest.raises(MimicError, match="carries no ids"):
        scored(Two, plain, tmp_path / "s")


def test_loaders_in_turn_are_refused_because_they_may_share_ids(tmp_path):
    state = tmp_path / "state.pt"
    torch.save(toy().state_dict(), state)
    callbacks = GradMimic(parameters_of(toy(seed=1)), "head", ledger=tmp_path / "s"), AtCheckpoints([state])
    with pytest.raises(MimicError, match=r"'sequential'.* whose ids may be the same"):
        trainer(*callbacks).fit(toy(), CombinedLoader([toy_loader(8), toy_loader(4)], "sequential"))


# Refusals


@for_each(
    ("collate", "name"),
    [(lambda samples: Slots(*samples), "Slots"), (lambda samples: "text", "str"), (lambda samples: None, "NoneType")],
)
def test_a_batch_that_takes_no_ids_is_refused_with_the_ways_out(collate, name):
    message = f"the batch is a {name}, which cannot carry ids; return a tensor, .* a field `id` .* `id_from=`"
    with pytest.raises(TypeError, match=message):
        collate_with_ids([WithIds(SAMPLES)[0], WithIds(SAMPLES)[1]], collate_fn=collate)


def test_a_tensor_of_a_class_of_its_own_is_refused():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    with pytest.raises(TypeError, match="the batch is a Image, which cannot carry ids"):
        collate_with_ids([WithIds(SAMPLES)[0]], collate_fn=lambda samples: tv_tensors.Image(torch.zeros(1, 3, 2, 2)))


def test_a_batch_with_ids_of_its_own_is_not_overwritten():
    batch = Encoding({"ids": [1, 2]})
    with pytest.raises(MimicError, match="the batch \\(a Encoding\\) has `ids` of its own"):
        collate_with_ids([WithIds(SAMPLES)[0], WithIds(SAMPLES)[1]], collate_fn=lambda samples: batch)
    assert batch["ids"] == [1, 2]


@for_each(
    "change",
    [
        lambda samples: samples.sort(key=lambda sample: -sample[1]),
        lambda samples: samples.clear() or samples.append(SAMPLES[0]),
        lambda samples: samples.reverse(),
    ],
)
def test_a_collation_that_moves_samples_under_their_ids_is_refused(change):
    given = [WithIds(SAMPLES)[i] for i in range(4)]
    with pytest.raises(MimicError, match=r"`collate_fn` sorted or removed samples .* an id into each sample"):
        collate_with_ids(given, collate_fn=lambda samples: change(samples) or COLLATE["tuple"](samples))


def test_a_collation_may_replace_samples_in_their_places():
    def doubled(samples):
        samples[:] = [(2 * x, y) for x, y in samples]
        return COLLATE["tuple"](samples)

    same = [SAMPLES[0]] * 3  # one sample several times has no place of its own
    assert ids_of(collate_with_ids([WithIds(same, [*"abc"])[i] for i in range(3)], collate_fn=doubled)) == [*"abc"]


def test_samples_without_ids_are_refused():
    with pytest.raises(TypeError, match="a sample is a tuple without an id; give the loader WithIds\\(dataset\\)"):
        collate_with_ids(SAMPLES[:2])


# The real ones, where they are installed


def test_encodings_of_transformers_carry_ids(tmp_path):
    transformers = pytest.importorskip("transformers")

    def collate(samples):
        x, y = COLLATE["tuple"](samples)
        return transformers.BatchEncoding({"x": x, "y": y})

    batch = collate_with_ids([WithIds(SAMPLES, IDS)[i] for i in range(4)], collate_fn=collate)
    batch["x"][1] = torch.nan
    for change in COPIES.values():
        changed = change(copy.deepcopy(batch)) if change is not pin_memory else batch
        assert isinstance(changed, transformers.BatchEncoding)
        assert ids_of(changed) == IDS[:4]
        assert set(dict(**changed)) == {"x", "y"}
    assert sample_count(batch) == 4
    assert torch.isnan(batch["x"]).any()


def test_tensor_dicts_carry_ids_and_are_blanked():
    tensordict = pytest.importorskip("tensordict")

    def collate(samples):
        x, y = COLLATE["tuple"](samples)
        return tensordict.TensorDict({"x": x, "y": y}, [len(x)])

    batch = collate_with_ids([WithIds(SAMPLES, IDS)[i] for i in range(4)], collate_fn=collate)
    for change in (copy.copy, copy.deepcopy, COPIES["pickle"], COPIES["a transfer"], COPIES["blanking"]):
        changed = change(batch)
        assert isinstance(changed, tensordict.TensorDict)
        assert ids_of(changed) == IDS[:4]
    batch["x"][1] = torch.nan
    copied, _ = blank_nan_samples(batch, 4)
    assert torch.isnan(batch["x"]).any()
    assert not torch.isnan(copied["x"]).any()
    named = tensordict.TensorDict({"x": torch.zeros(2), "id": torch.tensor([5, 6])}, [2])
    assert ids_of(named).tolist() == [5, 6]


@pytest.mark.filterwarnings("ignore")
def test_graphs_of_pytorch_geometric_carry_ids():
    data = pytest.importorskip("torch_geometric.data")
    loaders = pytest.importorskip("torch_geometric.loader")
    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [data.Data(x=torch.ones(2 + i, 1), edge_index=edges, y=torch.tensor([i])) for i in range(4)]
    collate = functools.partial(collate_with_ids, collate_fn=data.Batch.from_data_list)
    for num_workers in (0, 1):
        for batch in DataLoader(WithIds(graphs, IDS[:4]), 4, collate_fn=collate, num_workers=num_workers):
            assert sample_count(batch) == 4
            assert ids_of(batch) == IDS[:4]
            assert "ids" not in batch.keys()  # noqa: SIM118
            for change in (copy.copy, copy.deepcopy, COPIES["pickle"], COPIES["a transfer"]):
                assert ids_of(change(batch)) == IDS[:4]
            assert torch.equal(batch[1].x, graphs[1].x)
    for ids in ([5, 6, 7, 8], IDS[:4]):
        for graph, each in zip(graphs, ids, strict=True):
            graph.id = each
        found = ids_of(next(iter(loaders.DataLoader(graphs, 4))))
        assert ids == (found if isinstance(found, list) else found.tolist())
