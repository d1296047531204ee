"""The claim itself, on real images: a good reference finds wrong labels, a useless one finds none and does not help."""

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_mimic import GradMimic
from lightning_mimic.curation import curate, detect
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.models import ImageClassifier, SmallConvNet
from support.toys import trainer

pytestmark = pytest.mark.slow


class ShuffledLabels(DigitsDataModule):
    """Trusted images whose labels were dealt out anew: a reference from them knows nothing."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        labels, trusted = self.sources["train"].labels, self.rows["trusted"]
        order = torch.randperm(200, generator=torch.Generator().manual_seed(9))
        labels[trusted] = labels[trusted][order]


def classifier(pretrained: Path | None = None) -> ImageClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageClassifier(
            SmallConvNet(width=16),
            num_classes=10,
            image_shape=(1, 8, 8),
            pretrained=pretrained,
            freeze_backbone=pretrained is not None,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        )


def reference(data: pl.LightningDataModule, path: Path) -> Path:
    fit = trainer(epochs=30, limit_val_batches=0)
    fit.fit(classifier(), data)
    fit.save_checkpoint(path)
    return path


def fitted(backbone: Path, *callbacks: pl.Callback) -> tuple[float, DigitsDataModule]:
    """Test accuracy of a fresh head on a frozen backbone, trained on 40 % wrong labels."""
    data = DigitsDataModule(train="noisy", noise=SymmetricNoise(0.4, seed=0))
    fit = trainer(*callbacks, epochs=4, limit_val_batches=0)
    fit.fit(classifier(backbone), data)
    return fit.test(verbose=False, datamodule=data, model=fit.lightning_module)[0]["test/accuracy"], data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Accuracy and AUROC: plain, with a good reference, with one from shuffled labels; one backbone for all."""
    folder = tmp_path_factory.mktemp("digits")
    good = reference(DigitsDataModule(train="trusted"), folder / "good.ckpt")
    bad_head = reference(ShuffledLabels(train="trusted"), folder / "bad.ckpt")
    state = torch.load(good, weights_only=True)["state_dict"]
    shuffled = torch.load(bad_head, weights_only=True)["state_dict"]
    found = {"plain": (fitted(good)[0], 0.5)}
    for name, source in (("good", state), ("shuffled", {k: v for k, v in shuffled.items() if k.startswith("head")})):
        doubt = (
            pytest.warns(UserWarning, match="unsure: it knows less than the model .* moving towards it does not lower")
            if name == "shuffled"
            else nullcontext()
        )
        with doubt:
            accuracy, data = fitted(good, GradMimic(source, "head", ledger=folder / name))
        summary = curate(folder / name, unscored="keep", accept_verdict=True).manifest.table()
        place = {sample: k for k, sample in enumerate(data.noisy_ids.tolist())}
        scores = torch.tensor(summary["score"].to_pylist())
        wrong = data.wrong[[place[sample] for sample in summary["id"].to_pylist()]]
        found[name] = (accuracy, detect(scores, scores < 0, wrong).auroc)
    return found


def test_a_good_reference_finds_the_wrong_labels_and_helps(results):
    accuracy, auroc = results["good"]
    assert auroc > 0.97
    assert accuracy > results["plain"][0]


def test_a_reference_from_shuffled_labels_does_not_help(results):
    accuracy, auroc = results["shuffled"]
    assert auroc < 0.6
    # It knows less than the model, and once that is seen all weights are uniform.
    assert accuracy == pytest.approx(results["plain"][0], abs=0.01)
