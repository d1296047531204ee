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
# # Score sequences of a language model
#
# Fine-tuning data for language models are noisy, too. Here every *sequence* is a sample. Its loss is the mean over its own tokens,
# returned by a method `sample_losses`: the usual mean over all tokens of a batch would give long sequences more weight, and is
# refused.
#
# The model and the data are toys, small enough for a processor: sentences of a tiny grammar, a quarter of them with
# their words in random order. The steps are those that you would take with a real model.

# %%
import logging
import random
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(many workers|in eval mode at the start|no `val_dataloader`|treespec).*")
folder = Path(tempfile.mkdtemp())

WORDS = [
    "<pad>",
    "<start>",
    "the",
    "a",
    "small",
    "old",
    "dog",
    "bird",
    "child",
    "sees",
    "likes",
    "follows",
    "today",
    "often",
]
NUMBER = {word: number for number, word in enumerate(WORDS)}


def noun(draw):
    return [draw.choice(["the", "a"]), *draw.choice([[], ["small"], ["old"]]), draw.choice(["dog", "bird", "child"])]


def sentence(draw):
    verb = draw.choice(["sees", "likes", "follows"])
    return [*noun(draw), verb, *noun(draw), *draw.choice([[], ["today"], ["often"]])]


def as_tokens(words):
    tokens = [NUMBER["<start>"], *(NUMBER[word] for word in words)]
    return tokens + [0] * (11 - len(tokens))


def sentences(count, seed, share_shuffled=0.0):
    draw, rows, shuffled = random.Random(seed), [], []
    for _ in range(count):
        words, broken = sentence(draw), draw.random() < share_shuffled
        if broken:
            draw.shuffle(words)
        rows.append(as_tokens(words))
        shuffled.append(broken)
    return torch.tensor(rows), torch.tensor(shuffled)


clean, _ = sentences(400, seed=0)
mixed, broken = sentences(800, seed=1, share_shuffled=0.25)
print(f"{len(mixed)} sequences, {int(broken.sum())} of them shuffled")

# %% [markdown]
# ## A causal transformer with one loss per sequence
#
# `token_losses(logits, targets)` averages each sequence over its own targets. `training_step` returns the mean of `sample_losses`.

# %%
from lightning_mimic import token_losses


class LanguageModel(L.LightningModule):
    def __init__(self, width=32):
        super().__init__()
        self.embedding = torch.nn.Embedding(len(WORDS), width, padding_idx=0)
        self.position = torch.nn.Parameter(0.1 * torch.randn(10, width))
        layer = torch.nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, len(WORDS))
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(10), persistent=False)

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True))

    def sample_losses(self, batch):
        (tokens,) = batch
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)  # padding is no target
        return token_losses(self(tokens[:, :-1]), targets)

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


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
start = LanguageModel()
reference = LanguageModel()
reference.load_state_dict(start.state_dict())
fit(reference, DataLoader(TensorDataset(clean), 32, shuffle=True), 15)
print(f"loss of the reference on its own sentences: {reference.sample_losses([clean]).mean():.2f}")

# %% [markdown]
# ## Fine-tune from the same start, and score
#
# The new model begins with the weights from which the reference began, so that the difference of their weights has a
# meaning. All parameters of the head are scored.

# %%
from lightning_mimic import GradMimic, Ledger, WithIds, collate_with_ids

loader = DataLoader(WithIds(TensorDataset(mixed)), batch_size=32, shuffle=True, collate_fn=collate_with_ids)
model = LanguageModel()
model.load_state_dict(start.state_dict())
mimic = GradMimic(reference, "head", reweight="none", ledger=folder / "scores")
fit(model, loader, 5, [mimic])

# %% [markdown]
# ## Which sequences?
#
# The reference's own loss on each sequence is the simplest baseline, and it needs no training run. Both are measured here by the share
# of shuffled sentences among the lowest scores.

# %%
table = Ledger(folder / "scores").table().to_pandas()
score = torch.tensor(table.groupby("id")["score"].mean().sort_index().to_numpy())
baseline = -reference.sample_losses([mixed]).detach()


def auroc(good):
    """Probability that a shuffled sentence has a lower score than an intact one."""
    low, high = good[broken], good[~broken]
    return float((low[:, None] < high[None]).float().mean())


print(f"AUROC of the mimic score {auroc(score):.3f}, of the reference's loss {auroc(baseline):.3f}")
for place in score.argsort()[:4].tolist():
    print(f"{score[place]:+.3f}", " ".join(WORDS[token] for token in mixed[place].tolist()[1:] if token))

# %% [markdown]
# **What this shows.** Any loss that `sample_losses` returns per sample can be scored, sequences included.
# **What it does not show:** anything about a large language model. To find bad sequences only, the reference's loss alone is at least
# as good here, and cheaper (`scorer=ReferenceLoss()`).
