# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # See and decide
#
# Filters make mistakes. This tutorial looks at what a filter drops, corrects decisions by hand, and trains on the result. The data are the
# embedded digits, 40 % of 1,097 images with a wrong label; the reference learns 200 other ones.

# %%
import csv
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch

from lightning_mimic import GradMimic
from lightning_mimic.curation import Posterior, curate, report
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.models import ImageClassifier, SmallConvNet
from lightning_mimic.scorers import Posterior as PosteriorWeights

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|in eval mode at the start|treespec).*")
folder = Path(tempfile.mkdtemp())


def trainer(epochs, callbacks=()):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet)


def classifier(**options):
    torch.manual_seed(0)
    return ImageClassifier(SmallConvNet(), 10, (1, 8, 8), **options)


reference = classifier()
trainer(40).fit(reference, DigitsDataModule("trusted"))
torch.save(reference.state_dict(), folder / "reference.pt")
noisy = DigitsDataModule("noisy", SymmetricNoise(0.4))
model = classifier(pretrained=folder / "reference.pt", freeze_backbone=True)
mimic = GradMimic(folder / "reference.pt", "head", weighting=PosteriorWeights(), ledger=folder / "scores")
trainer(5, [mimic]).fit(model, noisy)

# %% [markdown]
# ## Decide, and look
#
# In a notebook, a curation shows its figures and the most suspicious samples.

# %%
first = curate(folder / "scores", Posterior(), folder / "first")
first.show(noisy, samples=8)

# %% [markdown]
# `report` writes a page with everything: distribution, classes, and a gallery in which you keep, drop and relabel samples with
# the keyboard. It downloads your corrections as a CSV file.

# %%
page = report(first.manifest, noisy, folder / "page", ledger=folder / "scores")
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB, opens from the disk and sends nothing")

# %% [markdown]
# ## Correct by hand
#
# Here the truth is known, so this cell plays the person: it looks at the 40 dropped images whose posterior is highest, and at nothing else,
# and relabels each one with what is on it.

# %%
dropped = [row for row in first.manifest.table().to_pylist() if not row["keep"]]
looked_at = sorted(dropped, key=lambda row: -row["posterior"])[:40]
truth = dict(zip(noisy.noisy_ids.tolist(), noisy.true_labels.tolist(), strict=True))
with (folder / "corrections.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["id", "keep", "label"])
    writer.writerows([row["id"], "true", truth[row["id"]]] for row in looked_at)
second = curate(folder / "scores", Posterior(), folder / "second", corrections=folder / "corrections.csv")
print(
    f"kept: {first.kept} before, {second.kept} after; right among the 40: {sum(truth[r['id']] == r['label'] for r in looked_at)}"
)

# %% [markdown]
# ## Train on the result
#
# `subset` is a torch data set with the corrected labels. Nothing else changes in the training.

# %%
for name, manifest in (("everything", None), ("kept by the filter", first), ("corrected by hand", second)):
    data = DigitsDataModule(
        "noisy", SymmetricNoise(0.4), keep=None if manifest is None else folder / manifest.manifest.path
    )
    fit = trainer(10)
    trained = classifier()
    fit.fit(trained, data)
    accuracy = fit.test(trained, data, verbose=False)[0]["test/accuracy"]
    print(f"{name}: test accuracy {accuracy:.3f}")

# %% [markdown]
# **What this shows.** Decisions can be seen, corrected and applied, and the manifest records which ones were made by hand.
# **What it does not show:** one seed on one easy data set says little about the accuracies. `mimic-compare page=` shows two manifests side
# by side ([the report](../guide/report.md)).
