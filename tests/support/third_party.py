"""One small module for each kind of batch and loss that other libraries' modules have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_mimic import token_losses
from support.batch_kinds import Graphs, graphs_of

CLASSES, FEATURES, HIDDEN, LENGTH, SAMPLES, WORDS = 3, 5, 8, 6, 4, 11


def drawn(*shape: int) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


class Kind(nn.Module):
    """A body, a head, and a loss. The batch is a dict of rows, unless a class says otherwise."""

    outputs = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def batch(self) -> Any:
        labels = torch.arange(SAMPLES) % CLASSES
        return {"x": drawn(SAMPLES, FEATURES), "y": labels, "z": drawn(SAMPLES, 2), "u": drawn(SAMPLES, FEATURES) ** 2}

    def alone(self, batch: Any, sample: int) -> Any:
        return {name: rows[sample : sample + 1] for name, rows in batch.items()}

    def loss(self, batch: Any) -> Tensor:
        return self.sample_losses(batch).mean()


class DictOfLosses(Kind):
    outputs = CLASSES + 2

    def loss(self, batch: Any) -> Tensor:
        out = self(batch["x"])
        losses = {
            "class": F.cross_entropy(out[:, :CLASSES], batch["y"]),
            "box": F.l1_loss(out[:, CLASSES:], batch["z"]),
        }
        return sum(weight * losses[name] for name, weight in {"class": 1.0, "box": 0.3}.items())


class Words(Kind):
    """A language model with position embeddings that all texts share."""

    outputs = WORDS

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, FEATURES), nn.Embedding(2 * LENGTH, FEATURES)

    def batch(self) -> Any:
        return {"words": torch.arange(SAMPLES * LENGTH).view(SAMPLES, LENGTH) ** 2 % WORDS}

    def logits(self, batch: Any) -> Tensor:
        embedded = self.words(batch["words"])
        return self(embedded + self.places(torch.arange(embedded.shape[1])[None]))

    def loss(self, batch: Any) -> Tensor:
        labels = F.pad(batch["words"], (0, 1), value=-100)[..., 1:].contiguous()  # none to predict at the end
        return F.cross_entropy(self.logits(batch).view(-1, WORDS), labels.view(-1), ignore_index=-100)


class PaddedWords(Words):
    def batch(self) -> Any:
        words = super().batch()["words"]
        return {"words": words, "labels": words.where(torch.arange(LENGTH) < torch.arange(3, 7)[:, None], -100)}

    def loss(self, batch: Any) -> Tensor:
        logits, labels = self.logits(batch)[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class OwnPaddedWords(PaddedWords):
    def sample_losses(self, batch: Any) -> Tensor:
        return token_losses(self.logits(batch)[:, :-1], batch["labels"][:, 1:])

    loss = Kind.loss


class JoinedGraphs(Kind):
    def batch(self) -> Any:
        return graphs_of(
            [(x, int(y)) for x, y in zip(drawn(SAMPLES, FEATURES), torch.arange(SAMPLES) % 3, strict=True)]
        )

    def alone(self, batch: Any, sample: int) -> Any:
        nodes, one = slice(2 * sample, 2 * sample + 2), slice(sample, sample + 1)
        return Graphs(
            x=batch.x[nodes], y=batch.y[one], batch=torch.zeros(2, dtype=torch.int64), ptr=torch.tensor([0, 2])
        )

    def pooled(self, batch: Any) -> Tensor:
        hidden = torch.tanh(self.body(batch.x)) ** 2
        return torch.zeros(batch.num_graphs, HIDDEN).double().index_add(0, batch.batch, hidden)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.pooled(batch)), batch.y)


class ScaledGraphs(JoinedGraphs):
    """A factor of the batch is in an attribute of the graphs."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * batch.x.square().mean()


class Nodes(JoinedGraphs):
    def loss(self, batch: Any) -> Tensor:
        trained = torch.arange(2 * SAMPLES) % 2 == 0
        return F.cross_entropy(self(batch.x)[trained], batch.batch[trained] % CLASSES)


@dataclass
class Batch:
    """Rows in fields, and what is no tensor."""

    image: Tensor
    label: Tensor
    paths: list[str] | None = None


class Fields(Kind):
    def batch(self) -> Any:
        return Batch(drawn(SAMPLES, FEATURES), torch.arange(SAMPLES) % CLASSES, ["a", "b", "c", "d"])

    def alone(self, batch: Any, sample: int) -> Any:
        return Batch(batch.image[sample : sample + 1], batch.label[sample : sample + 1])

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch.image), batch.label)


class LowRank(Kind):
    """Adapters beside frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)
        self.head.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) + 0.5 * self.up(F.dropout(self.down(x), 0.0))))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])


class Mixed(Kind):
    """Each row is mixed with that of another sample, and so are the targets."""

    def mixed(self, batch: Any) -> Any:
        soft = F.one_hot(batch["y"], CLASSES) * 0.9 + 0.1 / CLASSES
        return {"x": 0.7 * batch["x"] + 0.3 * batch["x"].flip(0), "soft": 0.7 * soft + 0.3 * soft.flip(0)}

    def alone(self, batch: Any, sample: int) -> Any:
        return super().alone(self.mixed(batch), sample)

    def loss(self, batch: Any) -> Tensor:
        batch = batch if "soft" in batch else self.mixed(batch)
        return torch.sum(-batch["soft"] * F.log_softmax(self(batch["x"]), dim=-1), dim=-1).mean()


class Distribution(Kind):
    outputs = 4

    def loss(self, batch: Any) -> Tensor:
        place, scale = self(batch["x"]).chunk(2, dim=1)
        return -Normal(place, F.softplus(scale) + 1e-3).log_prob(batch["z"]).mean()


class Quantiles(Kind):
    outputs = 2 * 3

    def loss(self, batch: Any) -> Tensor:
        quantiles = torch.tensor([0.1, 0.5, 0.9]).double()
        errors = batch["z"][..., None] - self(batch["x"]).view(-1, 2, 3)
        return torch.max((quantiles - 1) * errors, quantiles * errors).sum(-1).mean()


class Autoencoder(Kind):
    """Counts are reconstructed from a drawn latent variable; the noise is that of the batch."""

    outputs = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.place, self.scale = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 2)
        self.body = nn.Linear(2, HIDDEN)

    def loss(self, batch: Any) -> Tensor:
        latent = Normal(self.place(batch["u"]), F.softplus(self.scale(batch["u"])))
        z = latent.loc + latent.scale * (0 * torch.randn_like(latent.loc) + 0.6)
        divergence = torch.distributions.kl_divergence(latent, Normal(0.0, 1.0)).sum(1)
        return (F.poisson_nll_loss(self(z), batch["u"], reduction="none").sum(1) + 0.3 * divergence).mean()


class Missing(Kind):
    """Several targets, of which some are NaN."""

    def batch(self) -> Any:
        targets = drawn(SAMPLES, CLASSES)
        targets[0, 0] = targets[1, 2] = targets[1, 1] = torch.nan
        return {"x": drawn(SAMPLES, FEATURES), "t": targets}

    def errors(self, batch: Any) -> tuple[Tensor, Tensor]:
        known = batch["t"].isfinite()
        return (self(batch["x"]) - batch["t"].nan_to_num()) ** 2 * known, known

    def loss(self, batch: Any) -> Tensor:
        errors, known = self.errors(batch)
        return errors.sum() / known.sum()


class OwnMissing(Missing):
    def sample_losses(self, batch: Any) -> Tensor:
        errors, known = self.errors(batch)
        return errors.sum(1) / known.sum(1)

    loss = Kind.loss


class Complete(Missing):
    """None of the targets is missing, which the operations do not show."""

    def batch(self) -> Any:
        return {"x": drawn(SAMPLES, FEATURES), "t": drawn(SAMPLES, CLASSES)}


class TwoHeads(Kind):
    """Each of two heads has a loss of its own, so that no tensor has all that the loss is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, 2)

    def outputs_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(batch["x"]))
        return self.head(hidden), self.other(hidden)

    def loss(self, batch: Any) -> Tensor:
        classes, box = self.outputs_of(batch)
        return F.cross_entropy(classes, batch["y"]) + F.mse_loss(box, batch["z"])


class OwnTwoHeads(TwoHeads):
    def sample_losses(self, batch: Any) -> Tensor:
        classes, box = self.outputs_of(batch)
        return F.cross_entropy(classes, batch["y"], reduction="none") + (box - batch["z"]).square().mean(1)

    loss = Kind.loss


class DetachedView(Kind):
    """The second view of a sample is a target without gradient."""

    def loss(self, batch: Any) -> Tensor:
        return -F.cosine_similarity(self(batch["x"]), self(batch["u"]).detach()).mean()


class TwoViews(Kind):
    """Both views of a sample pass through the same layers, one after the other, and each is the other's target."""

    def similarities(self, batch: Any) -> tuple[Tensor, Tensor]:
        one, two = self(batch["x"]), self(batch["u"])
        return F.cosine_similarity(one, two.detach()), F.cosine_similarity(two, one.detach())

    def loss(self, batch: Any) -> Tensor:
        one, two = self.similarities(batch)
        return -0.5 * (one.mean() + two.mean())


class OwnTwoViews(TwoViews):
    def sample_losses(self, batch: Any) -> Tensor:
        return -0.5 * sum(self.similarities(batch))

    loss = Kind.loss


class Overlap(Kind):
    """Jaccard's index of the whole batch."""

    def ratio(self, batch: Any, axes: tuple[int, ...]) -> Tensor:
        p, t = self(batch["x"]).sigmoid(), F.one_hot(batch["y"], CLASSES)
        return 1 - (p * t).sum(axes) / (p + t - p * t).sum(axes).clamp_min(1e-7)

    def loss(self, batch: Any) -> Tensor:
        return self.ratio(batch, (0, 1))


class OwnOverlap(Overlap):
    def sample_losses(self, batch: Any) -> Tensor:
        return self.ratio(batch, (1,))

    loss = Kind.loss


class Lengths(Kind):
    """A sum over all steps, divided by the sum of the lengths."""

    def loss(self, batch: Any) -> Tensor:
        errors = (self(batch["x"])[:, :2] - batch["z"]).abs()
        lengths = torch.full((len(errors),), errors.shape[1])
        return errors.sum() / lengths.sum()


#: Scored as they are.
SCORED: dict[str, Callable[[], Kind]] = {
    "dict of losses, summed": DictOfLosses,
    "shifted labels, one ignored per row": Words,
    "batch of graphs": JoinedGraphs,
    "dataclass batch": Fields,
    "LoRA parameters": LowRank,
    "mixup, soft targets": Mixed,
    "distribution head": Distribution,
    "quantile loss": Quantiles,
    "variational autoencoder": Autoencoder,
    "second view without gradient": DetachedView,
}

#: Refused with a part of the sentence; what is scored in its place, and with which arguments.
REFUSED: dict[str, tuple[Callable[[], Kind], str, Callable[[], Kind] | None, dict[str, Any]]] = {
    "different numbers of targets": (PaddedWords, "different numbers of them", OwnPaddedWords, {}),
    "NaN-masked targets": (Missing, "normaliser", OwnMissing, {"on_nonfinite": "mask_loss"}),
    "mask of targets that are all there": (Complete, "its normaliser", Complete, {"loss": "mean"}),
    "sum over lengths": (Lengths, "it is a sum over the batch", Lengths, {"loss": "mean"}),
    "two heads": (TwoHeads, "no tensor with a row|reaches 4 trainable parameters around", OwnTwoHeads, {}),
    "two views": (TwoViews, "no tensor with a row", OwnTwoViews, {}),
    "overlap of the whole batch": (Overlap, "a mean or a sum over the batch", OwnOverlap, {}),
    "factor of a graph's attribute": (ScaledGraphs, "its normaliser or factor depends on the batch", None, {}),
    "nodes of one graph": (Nodes, "plain mean over samples", None, {}),
}
