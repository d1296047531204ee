"""The images with the lowest scores of an epoch, in a logger."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader

from lightning_mimic import GradMimic, Ledger, MimicError, SuspiciousImages, WithIds, collate_with_ids
from support.cases import for_each


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Experiment:
    """What TensorBoard's writer is given."""

    def __init__(self):
        self.images, self.texts = {}, {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image

    def add_text(self, tag, text, step):
        self.texts[tag, step] = text


class ImageLogger(Logger):
    def __init__(self):
        super().__init__()
        self.experiment = Experiment()

    name = version = "test"

    def log_metrics(self, *args, **kwargs):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


class CaptionLogger(ImageLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_image(self, key, images, step, caption):
        self.logged.append((key, images, step, caption))


def loader_of(count=20, shape=(3, 4, 4)):
    draw = torch.Generator().manual_seed(0)
    samples = [(torch.randn(shape, generator=draw), row % 3) for row in range(count)]
    return DataLoader(
        WithIds(samples, [f"s{row}" for row in range(count)]), batch_size=6, shuffle=True, collate_fn=collate_with_ids
    ), samples


def fit(loader, logger, *callbacks, epochs=4):
    torch.manual_seed(1)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=logger, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Classifier(), loader)
    return trainer


def reference():
    torch.manual_seed(0)
    return Classifier()


def mimic(**settings):
    return GradMimic(reference(), "net.1", diagnose_reference=False, **settings)


@for_each("logger", [ImageLogger, CaptionLogger])
def test_the_lowest_scores_of_every_second_epoch_are_logged(tmp_path, logger):
    loader, samples = loader_of()
    logger = logger()
    fit(loader, logger, mimic(ledger=tmp_path / "scores"), SuspiciousImages(every_n_epochs=2, samples=5))
    rows = Ledger(tmp_path / "scores").table().to_pylist()
    lowest = {}
    for epoch in (1, 3):
        of_epoch = sorted((row["score"], row["id"]) for row in rows if row["epoch"] == epoch)
        lowest[(epoch + 1) * 4] = of_epoch[:5]  # four steps in an epoch
    captions = {step: [f"{name}: {score:.3g}" for score, name in found] for step, found in lowest.items()}
    if isinstance(logger, CaptionLogger):
        assert {step: caption for _, _, step, caption in logger.logged} == captions
        pictures = {
            step: [torch.as_tensor(each).permute(2, 0, 1) for each in found] for _, found, step, _ in logger.logged
        }
    else:
        texts = logger.experiment.texts
        assert {step: text.removeprefix("- ").split("\n- ") for (_, step), text in texts.items()} == captions
        pictures = {}
        for (_, step), image in sorted(logger.experiment.images.items()):
            pictures.setdefault(step, []).append(image)
    for step, found in lowest.items():
        for (_, name), picture in zip(found, pictures[step], strict=True):
            image = samples[int(name[1:])][0]
            torch.testing.assert_close(picture, (image - image.min()) / (image.max() - image.min()))


def test_training_is_what_it_is_without_it():
    results = []
    for more in ([], [SuspiciousImages(samples=3)]):
        loader, _ = loader_of()
        results.append(fit(loader, ImageLogger(), mimic(), *more, epochs=2).model.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_what_cannot_be_logged_is_refused_before_training(tmp_path):
    loader, _ = loader_of()
    with pytest.raises(MimicError, match="put it behind a GradMimic"):
        fit(loader, ImageLogger(), SuspiciousImages(), mimic())
    with pytest.raises(MimicError, match="the trainer has CSVLogger"):
        fit(loader, CSVLogger(tmp_path), mimic(), SuspiciousImages())
    with pytest.raises(MimicError, match="the trainer has none"):
        fit(loader, False, mimic(), SuspiciousImages())
    vectors, _ = loader_of(shape=(48,))
    with pytest.raises(MimicError, match="holds no tensor of 6 images"):
        fit(vectors, ImageLogger(), mimic(), SuspiciousImages())


@for_each("arguments", [{"every_n_epochs": 0}, {"samples": 0}, {"samples": True}, {"every_n_epochs": 1.5}])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(MimicError, match="expected a whole number of 1 or more"):
        SuspiciousImages(**arguments)
