"""Reference batches of labelled parts: the same noisy data again, or trusted samples; and their commands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import LightningDataModule

from lightning_mimic import Ledger
from lightning_mimic.cli.scoring import score
from lightning_mimic.cli.training import train
from lightning_mimic.data.comparison import comparison_loader, trusted_loader
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(noise=SymmetricNoise(0.4), batch_size=100, **options)


def ids_of(loader: Any) -> list[int]:
    return [each for batch in loader for each in batch.ids.tolist()]


def test_the_noisy_part_is_gone_through_again_in_an_order_of_its_own():
    data = digits()
    loader, plain = comparison_loader(data), ids_of(digits_ready().train_dataloader())
    training = data.train_dataloader()
    passes = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        passes.append(ids_of(loader))
    assert ids_of(training) == plain  # whatever was drawn beside it
    assert passes[0] == passes[2]
    assert len({tuple(each) for each in (*passes, plain)}) == 3
    assert {tuple(sorted(each)) for each in passes} == {tuple(sorted(plain))}
    given = dict(zip(data.noisy_ids.tolist(), data.given_labels.tolist(), strict=True))
    for batch in loader:
        images, labels = batch
        assert labels.tolist() == [given[each] for each in batch.ids.tolist()]
        torch.testing.assert_close(images, data.images(batch.ids), rtol=0, atol=0)
        assert len(labels) in (100, 97)


def digits_ready() -> DigitsDataModule:
    data = digits()
    data.setup()
    return data


def test_trusted_samples_are_a_few_of_every_class_and_neither_noisy_nor_of_the_test():
    data = digits()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ((images, labels),) = trusted_loader(data, per_class=4, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert labels.bincount().tolist() == [4] * 10
    source = data.sources["train"]
    same = (source.images[:, None] == images).flatten(2).all(2)  # digits are all different
    rows = same.int().argmax(0)
    assert bool(same.any(0).all())
    assert set(rows.tolist()) <= set(data.rows["trusted"].tolist())
    assert not set(rows.tolist()) & (set(data.noisy_ids.tolist()) | set(data.rows["test"].tolist()))
    assert labels.tolist() == source.labels[rows].tolist()
    assert torch.equal(trusted_loader(digits(), 4, 2)[0][0], images)
    assert not torch.equal(trusted_loader(digits(), 4, 3)[0][0], images)


class Scarce(DigitsDataModule):
    """Without trusted samples."""

    def divide(self, labels: torch.Tensor) -> Any:
        rows = dict(super().divide(labels))
        return rows | dict.fromkeys(("trusted_fit", "trusted_held"), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: trusted_loader(Scarce()),
            "`per_class` is 5, but class 0 has 0 trusted samples (0 in all classes). Choose a smaller number, or "
            "a larger trusted share of the training split (`trusted` of the data module; with experiment=paper/... by "
            "reference=trusted_split).",
        ),
        (
            lambda: trusted_loader(digits(), per_class=19),
            "`per_class` is 19, but class 1 has 17 trusted samples (200 in all classes). Choose a smaller number, or "
            "a larger trusted share of the training split (`trusted` of the data module; with experiment=paper/... by "
            "reference=trusted_split).",
        ),
        (
            lambda: trusted_loader(digits(), per_class=0),
            "`per_class` is 0; expected a number of trusted samples per class, 1 or more.",
        ),
        (
            lambda: comparison_loader(LightningDataModule()),
            "`data` is a LightningDataModule; expected a data module of labelled images in parts, such as "
            "DigitsDataModule. For other data give the scorer a DataLoader of your own.",
        ),
    ],
)
def test_what_gives_no_reference_batch_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def composed(root: str, folder: Path, *overrides: str) -> Any:
    quiet = ["trainer.enable_progress_bar=false", f"paths.output={folder}", f"paths.reference={folder / 'r.ckpt'}"]
    quiet += ["trainer.enable_checkpointing=false", "logger=none"] if root == "train" else []
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        return compose(root, overrides=[*quiet, *overrides])


@pytest.mark.slow
def test_every_competitor_trains_and_scores_from_its_configuration(tmp_path):
    said = [
        f"save_to={tmp_path / 'r.ckpt'}",
        "mimic=none",
        "trainer.max_epochs=1",
        "test=false",
        "+trainer.limit_train_batches=2",
    ]
    train(composed("train", tmp_path, "experiment=digits_reference", *said))
    settings = {}
    for name in ("agra", "influence", "grad_match"):
        how = ["experiment=digits_noisy", f"mimic={name}", "trainer.max_epochs=1", "+trainer.limit_train_batches=2"]
        train(composed("train", tmp_path / name, *how, f"paths.reference={tmp_path / 'r.ckpt'}", "test=false"))
        ledger = Ledger(tmp_path / name / "scores")
        settings[name] = ledger.meta["attempts"][0]["config"]
        assert ledger.table().num_rows == 64
    expected = {"dataset": "lightning_mimic.data.splits.LabelledRows", "samples": 1097}
    assert settings["agra"]["reference_batches"] == expected
    assert (settings["agra"]["temperature"], settings["agra"]["min_ess"]) == (None, None)
    assert (settings["influence"]["temperature"], settings["influence"]["min_ess"]) == (1.0, 0.25)
    assert settings["grad_match"]["scorer_settings"] == {"fraction": 0.3, "regularization": 0.5}
    how = [
        "experiment=digits_curation",
        "mimic=agra",
        "mimic.temperature=null",
        "+trainer.limit_train_batches=2",
        f"checkpoints=[{tmp_path / 'r.ckpt'}]",
    ]
    assert score(composed("score", tmp_path, *how, f"ledger={tmp_path / 'scored'}")).table().num_rows == 64
