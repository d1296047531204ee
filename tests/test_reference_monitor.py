"""A reference looked at while the first 512 samples train: nothing disturbed, said once, and what comes of it."""

import dataclasses
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mimic import Aligned, Diagnosis, GradMimic, Ledger, diagnose
from lightning_mimic.reference.diagnosis import Estimate
from lightning_mimic.scorers import RhoLoss
from support.diagnosed_modules import ByName, Moody, Named, Noisy, estimated, same
from support.hooks_left import untouched
from support.toys import CLASSES, FEATURES, Convolution, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Counted(WithLosses):
    asked = ()  # whoever copies it

    def sample_losses(self, batch):
        type(self).asked += ((self.training, torch.is_grad_enabled(), any(p.requires_grad for p in self.parameters())),)
        return super().sample_losses(batch)


class Wide(WithLosses):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 20), nn.Linear(20, CLASSES)


def task(count=640, seed=0, dtype=torch.float64):
    x = toy_data(count, seed=seed, dtype=dtype).tensors[0]
    return TensorDataset(x, x[:, :CLASSES].argmax(1))


def batches(count=640, size=64, **options):
    return loader(task(count), size, **options)


def trained(net, knows=True, only="", dtype=torch.float64):
    """Taught by other samples, which have the right labels or any."""
    x, y = task(400, seed=5, dtype=dtype).tensors
    y = y if knows else toy_data(400, seed=6).tensors[1]
    optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if name.startswith(only)], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad()
    return net


def reference(name, kind=WithLosses):
    net = toy(Wide if "wide" in name else kind, seed=2 * (name == "unrelated"))
    return trained(net, knows="ignorant" not in name, only="head" if name in ("good", "ignorant") else "")


def still(kind=WithLosses):
    module = toy(kind)
    module.lr = 0.0
    return module


def noted(folder, attempt=0):
    if (facts := Ledger(folder).meta["attempts"][attempt].get("diagnosis")) is None:
        return None
    verdict, findings = facts.pop("verdict"), facts.pop("findings")
    estimates = {name: facts[name] and Estimate(**facts[name]) for name in ("score", "label_gap")}
    found = Diagnosis(**(facts | estimates))
    assert (found.verdict, [reason for _, reason in found.findings]) == (verdict, findings)
    return found


def column(folder, name="score"):
    values = Ledger(folder).table()[name].to_pylist()
    return torch.tensor([float("nan") if value is None else value for value in values]).double()


@pytest.fixture
def logged(monkeypatch):
    found = []  # of verdicts; the calibration at the end of a fit is another matter

    def verdicts(text):
        if text.startswith("the reference is "):
            found.append(text)

    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", verdicts)
    return found


def fit(folder, source, module=None, data=None, parameters="head", epochs=1, options=None, **settings):
    """Fits, and gives back what was warned of."""
    callback = GradMimic(source, parameters, ledger=folder, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, epochs=epochs, **(options or {})).fit(module or still(), data or batches())
    return [text for text in (str(w.message) for w in caught) if "reference" in text]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
@pytest.mark.parametrize("parameters", ["head", "all"])
@pytest.mark.parametrize("kind", [WithLosses, Toy])
def test_a_fit_finds_what_is_found_before_it(kind, parameters, options, tmp_path, logged):
    for name in ("good", "unrelated"):
        source, data = reference(name), batches(size=60)  # 540 samples in nine
        fit(tmp_path / name, source, still(kind), data, parameters, options=options)
        found = noted(tmp_path / name)
        expected = dataclasses.replace(diagnose(still(), source, data, parameters), path_losses={})
        if kind is Toy:
            expected = dataclasses.replace(expected, label_gap=None, loss=None, reference_loss=None)
        assert (found.margin_ratio is None) == (parameters == "all")
        of_outputs = dict.fromkeys(("margin_ratio", "agreement", "model_agreement")) | {"knows_less": False}
        same(dataclasses.replace(found, **of_outputs), expected, **CLOSE)
        same(found.score, estimated(column(tmp_path / name)[:540]), **CLOSE)
        assert (found.samples, found.verdict == "compatible") == (540, name == "good")


@pytest.mark.parametrize("kind", [Moody, Noisy])
def test_only_scoring_leaves_training_bit_identical(kind, tmp_path, logged):
    plain, scored, source = toy(kind), toy(kind), reference("good", kind)
    torch.manual_seed(0)
    trainer(epochs=2).fit(plain, batches(shuffle=True))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    fit(tmp_path / "s", source, scored, batches(shuffle=True), epochs=2, reweight="none")
    assert noted(tmp_path / "s") is not None
    torch.testing.assert_close(parameters_of(scored), parameters_of(plain), rtol=0, atol=0)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("scorer", [None, RhoLoss()])
def test_a_reference_is_asked_twice_a_batch_for_512_samples_and_said_once(scorer, tmp_path, logged):
    source, settings = reference("good", Counted), {"scorer": scorer, "parameters": None if scorer else "head"}
    Counted.asked = ()
    fit(tmp_path / "s", source, epochs=2, **settings)
    assert Counted.asked == ((False, False, False),) * (2 * 8 + (20 if scorer else 0))
    assert all(p.requires_grad and p.grad is None for p in source.parameters())
    assert len(logged) == 1
    Counted.asked = ()
    warned = fit(tmp_path / "t", source, data=batches(511, 73), **settings)
    calls = 2 * 7 + (7 if scorer else 0)
    assert (warned, len(logged), noted(tmp_path / "t"), len(Counted.asked)) == ([], 1, None, calls)


ALIGN_FIX = " Give it as lightning_mimic.Aligned(...), or compare losses with the scorer RhoLoss."
OTHER, UNIFORM = " Use another reference.", " Use another reference. Weights stay uniform."
HERE = " It is aligned from here on."
UNSURE = " Weights are uniform as long as it is so unsure."
TOOK = re.compile(r" Looking at it took \d+\.\d s\.")
COMPATIBLE, BLIND = "compatible (", "unrelated: it does not know"
APART, UNFIT = "unrelated: its weights have nothing", "unrelated: its weights do not fit"
ALIGN, LOSSES, GIVEN = {"on_doubtful": "align"}, {"scorer": RhoLoss(), "parameters": None}, {"aligned": True}
# reference, settings, how its verdict begins, what follows the diagnosis, whether that is a warning
SAID = {
    "good": ("good", {}, COMPATIBLE, "", False),
    "unrelated": ("unrelated", {}, APART, ALIGN_FIX + UNSURE, True),
    "ignorant": ("ignorant", {}, BLIND, OTHER + UNSURE, True),
    "good, align": ("good", ALIGN, COMPATIBLE, "", False),
    "unrelated, align": ("unrelated", ALIGN, APART, HERE, False),
    "ignorant, align": ("ignorant", ALIGN, BLIND, UNIFORM, True),
    "wide, align": ("wide", ALIGN, UNFIT, HERE, False),
    "wide, ignorant, align": ("wide, ignorant", ALIGN, UNFIT, UNIFORM, True),
    "aligned": ("unrelated", GIVEN, COMPATIBLE, "", False),
    "aligned, ignorant": ("ignorant", GIVEN, BLIND, OTHER + UNSURE, True),
    "aligned, ignorant, align": ("ignorant", ALIGN | GIVEN, BLIND, UNIFORM, True),
    "losses": ("unrelated", LOSSES, COMPATIBLE, "", False),
    "losses, ignorant": ("ignorant", LOSSES, BLIND, OTHER, True),
}


@pytest.mark.parametrize("case", SAID)
def test_what_it_is_worth_is_said_in_full(case, tmp_path, logged):
    name, settings, begins, ends, warns = SAID[case]
    source = Aligned(reference(name)) if "aligned" in settings else reference(name)
    given = {key: value for key, value in settings.items() if key != "aligned"}
    warned = fit(tmp_path / "s", source, epochs=2, **given)
    warned, logged = ([TOOK.sub("", text, 1) for text in said] for said in (warned, logged))
    found, alone = noted(tmp_path / "s"), "aligned" in settings or "scorer" in settings
    assert not alone or (found.weight_cosine, found.score, found.cosines) == (None, None, {})  # by what it knows alone
    assert (warned, logged) == (([f"{found}.{ends}"], []) if warns else ([], [f"{found}.{ends}"]))
    assert str(found).startswith(f"the reference is {begins}")
    assert found.label_gap.count > 300


def test_raise_stops_and_leaves_what_was_scored(tmp_path):
    module = still()
    with pytest.raises(ValueError, match="its weights have nothing in common") as caught:
        fit(tmp_path / "s", reference("unrelated"), module, on_doubtful="raise")
    assert TOOK.sub("", str(caught.value)) == f"{noted(tmp_path / 's')}.{ALIGN_FIX}{UNSURE}"
    assert untouched(module)
    assert column(tmp_path / "s").isfinite().sum() == len(column(tmp_path / "s")) == 512


@pytest.mark.parametrize("name", ["good", "unrelated", "ignorant", "wide"])
def test_to_align_is_to_wait_and_then_to_go_where_it_leads(name, tmp_path, logged):
    source = reference(name)
    fit(tmp_path / "a", source, on_doubtful="align", temperature=0.3)
    fit(tmp_path / "b", source if name == "good" else Aligned(source), temperature=0.3)
    waits = 0 if name == "wide" else 640 if name == "ignorant" else 512
    for what, before in (("score", float("nan")), ("weight", 1 / 64)):
        expected = column(tmp_path / "b", what)
        expected[:waits] = before
        torch.testing.assert_close(column(tmp_path / "a", what), expected, equal_nan=True, **CLOSE)
    flags = Ledger(tmp_path / "a").table()["flag"].to_pylist()
    assert flags[:waits] == ["zero_direction"] * waits
    assert set(flags[max(waits, 64) :]) <= {"ok"}


def test_a_fit_too_short_for_a_verdict_says_that_its_weights_were_uniform(tmp_path):
    assert fit(tmp_path / "s", reference("good"), data=batches(256), on_doubtful="align") != []


ONE = "`parameters` selects 2 layers ('body', 'head'), but the scorer needs one nn.Linear."
PART = (
    "`parameters`: an aligned reference refits one whole nn.Linear, not head.bias, head.weight of a Conv2d. Name the "
    "path of the model's last linear layer."
)
SHAPE = (
    "`reference`: 'head.weight' has shape (3, 20), the model's has (3, 8). Both must come from the same architecture "
    "and number of classes. Pass a model of another architecture as lightning_mimic.Aligned(model)."
)
REFUSED = {
    "all": (WithLosses, reference("good"), "all", "align", ONE),
    "a convolution": (Convolution, toy(Convolution, seed=1), "head", "align", PART),
    "another architecture": (WithLosses, toy(Wide), "head", "warn", SHAPE),
    "another architecture, raise": (Toy, toy(Wide), "head", "raise", SHAPE),
    "other weights": (WithLosses, toy(Wide).state_dict(), "head", "align", SHAPE.partition(" Pass a model")[0]),
    "a slip": (WithLosses, {}, "head", "aling", "`on_doubtful` is 'aling'; nearest: 'align', 'warn', 'raise'."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_at_the_start(case, tmp_path):
    kind, source, parameters, doubtful, message = REFUSED[case]
    module = toy(kind)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fit(tmp_path / "s", source, module, parameters=parameters, on_doubtful=doubtful)
    assert untouched(module)
    assert not (tmp_path / "s").exists()


def run(folder, source, path=None, count=640, epochs=1, **settings):
    """A fit that saves a checkpoint, or goes on from one; what it trained."""
    module, callback = toy(WithLosses), GradMimic(source, "head", ledger=folder / "s", **settings)
    fitter = trainer(callback, ModelCheckpoint(folder / "c", "one"), epochs=epochs, enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitter.fit(module, batches(count), **({"ckpt_path": path, "weights_only": True} if path else {}))
    return parameters_of(module)


@pytest.mark.parametrize("name", ["good", "unrelated"])
def test_what_was_decided_stays_so_in_a_resumed_fit(name, tmp_path, logged):
    source, whole = reference(name, Counted), toy(WithLosses)
    fit(tmp_path / "w", source, whole, epochs=2, on_doubtful="align")
    run(tmp_path, source, on_doubtful="align")
    logged.clear()
    Counted.asked = ()
    found = run(tmp_path, source, tmp_path / "c/one.ckpt", epochs=2, on_doubtful="align")
    assert (logged, Counted.asked) == ([], ())
    torch.testing.assert_close(found, parameters_of(whole), rtol=0, atol=0)
    torch.testing.assert_close(column(tmp_path / "s"), column(tmp_path / "w"), equal_nan=True, rtol=0, atol=0)
    assert noted(tmp_path / "s", 1) is None


@pytest.mark.parametrize("doubtful", ["warn", "align"])
def test_a_fit_resumed_before_the_verdict_looks_anew(doubtful, tmp_path, logged):
    run(tmp_path, reference("good"), count=256, on_doubtful=doubtful)
    run(tmp_path, reference("good"), tmp_path / "c/one.ckpt", count=256, epochs=4, on_doubtful=doubtful)
    assert (noted(tmp_path / "s"), len(logged), noted(tmp_path / "s", 1).samples) == (None, 1, 512)
    known = column(tmp_path / "s").isfinite()
    assert known.tolist() == [doubtful == "warn"] * 768 + [True] * 256


def test_a_fit_resumed_with_the_reference_aligned_aligns_it(tmp_path, logged):
    run(tmp_path, reference("unrelated"))
    run(tmp_path / "r", Aligned(reference("unrelated")), tmp_path / "c/one.ckpt", epochs=2)
    with pytest.warns(UserWarning, match="the rows before step 10 are in another directory"):
        scores = column(tmp_path / "r/s")
    assert scores.isfinite().sum() > 500


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_module_as_reference_follows_the_trainers_precision(precision, tmp_path, logged):
    source = trained(toy(WithLosses, dtype=torch.float32), only="head", dtype=torch.float32)
    module, data = toy(WithLosses, dtype=torch.float32), DataLoader(task(dtype=torch.float32), 64)
    trainer(GradMimic(source, "head"), precision=precision).fit(module, data)
    assert len(logged) == 1


def test_a_batch_may_be_a_named_tuple(tmp_path, logged):
    data = DataLoader([Named(x, y) for x, y in task()], 64)
    trainer(GradMimic(reference("good", ByName), "head")).fit(toy(ByName), data)
    assert len(logged) == 1


def test_a_module_that_cannot_be_copied_is_trained_all_the_same(tmp_path):
    module = toy(WithLosses)
    module.lock = threading.Lock()
    trainer(GradMimic(parameters_of(reference("good")), "head")).fit(module, batches())


def test_samples_that_hold_nan_are_left_out(tmp_path, logged):
    data, gone = task(), [3, 100, 101, 500]
    data.tensors[0][gone] = float("nan")
    with pytest.warns(UserWarning, match="samples held NaN"):
        trainer(GradMimic(reference("good"), "head", ledger=tmp_path / "s")).fit(still(), loader(data, 64))
    found, scores = noted(tmp_path / "s"), column(tmp_path / "s")[:512]
    same(found.score, estimated(scores[scores.isfinite()]), **CLOSE)
    losses = still().sample_losses(task()[[k for k in range(512) if k not in gone]]).detach()
    assert (found.score.count, found.loss) == (508, pytest.approx(float(losses.mean()), rel=1e-6))
