"""Losses as people write them: of scores over classes and a batch, to a scalar."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, FEATURES, HIDDEN = 5, 6, 8

Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


def batch_of(samples: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of all that the losses need, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(samples, FEATURES),
        "y": torch.randint(0, CLASSES, (samples,), generator=generator),
        "z": torch.randint(0, CLASSES, (samples,), generator=generator),
        "soft": normal(samples, CLASSES).softmax(1),
        "real": normal(samples, CLASSES),
        "w": torch.rand(samples, generator=generator, dtype=torch.float64) + 0.1,
        "sign": torch.where(normal(samples) > 0, 1.0, -1.0).double(),
        "mask": normal(samples, CLASSES) > -0.5,
        "id": torch.arange(samples),
    }


class Net(nn.Module):
    """A body, a head, and a loss of the head's scores."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.loss_of = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        return self.loss_of(self(batch["x"]), batch)


class WithOwnLosses(Net):
    """Each sample's loss is that of a batch of its own."""

    def sample_losses(self, batch: dict[str, Tensor]) -> Tensor:
        rows = self(batch["x"]).split(1)
        return torch.stack([self.loss_of(row, only(batch, i)) for i, row in enumerate(rows)])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.sample_losses(batch).mean()


def net(kind: type[Net], loss: Loss, seed: int = 0) -> Net:
    """A net in float64 with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(loss).double()


def only(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """A batch of one of the samples."""
    return {name: tensor[sample : sample + 1] for name, tensor in batch.items()}


def alone(module: Net, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-sample gradients ``(B, *shape)`` by name: each sample in a batch of its own, one after the other."""
    named = dict(module.named_parameters())
    rows = []
    for i in range(len(batch["x"])):
        loss = module.loss_of(module(batch["x"][i : i + 1]), only(batch, i))
        rows.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(parts) for name, parts in zip(named, zip(*rows, strict=True), strict=True)}


def each(logits: Tensor, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return F.cross_entropy(logits, batch["y"], reduction="none", **options)


def focal(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (1 - torch.exp(-each(logits, batch))) ** 2


def mixup(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return 0.3 * F.cross_entropy(logits, batch["y"]) + 0.7 * F.cross_entropy(logits, batch["z"])


def vae(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mean, log_variance = logits[:, :2], logits[:, 2:4]
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (F.mse_loss(logits, batch["real"], reduction="sum") + divergence) / len(logits)


def uncertainty(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    losses = torch.stack([F.cross_entropy(logits, batch["y"]), F.mse_loss(logits, batch["real"])])
    return (losses * torch.tensor([0.3, 1.7]).double() + 0.1).sum()


def one_hot(batch: dict[str, Tensor]) -> Tensor:
    return torch.zeros(len(batch["y"]), CLASSES).double().scatter_(1, batch["y"][:, None], 1.0)


def ctc(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    steps, lengths = logits.log_softmax(1).expand(6, -1, -1), torch.full((len(logits),), 6)
    return F.ctc_loss(steps, batch["y"][:, None].clamp(min=1), lengths, torch.ones_like(lengths))


def with_class_zeroed(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    logits, factors = logits.clone(), torch.ones_like(logits)
    logits[:, 0] = 0
    logits[:, 1] = torch.ones(len(logits)).double()
    factors[:, 3:] = 0.5
    return F.mse_loss(logits * factors, batch["real"])


PER_CLASS = torch.linspace(0.5, 2.0, CLASSES).double()
LIMITS = torch.linspace(0.2, 0.9, CLASSES - 1).double()

#: Plain means of the samples' own losses: all of these are to be scored.
PLAIN: dict[str, Loss] = {
    "cross-entropy": lambda p, b: F.cross_entropy(p, b["y"]),
    "cross-entropy, a module": lambda p, b: nn.CrossEntropyLoss()(p, b["y"]),
    "cross-entropy, smoothed": lambda p, b: F.cross_entropy(p, b["y"], label_smoothing=0.1),
    "cross-entropy, soft targets": lambda p, b: F.cross_entropy(p, b["soft"]),
    "cross-entropy, soft targets, weighted": lambda p, b: F.cross_entropy(p, b["soft"], weight=PER_CLASS),
    "cross-entropy, each averaged": lambda p, b: each(p, b).mean(),
    "cross-entropy, each averaged, class weights": lambda p, b: each(p, b, weight=PER_CLASS).mean(),
    "cross-entropy, sum over B": lambda p, b: F.cross_entropy(p, b["y"], reduction="sum") / len(p),
    "cross-entropy, sum times 1/B": lambda p, b: each(p, b).sum() * (1 / len(p)),
    "cross-entropy by hand": lambda p, b: (torch.logsumexp(p, 1) - p.gather(1, b["y"][:, None])[:, 0]).mean(),
    "cross-entropy by index": lambda p, b: -p.log_softmax(1)[torch.arange(len(p)), b["y"]].mean(),
    "cross-entropy by one-hot": lambda p, b: -(F.one_hot(b["y"], CLASSES) * p.log_softmax(1)).sum(1).mean(),
    "cross-entropy by a scattered one-hot": lambda p, b: -(one_hot(b) * p.log_softmax(1)).sum(1).mean(),
    "cross-entropy and a constant": lambda p, b: F.cross_entropy(p, b["y"]) + 3.0,
    "cross-entropy, classes by limits": lambda p, b: F.cross_entropy(p, torch.bucketize(b["w"], LIMITS)),
    "nll": lambda p, b: F.nll_loss(p.log_softmax(1), b["y"]),
    "nll, ignored in each": lambda p, b: F.nll_loss(p.log_softmax(1), b["y"], ignore_index=-100),
    "mse": lambda p, b: F.mse_loss(p, b["real"]),
    "mse by hand": lambda p, b: ((p - b["real"]) ** 2).mean(),
    "mse, summed over features": lambda p, b: F.mse_loss(p, b["real"], reduction="none").sum(1).mean(),
    "mse, sum over elements": lambda p, b: (p - b["real"]).square().sum() / p.numel(),
    "mse, repeated for several targets": lambda p, b: F.mse_loss(p.repeat(1, 2), torch.cat([b["real"], b["soft"]], 1)),
    "l1": lambda p, b: F.l1_loss(p, b["real"]),
    "smooth l1": lambda p, b: F.smooth_l1_loss(p, b["real"]),
    "huber": lambda p, b: F.huber_loss(p, b["real"], delta=0.7),
    "log-cosh": lambda p, b: torch.log(torch.cosh(p - b["real"])).mean(),
    "quantiles": lambda p, b: torch.maximum(0.2 * (p - b["real"]), -0.8 * (p - b["real"])).mean(),
    "bce": lambda p, b: F.binary_cross_entropy(p.sigmoid(), b["soft"]),
    "bce with logits": lambda p, b: F.binary_cross_entropy_with_logits(p, b["soft"]),
    "bce with logits, pos_weight": lambda p, b: F.binary_cross_entropy_with_logits(p, b["soft"], pos_weight=PER_CLASS),
    "bce with logits, weighted samples": lambda p, b: F.binary_cross_entropy_with_logits(
        p, b["soft"], weight=b["w"][:, None]
    ),
    "kl, batchmean": lambda p, b: F.kl_div(p.log_softmax(1), b["soft"], reduction="batchmean"),
    "kl, mean over elements": lambda p, b: F.kl_div(p.log_softmax(1), b["soft"], reduction="sum") / p.numel(),
    "kl of log targets": lambda p, b: F.kl_div(
        p.log_softmax(1), b["soft"].log(), reduction="batchmean", log_target=True
    ),
    "focal": lambda p, b: (focal(p, b) * each(p, b)).mean(),
    "focal, detached": lambda p, b: (focal(p, b).detach() * each(p, b)).mean(),
    "focal, alpha": lambda p, b: (PER_CLASS[b["y"]] * focal(p, b) * each(p, b)).mean(),
    "multi-class margin": lambda p, b: F.multi_margin_loss(p, b["y"]),
    "multi-label margin": lambda p, b: F.multilabel_margin_loss(p, b["mask"].long()),
    "multi-label soft margin": lambda p, b: F.multilabel_soft_margin_loss(p, b["mask"].double()),
    "soft margin": lambda p, b: F.soft_margin_loss(p, b["real"].sign()),
    "hinge embedding": lambda p, b: F.hinge_embedding_loss(p, b["real"].sign()),
    "margin ranking": lambda p, b: F.margin_ranking_loss(p[:, 0], p[:, 1], b["sign"], margin=0.3),
    "cosine embedding": lambda p, b: F.cosine_embedding_loss(p, b["real"], b["sign"]),
    "triplet": lambda p, b: F.triplet_margin_loss(p, b["real"], b["soft"]),
    "triplet, own distance": lambda p, b: F.triplet_margin_with_distance_loss(p, b["real"], b["soft"]),
    "gaussian nll": lambda p, b: F.gaussian_nll_loss(p, b["real"], b["soft"]),
    "poisson nll": lambda p, b: F.poisson_nll_loss(p, b["soft"]),
    "a distribution": lambda p, b: -torch.distributions.Normal(p[:, 0], b["w"]).log_prob(b["real"][:, 0]).mean(),
    "mixup": mixup,
    "a sum of tasks": lambda p, b: F.cross_entropy(p, b["y"]) + 0.5 * F.mse_loss(p, b["real"]),
    "tasks with weights": uncertainty,
    "distillation": lambda p, b: (
        0.1 * F.cross_entropy(p, b["y"])
        + 0.9 * 16 * F.kl_div((p / 4).log_softmax(1), (b["real"] / 4).softmax(1), reduction="batchmean")
    ),
    "an auxiliary term": lambda p, b: F.cross_entropy(p, b["y"]) + 0.01 * p.square().mean(),
    "entropy of each": lambda p, b: F.cross_entropy(p, b["y"]) - 0.1 * -(p.softmax(1) * p.log_softmax(1)).sum(1).mean(),
    "a sum of squares over B": vae,
    "weighted samples": lambda p, b: (each(p, b) * b["w"]).mean(),
    "masked elements": lambda p, b: ((p - b["real"]).square() * b["mask"]).mean(),
    "filled elements": lambda p, b: F.mse_loss(p.masked_fill(~b["mask"], 0.0), b["real"]),
    "a mean over each one's mask": lambda p, b: (
        ((p - b["real"]).square() * b["mask"]).sum(1) / b["mask"].sum(1).clamp(min=1)
    ).mean(),
    "top scores of each": lambda p, b: p.topk(2, dim=1)[0].mean() + F.cross_entropy(p, b["y"]),
    "asymmetric": lambda p, b: -(b["soft"] * F.logsigmoid(p) + (1 - b["soft"]) * F.logsigmoid(-p).exp()).sum() / len(p),
    "generalised": lambda p, b: ((1 - p.softmax(1).gather(1, b["y"][:, None]) ** 0.7) / 0.7).mean(),
    "symmetric": lambda p, b: F.cross_entropy(p, b["y"]) - (p.softmax(1) * (one_hot(b) + 1e-4).log()).sum(1).mean(),
    "a hook that counts": lambda p, b: F.cross_entropy(p, b["y"]) + 0 * (p.argmax(1) == b["y"]).double().mean(),
    "some of the classes": lambda p, b: F.mse_loss(
        p[:, torch.tensor([True, True, False, True, False])], b["real"][:, [0, 1, 3]]
    ),
    "ctc": ctc,
    "repeated classes": lambda p, b: F.mse_loss(p.repeat(3, 1, 2), b["real"].repeat(1, 2).expand(3, -1, -1)),
    "a copy": lambda p, b: F.mse_loss(p, copy.deepcopy(b["real"])) + F.mse_loss(p, b["real"]),
    "written classes": with_class_zeroed,
    "of each by vmap": lambda p, b: torch.func.vmap(F.cross_entropy)(p, b["y"]).mean(),
    "targets of bounded norm": lambda p, b: F.mse_loss(p, b["real"].renorm(2, 0, 0.5)),
    "a number of classes that are chosen": lambda p, b: (
        p[:, PER_CLASS > 1].square().sum() / p[:, PER_CLASS > 1].numel() * 0.5
    ),
    "other classes": lambda p, b: F.mse_loss(p[:, torch.tensor([1, 0, 1])], b["real"].index_select(1, torch.arange(3))),
    "time-first targets": lambda p, b: F.cross_entropy(
        torch.stack([p, 2 * p, -p]).flatten(0, 1), torch.stack([b["y"], b["z"], b["y"]]).flatten()
    ),
    "targets sample after sample": lambda p, b: F.cross_entropy(
        torch.stack([p, 2 * p, -p], 1).flatten(0, 1), torch.stack([b["y"], b["z"], b["y"]], 1).flatten()
    ),
    "images of classes": lambda p, b: F.cross_entropy(
        p[..., None, None] * b["soft"][:, None, :, None], b["z"][:, None, None].expand(-1, CLASSES, 1)
    ),
    "two views in one batch": lambda p, b: F.cross_entropy(
        torch.cat([p, 2 * p]), torch.cat([b["y"], b["z"]]), label_smoothing=0.1
    ),
    "checked first": lambda p, b: F.cross_entropy(p, b["y"]) if bool(torch.isfinite(p).all()) else p.sum(),
}


def dice(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    found, wanted = logits.sigmoid(), batch["mask"].double()
    return 1 - (2 * (found * wanted).sum() + 1) / (found.sum() + wanted.sum() + 1)


def jaccard(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    found, wanted = logits.sigmoid(), batch["mask"].double()
    both = (found * wanted).sum(0)
    return (1 - both / (found.sum(0) + wanted.sum(0) - both + 1)).mean()


def lovasz(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    errors, order = (1 - logits.flatten() * (2 * batch["mask"].flatten().double() - 1)).sort(descending=True)
    wanted = batch["mask"].flatten()[order].double()
    union = wanted.sum() + (1 - wanted).cumsum(0)
    shares = 1 - (wanted.sum() - wanted.cumsum(0)) / union
    return errors.relu() @ torch.cat([shares[:1], shares[1:] - shares[:-1]])


def smooth_ap(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    ranks = torch.sigmoid((logits[:, :1] - logits[:, 0]) / 0.1).sum(1)
    return 1 - (batch["w"] / ranks).mean()


def batch_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    share = logits.softmax(1).mean(0)
    return F.cross_entropy(logits, batch["y"]) + (share * share.log()).sum()


def correlation(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    one, other = logits[:, 0] - logits[:, 0].mean(), batch["real"][:, 0] - batch["real"][:, 0].mean()
    return 1 - (one * other).sum() / (one.norm() * other.norm())


def by_halves(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    factors = torch.ones(len(logits)).double()
    factors[: len(logits) // 2] = 0.1
    return (each(logits, batch) * factors).mean()


def in_a_table(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    factors = torch.linspace(0, 1, logits.numel()).double().reshape(logits.shape)
    factors[torch.arange(len(logits)), batch["y"]] = 0
    return (logits * factors).mean()


def replaced(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    factors = torch.ones_like(batch["w"])
    factors.data = batch["w"] / batch["w"].sum()
    return (each(logits, batch) * factors).mean()


def by_numbers(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    import numpy as np

    return each(logits, batch).mean() * float(1 / np.asarray(batch["w"]).sum())


#: Those of the next that are not defined for a sample alone.
UNDEFINED_ALONE = ("variance", "mean of a selection", "correlation", "neighbours")

#: Sums, couplings and normalisers of the batch: none of these may be scored as it stands.
COUPLED: dict[str, Loss] = {
    "sum of scores": lambda p, b: p.sum(),
    "summed cross-entropy": lambda p, b: F.cross_entropy(p, b["y"], reduction="sum"),
    "sum of each": lambda p, b: each(p, b).sum(),
    "sum over something else": lambda p, b: each(p, b).sum() / (len(p) + 1),
    "sum over a number": lambda p, b: each(p, b).sum() / 1000,
    "sum and a mean": lambda p, b: each(p, b).sum() + F.mse_loss(p, b["real"]),
    "a mean and a sum": lambda p, b: F.mse_loss(p, b["real"]) + each(p, b).sum(),
    "summed mse": lambda p, b: F.mse_loss(p, b["real"], reduction="sum"),
    "class weights": lambda p, b: F.cross_entropy(p, b["y"], weight=PER_CLASS),
    "class weights, smoothed": lambda p, b: F.cross_entropy(p, b["y"], weight=PER_CLASS, label_smoothing=0.1),
    "class weights of nll": lambda p, b: F.nll_loss(p.log_softmax(1), b["y"], weight=PER_CLASS),
    "weighted mean": lambda p, b: (each(p, b) * b["w"]).sum() / b["w"].sum(),
    "weights that sum to B": lambda p, b: (each(p, b) * (b["w"] / b["w"].mean())).mean(),
    "a normaliser that was read": lambda p, b: (each(p, b) * b["w"]).sum() / b["w"].sum().item(),
    "a number of samples that was read": lambda p, b: each(p, b).mean() / int((b["y"] == b["y"]).sum()),
    "an integer that people write, too": lambda p, b: each(p, b).mean() / min(2, int((b["y"] == b["y"]).sum())),
    "a number of classes that was read": lambda p, b: p.topk(int(b["y"].max()) + 1)[0].mean(),
    "padded as far as was read": lambda p, b: F.pad(p, (0, int(b["y"].max()) + 1)).mean(),
    "smoothing that was read": lambda p, b: F.cross_entropy(p, b["y"], label_smoothing=b["w"].mean().item() / 3),
    "a power that was read": lambda p, b: (focal(p, b) ** b["w"].mean().item() * each(p, b)).mean(),
    "a normaliser read as a text": lambda p, b: each(p, b).mean() / float(f"{b['w'].sum():.4f}"),
    "a length of a selection": lambda p, b: each(p, b).mean() / (len(b["y"][b["w"] > 0.3]) + 0.5),
    "a shape of a selection": lambda p, b: each(p, b).mean() / ((b["w"] > 0.3).nonzero().shape[0] + 0.5),
    "a number of values": lambda p, b: each(p, b).mean() / b["y"].unique().numel(),
    "ones for a selection": lambda p, b: each(p, b).mean() / (torch.ones_like(b["w"][b["w"] > 0.3]).sum() + 0.5),
    "a parameter that was a tensor": lambda p, b: each(p, b).mean() / nn.Parameter(b["w"]).detach().sum(),
    "a copy's sum": lambda p, b: each(p, b).mean() / copy.deepcopy(b["w"]).sum(),
    "data that was replaced": replaced,
    "a normaliser by numpy": by_numbers,
    "a normaliser read as a list": lambda p, b: each(p, b).mean() / sum(b["w"].tolist()),
    "masked mean": lambda p, b: ((p - b["real"]).square() * b["mask"]).sum() / b["mask"].sum(),
    "mean of a selection": lambda p, b: each(p, b)[b["w"] > 0.3].mean(),
    "mean of a selection that is all": lambda p, b: each(p, b)[b["w"] > 0].mean(),
    "selected elements": lambda p, b: (p - b["real"]).square()[b["mask"]].mean(),
    "hard samples": lambda p, b: each(p, b).topk(max(1, len(p) // 2))[0].mean(),
    "samples above the mean": lambda p, b: (each(p, b) * (each(p, b) > each(p, b).mean()).detach()).mean(),
    "largest": lambda p, b: each(p, b).max(),
    "rmse": lambda p, b: F.mse_loss(p, b["real"]).sqrt(),
    "log of the mean": lambda p, b: each(p, b).mean().log(),
    "soft maximum": lambda p, b: each(p, b).logsumexp(0),
    "dice": dice,
    "jaccard": jaccard,
    "lovasz": lovasz,
    "tversky": lambda p, b: (p.sigmoid() * b["soft"]).sum() / ((p.sigmoid() + b["soft"]).sum() + 1),
    "normalised focal": lambda p, b: (focal(p, b) * each(p, b)).sum() / focal(p, b).sum(),
    "normalised focal, detached": lambda p, b: (focal(p, b) * each(p, b)).sum() / focal(p, b).sum().detach(),
    "entropy of the mean prediction": batch_entropy,
    "smooth average precision": smooth_ap,
    "pairwise ranking": lambda p, b: (p[:, :1] - p[:, 0]).sigmoid().mean(),
    "contrastive": lambda p, b: F.cross_entropy(p @ p.T, torch.arange(len(p))),
    "covariance": lambda p, b: (p.T @ p / len(p)).square().mean(),
    "variance": lambda p, b: p.var(0).mean(),
    "correlation": correlation,
    "centred": lambda p, b: F.mse_loss(p - p.mean(0), b["real"]),
    "standardised, detached": lambda p, b: F.mse_loss(p / p.std().detach(), b["real"]),
    "targets of the batch": lambda p, b: F.mse_loss(p, b["real"] / b["real"].abs().max()),
    "classes by rank in the batch": lambda p, b: F.cross_entropy(
        p, torch.searchsorted(b["w"].sort()[0], b["w"]) * CLASSES // len(p)
    ),
    "softmax over the batch": lambda p, b: -(p.log_softmax(0) * b["soft"]).mean(),
    "neighbours": lambda p, b: (p[1:] - p[:-1]).square().mean(),
    "the first sample": lambda p, b: p[0].square().mean(),
    "rolled": lambda p, b: (p * p.roll(1, 0)).mean(),
    "flipped": lambda p, b: (p * p.flip(0)).mean(),
    "halves": by_halves,
    "written into a table": in_a_table,
    "normaliser by vmap": lambda p, b: (
        F.mse_loss(p, b["real"]) / torch.func.vmap(F.cross_entropy)(p.detach(), b["y"]).sum()
    ),
    "targets of bounded norm in the batch": lambda p, b: F.mse_loss(p, b["real"].renorm(2, 1, 0.5)),
    "positions": lambda p, b: (each(p, b) * torch.arange(1, len(p) + 1)).mean(),
    "broadcast by mistake": lambda p, b: (p[:, :1] - b["w"]).square().mean(),
    "a product of means": lambda p, b: p.mean() * each(p, b).mean(),
    "divided by itself": lambda p, b: each(p, b).mean() / each(p, b).mean().detach(),
    "the mean in each": lambda p, b: (each(p, b) - each(p, b).mean()).square().mean(),
    "a matrix product with weights": lambda p, b: each(p, b) @ (b["w"] / b["w"].sum()),
    "shuffled": lambda p, b: (p * p[torch.arange(len(p)).flip(0)]).mean(),
    "every other sample": lambda p, b: p[torch.arange(len(p)) % 2 == 0].square().mean(),
    "targets of every other sample": lambda p, b: (
        (p[: (len(p) + 1) // 2] - b["real"][torch.arange(len(p)) % 2 == 0]).abs().mean()
    ),
    "the first one's target": lambda p, b: (p - b["real"][torch.arange(len(p)) == 0]).abs().mean(),
    "layer norm over the batch": lambda p, b: F.mse_loss(F.layer_norm(p.T, (len(p),)).T, b["real"]),
    "a queue": lambda p, b: torch.cat([p, torch.ones(2 * len(p), CLASSES).double()]).square().mean(),
    "cumulated": lambda p, b: each(p, b).cumsum(0).mean(),
    "written into": lambda p, b: p.clone().index_put_((b["y"] % len(p),), torch.zeros(CLASSES).double()).mean(),
}
