"""What scoring at checkpoints refuses before anything is scored, and what it must not do in silence."""

import contextlib
import re
import shutil
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_mimic import Aligned, GradMimic, Ledger
from lightning_mimic.callbacks import AtCheckpoints
from lightning_mimic.errors import MimicError
from lightning_mimic.reference import ReferenceLoadError
from support.cases import for_each
from support.checkpoint_scoring import Moody, MoodyWithLosses, checkpoints, column, scored, toy_at
from support.hooks_left import traces
from support.toys import CLASSES, FEATURES, HIDDEN, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer
from support.unpickling import Canary


@for_each("given", [[], (), "a.ckpt", Path("a.ckpt"), "empty"])
def test_checkpoints_are_a_directory_or_a_list_and_some(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.ckpt").write_bytes(b"")
    said = f"is {str(given)!r}" if given else "is empty"
    with pytest.raises(ValueError, match=re.escape(f"`checkpoints` {said}; expected a directory of .ckpt files, or a")):
        AtCheckpoints(given)


def test_a_directory_stands_for_its_ckpt_files_by_name(tmp_path):
    for name in ("b.ckpt", "a.ckpt", "c.pt", "010.ckpt", "009.ckpt"):
        (tmp_path / name).write_bytes(b"")
    for given in (tmp_path, str(tmp_path)):
        assert [path.name for path in AtCheckpoints(given).checkpoints] == ["009.ckpt", "010.ckpt", "a.ckpt", "b.ckpt"]


def changed(path, change):
    """A checkpoint of Moody with something wrong."""
    state = toy_at(Moody, 0).state_dict()
    change(state)
    torch.save(state, path)
    return path


FILES = {
    "no file": (lambda d: d / "gone.pt", "`checkpoints`: no file "),
    "a missing tensor": (
        lambda d: changed(d / "x.pt", lambda s: s.pop("norm.running_var")),
        "x.pt lacks 'norm.running_var' (nearest: 'norm.running_mean'",
    ),
    "another name": (
        lambda d: changed(d / "x.pt", lambda s: s.update({"haed.weight": s["head.weight"]})),
        "Moody has no 'haed.weight', and {d}/x.pt does (nearest: 'head.weight'",
    ),
    "another shape": (
        lambda d: changed(d / "x.pt", lambda s: s.update({"head.weight": torch.zeros(7, HIDDEN)})),
        f"'head.weight' is (7, {HIDDEN}) in {{d}}/x.pt and ({CLASSES}, {HIDDEN}) in Moody; a checkpoint of this very",
    ),
    "another module": (lambda d: checkpoints(d, Toy, 1)[0], "Toy0.ckpt lacks 'norm.bias'"),
    "a cut file": (lambda d: (d / "x.pt").write_bytes(b"PK") and d / "x.pt", "`checkpoints`: {d}/x.pt (2 bytes)"),
}


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("case", FILES)
def test_one_bad_file_stops_all_before_anything_is_scored(case, place, tmp_path):
    make, message = FILES[case]
    paths, module = checkpoints(tmp_path), toy(Moody)
    paths.insert(place, make(tmp_path))
    before = traces(module)
    with pytest.raises(ReferenceLoadError, match=re.escape(message.format(d=tmp_path))):
        scored(tmp_path, module, paths)
    assert not (tmp_path / "scores").exists()
    assert traces(module) == before


def test_a_refused_file_leaves_the_modules_weights_alone(tmp_path):
    module, (good, *_) = toy(Moody), checkpoints(tmp_path)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for case in ("another shape", "no file"):
        with pytest.raises(ReferenceLoadError):
            scored(tmp_path, module, [FILES[case][0](tmp_path), good])
        torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_never_runs(zipped, tmp_path):
    path, canary, (good, *_) = tmp_path / "evil.ckpt", tmp_path / "canary", checkpoints(tmp_path)
    content = {"state_dict": toy(Moody).state_dict(), "extra": Canary(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ReferenceLoadError, match=r"`checkpoints`: .*evil\.ckpt holds Python objects besides"):
        scored(tmp_path, toy(Moody), [good, path])
    assert not canary.exists()
    assert not (tmp_path / "scores").exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert canary.exists(), "the bait must be live, or the test proves nothing"


def aligned(**options):
    return GradMimic(Aligned(toy(seed=1)), "head", reweight="none", **options)


def plain(**options):
    return GradMimic(parameters_of(toy(seed=1)), "head", reweight="none", **options)


SETTINGS = {
    "too few epochs": (plain, {}, 2, 1, "no max_steps, and the trainer has max_epochs=1"),
    "too many epochs": (plain, {}, 2, 3, "no max_steps, and the trainer has max_epochs=3"),
    "endless": (plain, {}, 2, -1, "no max_steps, and the trainer has max_epochs=-1"),
    "no callback": (None, {}, 1, 1, "AtCheckpoints scores with a GradMimic; add one to the trainer's callbacks"),
    "aligned": (aligned, {}, 2, 2, "an aligned reference is fitted to one state of the model; score one checkpoint"),
    "to align": (plain, {"on_doubtful": "align"}, 1, 1, "`on_doubtful='align'` decides while a model begins to train"),
    "no such layer": (lambda **o: GradMimic(toy(seed=1), "haed", **o), {}, 1, 1, "'haed' names no module"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_make_no_sense_are_refused_before_anything_is_scored(case, tmp_path):
    make, options, count, epochs, message = SETTINGS[case]
    mimic = [] if make is None else [make(ledger=tmp_path / "scores", **options)]
    module = toy()
    before = traces(module)
    fit = trainer(*mimic, AtCheckpoints(checkpoints(tmp_path, Toy, count)), epochs=epochs)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit.fit(module, loader(toy_data(8)))
    assert not (tmp_path / "scores").exists()
    assert traces(module) == before


def test_the_order_of_the_callbacks_does_not_matter(tmp_path):
    paths, first = checkpoints(tmp_path, Toy), AtCheckpoints(checkpoints(tmp_path, Toy))
    expected = scored(tmp_path, toy(), paths)
    mimic = GradMimic(parameters_of(toy(seed=1)), "head", reweight="none", ledger=tmp_path / "t")
    trainer(first, mimic, epochs=3).fit(toy(), loader(toy_data(14)))
    rows = Ledger(tmp_path / "t").table().sort_by([("epoch", "ascending"), ("id", "ascending")])
    torch.testing.assert_close(
        [column(rows, "score", k) for k in range(3)], [column(expected, "score", k) for k in range(3)]
    )
    assert len(Ledger(tmp_path / "t").meta["attempts"][0]["checkpoints"]) == 3


@pytest.mark.slow
def test_a_reference_is_judged_in_training_and_not_while_scoring(tmp_path):
    module, data = toy(MoodyWithLosses), toy_data(600)
    reference = toy(MoodyWithLosses, seed=1)  # knows nothing, and shares nothing
    options = {"reference": reference, "on_doubtful": "raise"}
    # Only its margin is looked at while scoring, which turns the scores upside down.
    with pytest.raises(MimicError, match="the reference is unsure: it is less sure"):
        scored(tmp_path, module, checkpoints(tmp_path, MoodyWithLosses), data=data, **options)
    warned = tmp_path / "warned"
    warned.mkdir()
    with pytest.warns(UserWarning, match="the reference is unsure: it is less sure"):
        scored(warned, module, checkpoints(warned, MoodyWithLosses), data=data, reference=reference)
    assert Ledger(warned / "scores").meta["attempts"][0]["diagnosis"]["verdict"] == "unsure"
    assert Ledger(warned / "scores").table().num_rows == 1800
    mimic = GradMimic(reference, "head", on_doubtful="raise", ledger=tmp_path / "t")
    with pytest.raises(ValueError, match="the reference is unrelated"):
        trainer(mimic).fit(module, loader(data))
    assert Ledger(tmp_path / "t").meta["attempts"][0]["diagnosis"]["verdict"] == "unrelated"


def told(call):
    """What it warns of or refuses, in one string."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
        except ValueError as error:
            return str(error)
    return "\n".join(str(each.message) for each in said)


def test_a_module_in_evaluation_mode_does_not_wait_for_a_verdict_in_silence(tmp_path):
    """Lightning leaves a module in evaluation mode as it is; then no verdict comes, and all weights are uniform."""
    mimic = GradMimic(toy(WithLosses, seed=1), "head", on_doubtful="align", ledger=tmp_path / "s")
    said = told(lambda: trainer(mimic).fit(toy(WithLosses).eval(), loader(toy_data(600))))
    scores = Ledger(tmp_path / "s").table()["score"] if (tmp_path / "s").exists() else []
    assert "uniform" in said or scores[-1].as_py() is not None


def test_testing_after_the_fit_is_of_the_last_checkpoint(tmp_path):
    class Tests(Moody):
        def test_step(self, batch, batch_idx):
            self.log("head", self.head.weight.detach().sum())

    module, paths = toy(Tests), checkpoints(tmp_path, Tests)
    mimic = GradMimic(parameters_of(toy(Moody, seed=1)), "head", reweight="none")
    fit = trainer(mimic, AtCheckpoints(paths), epochs=3)
    fit.fit(module, loader(toy_data(8)))
    (said,) = fit.test(module, loader(toy_data(8)), verbose=False)
    assert said["head"] == pytest.approx(float(toy_at(Tests, 2).head.weight.detach().sum()))


class LogsItsRate(Moody):
    def training_step(self, batch, batch_idx):
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


class TrainsItself(Moody):
    def on_train_epoch_start(self):
        self.train()


class SetsItselfUp(Moody):
    def setup(self, stage):
        self.train()


@pytest.mark.parametrize("kind", [LogsItsRate, TrainsItself, SetsItselfUp])
def test_habits_of_modules_change_no_score(kind, tmp_path):
    scores = []
    for each in (Moody, kind):
        (tmp_path / each.__name__).mkdir()
        rows = scored(tmp_path / each.__name__, toy(each), checkpoints(tmp_path, Moody))
        scores.append([column(rows, "score", epoch) for epoch in range(3)])
    torch.testing.assert_close(*scores)


def test_a_trainer_that_only_tests_leaves_the_weights_alone(tmp_path):
    class Tests(Toy):
        def test_step(self, batch, batch_idx):
            self.log("head", self.head.weight.detach().sum())

    module, mimic = toy(Tests), GradMimic(parameters_of(toy(seed=1)), "head", reweight="none")
    before = parameters_of(module)
    trainer(mimic, AtCheckpoints(checkpoints(tmp_path, Toy, 1))).test(module, loader(toy_data(8)), verbose=False)
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


def test_a_frozen_layer_is_scored_as_in_training(tmp_path):
    scores = []
    for name, more in (("training", []), ("scoring", [AtCheckpoints(checkpoints(tmp_path, Toy, 1))])):
        module = toy_at(Toy, 0)
        module.head.requires_grad_(False)
        module.lr = 0.0
        mimic = GradMimic(parameters_of(toy(seed=1)), "head", reweight="none", ledger=tmp_path / name)
        trainer(mimic, *more).fit(module, loader(toy_data(8)))
        scores.append(Ledger(tmp_path / name).table()["score"].to_pylist())
        assert not module.head.weight.requires_grad
    assert scores[0] == pytest.approx(scores[1])


def test_a_fit_that_ends_early_does_not_leave_checkpoints_out_in_silence(tmp_path):
    paths = checkpoints(tmp_path)
    assert "max_steps" in told(lambda: scored(tmp_path, toy(Moody), paths, trainer_options={"max_steps": 5}))


def test_a_resumed_training_is_not_taken_for_a_scoring_that_is_half_done(tmp_path):
    module, training, paths = toy(), trainer(), checkpoints(tmp_path, Toy)
    training.fit(module, loader(toy_data(8)))
    training.save_checkpoint(tmp_path / "resume.ckpt")
    mimic = GradMimic(parameters_of(toy(seed=1)), "all", reweight="none", ledger=tmp_path / "s")
    fit = trainer(mimic, AtCheckpoints(paths), epochs=3)
    with contextlib.suppress(ValueError):  # a refusal will do
        fit.fit(module, loader(toy_data(8)), ckpt_path=tmp_path / "resume.ckpt", weights_only=True)
    if (tmp_path / "s").exists():
        assert set(Ledger(tmp_path / "s").table()["epoch"].to_pylist()) == {0, 1, 2}
        assert len(Ledger(tmp_path / "s").meta["attempts"][0]["checkpoints"]) == 3


class Builds(Toy):
    """Its layers are made by Lightning's hook."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.lr = 0.5

    def configure_model(self):
        if not hasattr(self, "head"):
            self.body, self.head = nn.Linear(FEATURES, HIDDEN).double(), nn.Linear(HIDDEN, CLASSES).double()


def test_a_module_that_builds_its_layers_late_is_scored_or_told_why_not(tmp_path):
    expected = scored(tmp_path, toy(), checkpoints(tmp_path, Toy))
    shutil.move(tmp_path / "scores", tmp_path / "expected")
    reference, paths = parameters_of(toy(seed=1)), checkpoints(tmp_path, Toy)
    said = told(lambda: scored(tmp_path, Builds(), paths, reference=reference))
    if "configure_model" in said:
        return
    rows = Ledger(tmp_path / "scores").table().sort_by([("epoch", "ascending"), ("id", "ascending")])
    assert rows["score"].to_pylist() == pytest.approx(expected["score"].to_pylist())
