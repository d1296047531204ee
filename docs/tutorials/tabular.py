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
# # Score a tabular model of your own
#
# Nothing in the package is specific to images. This tutorial uses a plain LightningModule on a table that scikit-learn makes up: 4,000 rows
# with 20 measurements and three classes. In 30 % of the training rows the label is wrong. A reference is trained on 300 rows whose labels
# were checked.

# %%
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|in eval mode at the start|no `val_dataloader`|treespec).*")
folder = Path(tempfile.mkdtemp())

table, classes = make_classification(
    4000, 20, n_informative=10, n_classes=3, n_clusters_per_class=2, class_sep=1.5, flip_y=0, random_state=0
)
rest, test = train_test_split(range(4000), test_size=1000, random_state=0, stratify=classes)
checked, noisy = train_test_split(rest, train_size=300, random_state=0, stratify=classes[rest])
inputs, labels = torch.tensor(table, dtype=torch.float32), torch.tensor(classes)
torch.manual_seed(0)
wrong = torch.rand(len(noisy)) < 0.3
given = torch.where(wrong, (labels[noisy] + torch.randint(1, 3, (len(noisy),))) % 3, labels[noisy])
print(
    f"{len(checked)} checked rows, {len(noisy)} others of which {int(wrong.sum())} have a wrong label, {len(test)} for the test"
)

# %% [markdown]
# ## Your module, as it is
#
# `training_step` returns the mean loss of the batch. The package shows in the first step that this is a plain mean, and would refuse
# it otherwise.


# %%
class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU())
        self.head = torch.nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=1e-3)


def fit(model, loader, epochs, callbacks=()):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet).fit(model, loader)
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return float((model(inputs[test]).argmax(1) == labels[test]).float().mean())


torch.manual_seed(0)
reference = fit(Classifier(), DataLoader(TensorDataset(inputs[checked], labels[checked]), 32, shuffle=True), 30)
print(f"test accuracy of the reference: {accuracy(reference):.3f}")

# %% [markdown]
# ## Three lines more
#
# `WithIds` gives every row an id, `collate_with_ids` puts the ids into the batch, `GradMimic` does the rest. The new model starts from
# the reference's body, so that their heads are comparable. `reweight="none"` only scores: training is plain.

# %%
from lightning_mimic import GradMimic, WithIds, collate_with_ids
from lightning_mimic.scorers import Posterior

dataset = TensorDataset(inputs[noisy], given)
dataset.class_names = ["red", "green", "blue"]


def new_model():
    torch.manual_seed(1)
    model = Classifier()
    model.body.load_state_dict(reference.body.state_dict())
    return model


loader = DataLoader(WithIds(dataset), batch_size=32, shuffle=True, collate_fn=collate_with_ids)
mimic = GradMimic(reference.state_dict(), "head", weighting=Posterior(), reweight="none", ledger=folder / "scores")
plain = fit(new_model(), loader, 15, [mimic])
print(f"test accuracy of plain training: {accuracy(plain):.3f}")

# %% [markdown]
# ## Rows to look at

# %%
from lightning_mimic import curation

result = curation.curate(folder / "scores", curation.Posterior())
columns = ["id", "label_name", "predicted_name", "posterior", "keep"]
worst = result.manifest.table().select(columns)
for row in worst.slice(0, 5).to_pylist():
    print(row)
dropped = torch.tensor([row["id"] for row in worst.to_pylist() if not row["keep"]])
print(f"dropped {len(dropped)} rows, {int(wrong[dropped].sum())} of them wrong; {int(wrong.sum())} were wrong")

# %% [markdown]
# ## Train on what is kept

# %%
kept = result.manifest.subset(dataset)
clean = fit(new_model(), DataLoader(kept, 32, shuffle=True), 15)
print(f"test accuracy: {accuracy(plain):.3f} on all rows, {accuracy(clean):.3f} on the {len(kept)} that are kept")

# %% [markdown]
# **What this shows.** The same three lines serve any data set and module, and most wrong labels are found.
# **What it does not show:** that training gets better without them. On this table it does not: a small model averages such
# random noise out, and the rows that are dropped by mistake are the hard ones. This is one seed of a small, artificial table;
# [evidence](../evidence/index.md) has comparisons with spread.
