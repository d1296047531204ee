"""The classifier: probe or whole, weights taken over, the per-sample contract."""

import re

import pytest
import torch
from torch import nn

from lightning_mimic import GradMimic, ReferenceLoadError
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.models import ImageClassifier, SmallConvNet, torchvision_backbone
from support.toys import trainer


def probe(**options) -> ImageClassifier:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    return ImageClassifier(backbone, num_classes=10, image_shape=(1, 8, 8), **options)


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 8, 8), torch.arange(count)


def test_the_head_fits_the_features():
    assert probe().head.weight.shape == (10, 4 * 6 * 6)


def test_looking_for_the_width_leaves_running_statistics_alone():
    assert int(probe().backbone[1].num_batches_tracked) == 0


def test_a_frozen_backbone_stays_in_evaluation_mode_and_still():
    model = probe(freeze_backbone=True)
    before = {name: t.clone() for name, t in model.backbone.state_dict().items()}
    trainer(limit_val_batches=0, limit_train_batches=3).fit(model, DigitsDataModule(train="trusted"))
    torch.testing.assert_close(model.backbone.state_dict(), before, rtol=0, atol=0)
    assert model.head.weight.grad is not None
    images = batch()[0]
    torch.testing.assert_close(model.train()(images), model.eval()(images), rtol=0, atol=0)  # no dropout


def test_a_whole_model_trains_its_backbone():
    model = probe()
    before = model.backbone[0].weight.detach().clone()
    trainer(limit_val_batches=0, limit_train_batches=3).fit(model, DigitsDataModule(train="trusted"))
    assert not torch.equal(model.backbone[0].weight, before)


def test_losses_are_one_per_sample_and_training_averages_them():
    model, (images, labels) = probe(freeze_backbone=True).train(), batch()
    model.log = lambda *_, **__: None
    losses = model.sample_losses((images, labels))
    expected = nn.functional.cross_entropy(model(images), labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    out = model.training_step((images, labels), 0)
    torch.testing.assert_close(out["loss"], expected.mean())
    torch.testing.assert_close(out["predicted"], model(images).argmax(1))


def test_a_pretrained_backbone_is_taken_over_and_the_head_is_not(tmp_path):
    source = probe()
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = probe(pretrained=tmp_path / "a.pt")
    torch.testing.assert_close(model.backbone[0].weight, source.backbone[0].weight, rtol=0, atol=0)
    assert not torch.equal(model.head.weight, source.head.weight)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    torch.save(ImageClassifier(SmallConvNet(), 10, (1, 8, 8)).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ReferenceLoadError, match="no tensor for 'backbone"):
        probe(pretrained=tmp_path / "a.pt")


def test_a_backbone_that_gives_maps_is_refused():
    with pytest.raises(ValueError, match=re.escape("returns shape (1, 4, 6, 6) for one image; expected (1, D)")):
        ImageClassifier(nn.Conv2d(1, 4, 3), 10, (1, 8, 8))


def test_a_schedule_steps_every_epoch():
    model = probe(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1))
    fit = trainer(epochs=2, limit_val_batches=0, limit_train_batches=1)
    fit.fit(model, DigitsDataModule(train="trusted"))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize("make", [lambda: torchvision_backbone("resnet18"), lambda: timm_model("resnet18")])
def test_torchvision_and_timm_train_under_the_callback(make):
    model = ImageClassifier(make(), num_classes=3, image_shape=(3, 32, 32))
    reference = {name: torch.zeros_like(p) for name, p in model.head.named_parameters(prefix="head")}
    data = [(torch.rand(3, 32, 32), k % 3) for k in range(8)]
    trainer(GradMimic(reference, "head")).fit(model, torch.utils.data.DataLoader(data, 4))
    assert bool(model.head.weight.isfinite().all())


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0)
