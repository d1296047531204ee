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
# # A reference of another origin
#
# Your reference has another architecture than your model, or started from other weights. The difference between their weights then
# means nothing. `Aligned` uses the reference's outputs instead: it refits your model's last layer to them, on the model's own features.
#
# The data are 1,297 of scikit-learn's digits, 40 % of them with a wrong label. 500 other images train the reference, a wider network.

# %%
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|in eval mode at the start|no `val_dataloader`|treespec).*")
folder = Path(tempfile.mkdtemp())

digits = load_digits()
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
torch.manual_seed(0)
wrong = torch.rand(1297) < 0.4
given = torch.where(wrong, (labels[500:] + torch.randint(1, 10, (1297,))) % 10, labels[500:])
noisy = TensorDataset(images[500:], given)


# %%
class Classifier(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU())
        self.head = torch.nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def fit(model, loader, epochs, callbacks=()):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet).fit(model, loader)
    return model.eval()


torch.manual_seed(0)
reference = fit(Classifier(256), DataLoader(TensorDataset(images[:500], labels[:500]), 32, shuffle=True), 30)
accuracy = (reference(images[500:]).argmax(1) == labels[500:]).float().mean()
print(f"accuracy of the reference on images that it has not seen: {accuracy:.3f}")

# %% [markdown]
# ## Not aligned, and aligned
#
# A smaller model is trained twice and only scored (`reweight="none"`). The first run takes a reference of the *same* architecture from other
# initial weights as it is; the verdict says what is wrong with it. The second one aligns the wide network.

# %%
loader = DataLoader(WithIds(noisy), batch_size=32, shuffle=True, collate_fn=collate_with_ids)
torch.manual_seed(1)
unrelated = fit(Classifier(64), DataLoader(TensorDataset(images[:500], labels[:500]), 32, shuffle=True), 30)


def auroc(reference, name):
    """Probability that an image with a wrong label has a lower mean score than one with a right label."""
    torch.manual_seed(2)
    fit(Classifier(64), loader, 8, [GradMimic(reference, "head", reweight="none", ledger=folder / name)])
    ledger = Ledger(folder / name)
    table = ledger.table().to_pandas().dropna(subset="score")
    score = torch.tensor(table.groupby("id")["score"].mean().sort_index().to_numpy())
    verdict = ledger.meta["attempts"][-1].get("diagnosis", {}).get("verdict", "not diagnosed")
    return float((score[wrong][:, None] < score[~wrong][None]).float().mean()), verdict


for name, given_reference in (
    ("not aligned", unrelated),
    ("aligned", Aligned(reference, inputs=lambda batch: batch[0])),
):
    found, verdict = auroc(given_reference, name)
    print(f"{name}: AUROC of finding wrong labels {found:.3f}; verdict: {verdict}")

# %% [markdown]
# **What this shows.** Scores between weights of different origin are worse than useless, and the verdict says so before you rely on
# them. Aligned, a network of another width finds the wrong labels. **What it does not show:** what weights do during training; see
# [an aligned reference](../evidence/aligned.md), with spread over seeds and cases in which it loses.
