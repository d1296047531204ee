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
# # Find wrong labels in a folder of images
#
# You have a folder of images with a subfolder per class, some images in the wrong subfolder, and a few hundred images that somebody
# has checked. This tutorial finds the wrong ones, in Python. [Own images](../start/own-images.md) does the same with commands.
#
# The data are 1,200 of scikit-learn's handwritten digits, written as PNG files; every fifth one of those that nobody checked goes
# into a wrong folder. The seed is fixed, and the true classes are used only to measure the result at the end.

# %%
import csv
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|in eval mode at the start|no `val_dataloader`|treespec).*")

folder = Path(tempfile.mkdtemp())
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits, draw = load_digits(), np.random.default_rng(0)
truth, checked = {}, []
for number, (pixels, label) in enumerate(zip(digits.images[:1200], digits.target[:1200], strict=True)):
    is_checked = number < 300
    given = label if is_checked or draw.random() > 0.2 else (label + draw.integers(1, 10)) % 10
    path = folder / "images" / names[given] / f"{number:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((16, 16)).convert("RGB").save(path)
    sample = f"{names[given]}/{path.name}"
    truth[sample] = names[label]
    if is_checked:
        checked.append(sample)
with (folder / "trusted.csv").open("w", newline="") as file:
    csv.writer(file).writerows([["file"], *([each] for each in checked)])
print(f"{len(truth)} images, {len(checked)} checked")

# %% [markdown]
# ## A reference from the checked images
#
# `ImageFolderDataModule` reads the folder and the list. Three quarters of the checked images train the reference, the others measure
# it. Samples that trained the reference are never scored.

# %%
from torchvision.transforms.v2 import Compose, Resize, ToDtype, ToImage

from lightning_mimic.data.image_folder import ImageFolderDataModule
from lightning_mimic.models import ImageClassifier, SmallConvNet

transform = Compose([ToImage(), Resize(16), ToDtype(torch.float32, scale=True)])


def data(train):
    return ImageFolderDataModule(folder / "images", transform, train=train, trusted=folder / "trusted.csv")


def classifier(**options):
    torch.manual_seed(0)
    return ImageClassifier(SmallConvNet(channels=3), num_classes=10, image_shape=(3, 16, 16), **options)


def trainer(epochs, callbacks=()):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet)


reference = classifier()
fit = trainer(25)
fit.fit(reference, data("trusted_fit"))
accuracy = fit.test(reference, data("trusted_fit"), verbose=False)[0]["test/accuracy"]
print(f"accuracy on checked images that are held out: {accuracy:.3f}")
torch.save(reference.state_dict(), folder / "reference.pt")

# %% [markdown]
# ## Train on the others, and record scores
#
# The new model takes the reference's backbone and gets a fresh head. `Posterior()` weights each image by the probability that its
# label is right; the reference is calibrated for this on the given labels, while the model trains.

# %%
from lightning_mimic import GradMimic
from lightning_mimic.curation import Posterior, curate
from lightning_mimic.scorers import Posterior as PosteriorWeights

model = classifier(pretrained=folder / "reference.pt", freeze_backbone=True)
mimic = GradMimic(folder / "reference.pt", "head", weighting=PosteriorWeights(), ledger=folder / "scores")
trainer(8, [mimic]).fit(model, data("noisy"))
curation = curate(folder / "scores", Posterior(), folder / "curated")
print(f"keep {curation.kept} of {curation.samples} images; estimated share of wrong labels: {curation.wrong_share}")

# %% [markdown]
# ## The most suspicious images
#
# Each image is shown with its folder and with the class that the model predicts.

# %%
import matplotlib.pyplot as plt

worst = curation.manifest.table().slice(0, 10).to_pylist()
figure, axes = plt.subplots(2, 5, figsize=(8, 4), layout="constrained")
for cell, row in zip(axes.flat, worst, strict=True):
    cell.imshow(Image.open(folder / "images" / row["id"]))
    cell.set_title(f"in {row['label_name']}\nlooks like {row['predicted_name']}", fontsize=10)
    cell.set_axis_off()

# %% [markdown]
# ## How well does it work?
#
# Here the truth is known, so the decisions can be counted.

# %%
rows = curation.manifest.table().to_pylist()
wrong = {row["id"] for row in rows if truth[row["id"]] != row["label_name"]}
dropped = {row["id"] for row in rows if not row["keep"]}
print(f"wrong: {len(wrong)} of {len(rows)} ({len(wrong) / len(rows):.1%})")
print(f"dropped: {len(dropped)}; of these wrong: {len(wrong & dropped) / len(dropped):.1%}")
print(f"wrong images that were found: {len(wrong & dropped) / len(wrong):.1%}")

# %% [markdown]
# **What this shows.** With 300 checked images, most wrong labels are found, and the share of wrong labels is estimated without
# knowing any of them. **What it does not show:** one small data set, one seed. Digits are easy; on photographs the reference needs a
# pretrained backbone. Look at the images in the [report](../guide/report.md) before you delete anything.
