"""Fits beside an unrelated reference: when it is asked, what it leaves alone, when it is of no use."""

import copy

import pytest
import torch
from torch import nn

from lightning_mimic import Aligned, GradMimic, Ledger
from lightning_mimic.reference.aligned_layer import AlignedLayer
from support.aligned_heads import CLOSE, WARM, Drops, fit, scores_of, unrelated
from support.toys import CLASSES, FEATURES, HIDDEN, loader, parameters_of, toy, toy_data, trainer

pytestmark = pytest.mark.slow  # fits and processes


def sentences(warned):
    return [text for text in (str(warning.message) for warning in warned) if "treespec" not in text]


@pytest.mark.parametrize("given", ["state dict", "path"])
def test_weights_of_the_modules_own_architecture_serve_as_well(given, tmp_path):
    state = unrelated("toy").state_dict()
    torch.save({"state_dict": state}, tmp_path / "reference.pt")
    sources = [unrelated("toy"), state if given == "state dict" else tmp_path / "reference.pt"]
    modules = [toy(), toy()]
    for module, source in zip(modules, sources, strict=True):
        trainer(GradMimic(Aligned(source), "head"), epochs=2).fit(module, loader(toy_data(42)))
    torch.testing.assert_close(parameters_of(modules[1]), parameters_of(modules[0]), rtol=0, atol=0)


def in_another_basis(twin, copies):
    """The same function: hidden units in another order, some of them negated, each split into ``copies``."""
    width, generator = HIDDEN * copies, torch.Generator().manual_seed(copies)
    order = torch.randperm(width, generator=generator) % HIDDEN
    signs = (2 * torch.randint(0, 2, (width,), generator=generator) - 1).double()
    other = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()
    with torch.no_grad():
        other[0].weight.copy_(signs[:, None] * twin.body.weight[order])
        other[0].bias.copy_(signs * twin.body.bias[order])
        other[2].weight.copy_(twin.head.weight[:, order] * signs / copies)
        other[2].bias.copy_(twin.head.bias)
    return other


@pytest.mark.parametrize("penalty", [1e-12, Aligned.penalty])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_basis_of_a_reference_does_not_matter(copies, penalty, tmp_path):
    aligned = type("Penalised", (Aligned,), {"penalty": penalty})
    data, module = toy_data(200), toy()
    module.lr = 0.0  # the model's features are those of its twin, and stay so
    twin = copy.deepcopy(module)
    twin.head.load_state_dict(toy(seed=1).head.state_dict())
    for name, reference in {
        "weights": parameters_of(twin),
        "twin": aligned(twin),
        "unrelated": aligned(in_another_basis(twin, copies)),
    }.items():
        mimic = GradMimic(reference, "head", ledger=tmp_path / name, diagnose_reference=False)  # it knows nothing
        trainer(mimic, epochs=2).fit(module, loader(data, 20))
    plain, own, foreign = (scores_of(tmp_path / name)[200:] for name in ("weights", "twin", "unrelated"))
    torch.testing.assert_close(foreign, own, **CLOSE)
    # Without a penalty these are the scores by weights; with it they differ by a few hundredths of their spread.
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-5 if penalty < 1e-9 else 0.1 * float(plain.std()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the reference is")  # unrelated, by its weights
def test_wrong_labels_are_found_where_the_weights_of_an_unrelated_reference_mislead(tmp_path):
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(CLASSES, FEATURES, generator=generator).double()
    labels = torch.randint(0, CLASSES, (480,), generator=generator)
    x = centres[labels] + torch.randn(480, FEATURES, generator=generator).double()
    wrong = torch.arange(240) % 5 < 2
    given = torch.where(wrong, (labels[:240] + 1) % CLASSES, labels[:240])
    reference = toy(seed=1)
    trainer(epochs=10).fit(reference, loader(torch.utils.data.TensorDataset(x[240:], labels[240:]), 8))
    found = {}
    for name, source in {"aligned": Aligned(reference), "weights": parameters_of(reference)}.items():
        module, data = toy(seed=2), torch.utils.data.TensorDataset(x[:240], given)
        trainer(GradMimic(source, "head", ledger=tmp_path / name), epochs=4).fit(module, loader(data, 8))
        scores = scores_of(tmp_path / name)[-240:]
        found[name] = float((scores[~wrong, None] > scores[wrong]).double().mean())
    assert found["aligned"] > 0.95
    assert found["weights"] < 0.75


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_reference_is_asked_on_refit_steps_only_and_left_as_it_is(every, cache):
    asked, module, reference = [], toy(), unrelated("moody").train()
    before = copy.deepcopy(reference.state_dict())

    def inputs(batch):
        assert torch.is_inference_mode_enabled()
        asked.append(batch.ids.tolist())
        return batch[0]

    fit(module, Aligned(reference, inputs, every, cache=cache))
    expected, known = [], set()
    for step in range(22):
        ids = list(range(42))[step % 11 * 4 :][:4]
        if (step < WARM or step % every == 0) and not (cache and known.issuperset(ids)):
            expected.append(ids)
            known.update(ids)
    assert asked == expected
    torch.testing.assert_close(reference.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in reference.parameters())
    assert all(part.training for part in reference.modules())
    for part in [*reference.modules(), *module.modules()]:
        assert [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks] == [{}, {}, {}]


@pytest.mark.parametrize("ids", [None, [f"img-{k}" for k in range(42)]])
def test_the_cache_changes_nothing_when_batches_are_mixed_anew(ids):
    found = []
    for cache in (False, True):
        order = torch.Generator().manual_seed(3)
        batches = loader(toy_data(42), ids=ids, shuffle=True, generator=order)
        found.append(fit(toy(), Aligned(unrelated("moody"), every=2, cache=cache), batches, epochs=3))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_only_scoring_leaves_training_bit_identical(tmp_path):
    plain, scored, batches = toy(Drops), toy(Drops), loader(toy_data(42), shuffle=True)
    torch.manual_seed(0)
    trainer(epochs=2).fit(plain, batches)
    torch.manual_seed(0)
    fit(scored, Aligned(unrelated("moody"), every=3), batches, reweight="none", ledger=tmp_path / "s")
    torch.testing.assert_close(parameters_of(scored), parameters_of(plain), rtol=0, atol=0)
    assert int(scores_of(tmp_path / "s").isfinite().sum()) == 84 - 28


def test_too_few_samples_leave_training_plain_and_are_said(tmp_path):
    plain = toy()
    trainer(epochs=1).fit(plain, loader(toy_data(28)))
    with pytest.warns(UserWarning, match="never aligned") as said:
        ours = fit(toy(), Aligned(unrelated()), loader(toy_data(28)), epochs=1, ledger=tmp_path / "s")
    assert sentences(said) == [
        "the reference was never aligned, so all weights were uniform: 28 samples of the 32 that it takes were seen. "
        "Train longer, or name a narrower layer."
    ]
    torch.testing.assert_close(ours, parameters_of(plain), rtol=1e-12, atol=1e-12)
    rows = Ledger(tmp_path / "s").table().to_pylist()
    assert {(row["flag"], row["score"], row["weight"]) for row in rows} == {("zero_direction", None, 0.25)}


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_features_leave_training_plain_and_are_said(value):
    plain, ours = toy(), toy()
    for module in (plain, ours):
        nn.init.zeros_(module.body.weight).requires_grad_(False)
        nn.init.constant_(module.body.bias, value).requires_grad_(False)
    trainer(epochs=2).fit(plain, loader(toy_data(42), 6))
    with pytest.warns(UserWarning, match="could not be aligned") as said:
        fit(ours, Aligned(unrelated(), every=5), loader(toy_data(42), 6))
    assert sentences(said) == [
        "2 times the reference could not be aligned (constant or infinite features); the last alignment that worked "
        "was kept, and weights were uniform before the first."
    ]
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-12, atol=1e-12)


def test_an_alignment_that_fails_leaves_the_last_one_that_worked():
    module = toy()
    targets = dict(module.head.named_parameters(prefix="head"))
    direction = AlignedLayer(Aligned(unrelated(), every=1), module, targets)
    x = toy_data(40).tensors[0]
    assert bool(direction.vanishes(torch.tensor(1.0)))
    direction.observe((x,), None, lambda: {"head.weight": torch.tanh(module.body(x))})
    before = dict(direction)
    assert not bool(direction.vanishes(direction.norm()))
    direction.observe(
        (x,), None, lambda: {"head.weight": 1e200 * torch.tanh(module.body(x))}
    )  # its square is no float64
    torch.testing.assert_close(dict(direction), before, rtol=0, atol=0)
    assert int(direction.failed) == 1
    assert not bool(direction.vanishes(direction.norm()))


def test_one_callback_serves_two_fits():
    callback, modules = GradMimic(Aligned(unrelated(), every=3), "head"), [toy(), toy()]
    for module in modules:
        trainer(callback).fit(module, loader(toy_data(42)))
    torch.testing.assert_close(parameters_of(modules[1]), parameters_of(modules[0]), rtol=0, atol=0)


def test_a_development_run_aligns_and_leaves_no_ledger(tmp_path):
    fit(toy(), Aligned(unrelated()), loader(toy_data(64), 32), options={"fast_dev_run": 2}, ledger=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_mixed_precision_scores_like_full_precision(tmp_path):
    data, aligned = toy_data(80, dtype=torch.float32), Aligned(unrelated(dtype=torch.float32))
    for precision in ("32-true", "bf16-mixed"):
        module = toy(dtype=torch.float32)
        fit(module, aligned, loader(data), options={"precision": precision}, ledger=tmp_path / precision)
        assert all(p.isfinite().all() for p in module.parameters())
    full, mixed = (scores_of(tmp_path / precision) for precision in ("32-true", "bf16-mixed"))
    torch.testing.assert_close(mixed, full, rtol=0, atol=0.02, equal_nan=True)
    assert float(full[28:].std()) > 0.2
