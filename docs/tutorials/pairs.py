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
# # Filter image-text pairs
#
# A pool of images with captions, some of which do not belong to their image; and a reference CLIP that somebody else trained. The result is
# a file of ids for DataComp's resharder. Everything is small here: digits with captions ("a photo of the digit three"), and two tiny towers.

# %%
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import open_clip
import torch

from lightning_mimic import Aligned, GradMimic
from lightning_mimic.curation import Posterior, curate
from lightning_mimic.data.digit_pairs import write_digit_shards
from lightning_mimic.data.image_text import ImageTextDataModule
from lightning_mimic.models import CLIP
from lightning_mimic.scorers import Posterior as PosteriorWeights

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|in eval mode at the start|no `val_dataloader`|treespec).*")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The pool
#
# `write_digit_shards` writes shards as img2dataset and DataComp do: an image, a caption and a json with the `uid` per pair. In the
# pool 40 % of the captions name another digit. The pairs of the reference match, and are never scored.

# %%
shards = folder / "shards"
write_digit_shards(shards, mismatched=0.4, seed=0)
transform = open_clip.image_transform(32, is_train=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)


def pairs(part):
    files = [str(path) for path in sorted((shards / part).glob("*.tar"))]
    return ImageTextDataModule(files, transform, tokenizer, batch_size=64, shuffle=1000)


def clip(seed):
    torch.manual_seed(seed)
    image = {"timm_model_name": "test_efficientnet_gn", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    return CLIP(open_clip.CLIP(64, image, text), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), warmup_steps=10)


def fit(model, data, epochs, callbacks=()):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet).fit(model, data)
    return model


reference = fit(clip(seed=0), pairs("reference"), 40)

# %% [markdown]
# ## Train on the pool, and score it
#
# The reference started from other weights, so it is `Aligned`: its embeddings are rotated into the new model's frame. `Posterior()`
# weights each pair by the probability that it matches, from the reference's own similarities, and records it.

# %%
parameters = ["towers.visual.head.proj", "towers.text_projection"]
mimic = GradMimic(Aligned(reference), parameters, weighting=PosteriorWeights(), ledger=folder / "scores")
model = fit(clip(seed=1), pairs("pool"), 6, [mimic])

# %% [markdown]
# ## Which pairs to keep
#
# `kept.npy` holds the uids as DataComp's resharder reads them.

# %%
curation = curate(folder / "scores", Posterior(), folder / "curated", exports=["datacomp"])
kept = np.load(folder / "curated" / "kept.npy")
print(f"keep {curation.kept} of {curation.samples} pairs; {len(kept)} uids of type {kept.dtype}")
print(f"estimated share of mismatched pairs: {curation.wrong_share}")

# %% [markdown]
# **What this shows.** The way from shards to a filter file, with a reference of any origin. Compare the estimate with the true share,
# 40 %: this small reference takes some matching pairs for mismatches. **What it does not show:** anything about web-scale pools: nothing of that size has been run. [DataComp](../datacomp.md) has the commands,
# [pairs with many captions](../evidence/pairs.md) the figures where captions vary more, also where the reference alone is better.
