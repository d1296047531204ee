"""Heads trained on a frozen backbone's cached features: as on the images, or not at all."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_mimic import Aligned, GradMimic, Ledger
from lightning_mimic.cli.scoring import score
from lightning_mimic.cli.training import train
from lightning_mimic.data import CachedFeatures
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.models import ImageClassifier
from lightning_mimic.scorers import RhoLoss
from support.small_images import (
    TRAIN,
    SmallImages,
    assert_alike,
    classifier,
    convolutions,
    of,
    reference_of,
    vision_transformer,
)
from support.toys import Toy, trainer


def fitted(folder: Path, features: Path | None, backbone: Callable[[], nn.Module], **options: Any) -> dict[str, Any]:
    """What comes of three epochs with a break after the second."""
    callback = GradMimic(reference_of(classifier(backbone)), "head", ledger=folder / "scores")
    for epochs in (2, 3):
        model, path = classifier(backbone), folder / "last.ckpt"
        fit = trainer(callback, epochs=epochs, **options)
        data = of(SmallImages(), model, features)
        fit.fit(model, data, ckpt_path=path if path.exists() else None)
        fit.save_checkpoint(path)
    fit.test(model, data, verbose=False)
    columns = ["id", "epoch", "step", "score", "weight", "loss", "label", "predicted"]
    rows = Ledger(folder / "scores").table().select(columns).to_pydict()
    metrics = {name: fit.callback_metrics[name] for name in ("test/accuracy", "test/loss")}
    return {"head": dict(model.head.named_parameters()), "rows": rows, "metrics": metrics}


@pytest.mark.parametrize("backbone", [convolutions, vision_transformer])
def test_a_head_is_trained_as_on_the_images(backbone, tmp_path):
    plain = fitted(tmp_path / "plain", None, backbone)
    cached = fitted(tmp_path / "cached", tmp_path / "features", backbone)
    assert_alike(cached, plain)
    assert len(set(plain["rows"]["id"])) == TRAIN - 16
    assert len(list((tmp_path / "features").iterdir())) == 2  # of both splits


class Shifted(SmallImages):
    """Changes its batches, and does not say so."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


FIT = "`freeze_backbone=true`, or train without `features`."
REFUSED = {
    "augment": (
        lambda: (DigitsDataModule(augment=True), classifier()),
        "DigitsDataModule augments its training images at random, so that their features cannot be cached. Set "
        "`augment=false` (flipping by `flip` is cached), or train without `features`.",
    ),
    "a hook of its own": (lambda: (Shifted(), classifier()), "Shifted augments its training images at random"),
    "a backbone that trains": (
        lambda: (SmallImages(), classifier(freeze_backbone=False)),
        f"the backbone is trained, so that its features change with every step and cannot be cached. Set {FIT}",
    ),
    "other data": (
        lambda: (pl.LightningDataModule(), classifier()),
        "`data` is a LightningDataModule; features can be cached for data modules of labelled images only. Train",
    ),
    "another module": (
        lambda: (SmallImages(), Toy()),
        "`model` is a Toy without 'backbone', 'freeze_backbone', 'takes_features'; features can be cached for",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cached_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CachedFeatures(*make(), tmp_path)


def fit_on_features(folder: Path, model: ImageClassifier, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    fit = trainer(*callbacks, limit_val_batches=0)
    fit.fit(model, CachedFeatures(SmallImages(), model, folder), **options)
    return fit


MODULE = (
    "the reference is a module (ImageClassifier), which would be asked about the features of another backbone than its "
    "own. Give weights for the trained model (a path or a state dict), or train without `features`."
)
STRANGE = (
    "the weights are of another backbone ('backbone.0.weight' differs) than the cached features, so that losses cannot "
    "be computed from these. Train without `features`, or start with this backbone (`pretrained`)."
)
REFERENCES = {
    "module": (lambda: GradMimic(classifier(seed=1), "head"), MODULE),
    "module, aligned": (lambda: GradMimic(Aligned(classifier(seed=1)), "head"), MODULE),
    "weights": (lambda: GradMimic(classifier(seed=1).state_dict(), "head"), STRANGE),
    "weights, aligned": (lambda: GradMimic(Aligned(classifier(seed=1).state_dict()), "head"), STRANGE),
    "weights, their losses": (
        lambda: GradMimic(classifier(seed=1).state_dict(), scorer=RhoLoss(), ledger=None),
        STRANGE,
    ),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_with_another_backbone_is_refused_before_training(case, tmp_path):
    make, message = REFERENCES[case]
    model = classifier()
    before = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fit_on_features(tmp_path, model, make())
    torch.testing.assert_close(model.head.weight, before, rtol=0, atol=0)


def test_a_checkpoint_with_another_backbone_is_refused(tmp_path):
    other = classifier(seed=1)
    fit = trainer(ModelCheckpoint(tmp_path, "other"), enable_checkpointing=True)
    fit.fit(other, SmallImages())
    with pytest.raises(ValueError, match=f"^{re.escape(STRANGE)}$"):
        fit_on_features(tmp_path / "features", classifier(), ckpt_path=tmp_path / "other.ckpt")


def test_another_model_than_the_trainers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^CachedFeatures and the trainer have different models; give"):
        trainer().fit(classifier(), CachedFeatures(SmallImages(), classifier(), tmp_path))


@pytest.mark.parametrize("kind", ["losses", "aligned"])
def test_a_reference_of_the_same_backbone_is_asked_as_on_the_images(kind, tmp_path):
    found = []
    for features in (None, tmp_path / "features"):
        model, ledger = classifier(), tmp_path / str(features is None)
        weights = reference_of(model)
        reference: Any = Aligned(weights) if kind == "aligned" else weights
        how = {"scorer": RhoLoss()} if kind == "losses" else {"parameters": "head"}
        never = pytest.warns(UserWarning, match="never aligned") if kind == "aligned" else contextlib.nullcontext()
        with never:
            fit = trainer(GradMimic(reference, ledger=ledger, **how))
            fit.fit(model, of(SmallImages(), model, features))
        found.append({"head": dict(model.head.named_parameters()), "metrics": {}})
        found[-1]["rows"] = Ledger(ledger).table().select(["id", "weight", "loss"]).to_pydict()
    assert_alike(found[1], found[0])


def test_images_are_taken_beside_features(tmp_path):
    model = classifier().eval()
    images = torch.rand(3, 3, 16, 16)
    expected = model(images)
    model.takes_features = True
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(model.backbone(images)), expected, rtol=0, atol=0)


def composed(folder: Path, *overrides: str, root: str = "train"):
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        paths = [f"paths.output={folder}", f"paths.reference={folder / 'reference.ckpt'}"]
        quiet = ["trainer.enable_progress_bar=false"]
        return compose(root, overrides=[*paths, *quiet, *overrides])


@pytest.mark.slow
def test_the_commands_train_and_score_on_features(tmp_path):
    small = ["model.backbone.width=4", "logger=none", "trainer.max_epochs=2"]
    train(
        composed(
            tmp_path,
            "experiment=digits_reference",
            "test=false",
            "model.optimizer.lr=0.01",
            "trainer.max_epochs=20",
            *small[:2],
        )
    )
    found: dict[str, list[dict]] = {"train": [], "score": []}
    for name in ("null", "features"):
        folder = tmp_path / name
        given = [f"features={tmp_path / name if name == 'features' else 'null'}", "experiment=digits_noisy"]
        epochs = f"save_epochs_to={folder}.epochs"
        train(composed(tmp_path, *given, *small, f"mimic.ledger={folder}.train", epochs))
        said = [f"checkpoints={tmp_path / 'null.epochs'}", f"ledger={folder}.score", "model.backbone.width=4"]
        score(composed(tmp_path, *given, *said, root="score"))
        for kind, ledgers in found.items():
            columns = ["id", "epoch", "score", "loss"]
            ledgers.append(Ledger(f"{folder}.{kind}").table().select(columns).to_pydict())
    for plain, cached in found.values():
        assert_alike({"head": {}, "metrics": {}, "rows": cached}, {"head": {}, "metrics": {}, "rows": plain})
    assert len(list((tmp_path / "features").glob("*.npy"))) == 1  # all digits are of one split


def test_the_command_refuses_a_reference_with_another_backbone_before_features_are_computed(tmp_path):
    words = ["experiment=digits_noisy", f"features={tmp_path / 'features'}", "model.pretrained=null", "logger=none"]
    config = composed(tmp_path, *words, "mimic.reference={_target_:torch.nn.Identity}")
    config.paths.made_by = {}
    with pytest.raises(ValueError, match=r"^the reference is a module \(Identity\), which would be asked about"):
        train(config)
    assert not (tmp_path / "features").exists()
