"""The share of mismatched pairs, and each pair's probability of a match, from a reference's similarities."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.distributed import gather_rows, rank, sum_over_ranks

#: Bins over the cosines from -1 to 1.
BINS = 400
#: Pairs after which what was counted has lost 63 % of its weight, because similarities change while a model learns.
MEMORY = 4096
#: Pairs below which nothing is estimated.
MIN_PAIRS = 256
#: Probability that a pair is more similar than a mismatch below which nothing is estimated: by chance it is 0.5, and
#: 0.7 where a perfect reference sees 60 % mismatched pairs.
MIN_SEPARATION = 0.6
#: Texts (images) whose cosine exceeds this are the same one, so that to exchange them makes no mismatch.
SAME = 0.9999
#: Smallest and largest share of the mismatches in the tails by which the share of mismatched pairs is estimated.
TAILS = (0.1, 0.8)
#: Standard errors by which the estimate by one tail may exceed that by a smaller one, which has fewer matches in it.
ERRORS = 3.0
#: Standard deviation of the smoothing along the similarities, in units of the mismatches'.
BANDWIDTH = 0.15


@dataclass(frozen=True)
class PairCalibration:
    """What is known of a reference's similarities.

    Attributes:
        wrong_share: Estimated share of mismatched pairs, 0 to 1. Under a weak reference too high rather than too low:
            matches less similar than most mismatches count as mismatched.
        low: Lower end of its 95 % interval.
        high: Upper end.
        separation: Probability that a pair is more similar than its image with the caption of another pair: 0.5 by
            chance, ``1 - wrong_share / 2`` under a perfect reference.
        samples: Pairs that were counted, each by its weight.
        aligned_separation: The separation of the aligned reference in the model's frame, where it is known.
    """

    wrong_share: float
    low: float
    high: float
    separation: float
    samples: float
    aligned_separation: float | None = None

    @property
    def informative(self) -> bool:
        """Whether the similarities distinguish pairs from mismatches; if not, all posteriors are 1."""
        return self.samples >= MIN_PAIRS and self.separation >= MIN_SEPARATION

    def __str__(self) -> str:
        if not self.informative:
            reason = "the reference does not tell pairs from mismatches"
            return f"{reason}, so none is held to be mismatched ({self.samples:.0f} pairs)"
        interval = f"95 % interval {self.low:.1%} to {self.high:.1%}"
        return f"about {self.wrong_share:.1%} of the pairs are mismatched ({interval}, {self.samples:.0f} pairs)"

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain numbers, for a file.

        Example:
            >>> PairCalibration(0.25, 0.2, 0.3, 0.87, 500.0).facts()["informative"]
            True
        """
        return asdict(self) | {"informative": self.informative}


class RunningPairCalibration:
    """Running histograms of the similarities of pairs, and of images with the captions of other pairs.

    The latter are mismatches by construction, an empirical null distribution in every batch. The share of mismatched
    pairs is the share of pairs in the tail of small similarities over the mismatches' share there, as in Storey, *A
    direct approach to false discovery rates* (2002); of all tails, the largest one whose estimate does not exceed those
    of smaller ones. The posterior probability of a match is ``1 - r f0(s) / f(s)`` with the densities of mismatches and
    of pairs, made monotone in the similarity ``s``.

    Example:
        >>> from lightning_mimic.random_streams import torch_generator
        >>> generator = torch_generator(0, "label noise")
        >>> images = torch.nn.functional.normalize(torch.randn(400, 16, generator=generator))
        >>> texts = torch.cat([images[:300], images[300:].roll(1, 0)])  # a quarter does not match
        >>> calibration = RunningPairCalibration()
        >>> calibration.update(images, texts)
        >>> round(calibration.calibration().wrong_share, 2)
        0.28
        >>> (calibration.posteriors(images, texts) > 0.5).nonzero().amax()  # the first 300 match
        tensor(299)
    """

    def __init__(self) -> None:
        # Of the pairs and of the mismatches, shape (2, BINS); empty before the first update.
        self._counts = torch.zeros(2, 0)

    @torch.no_grad()
    def update(self, images: Tensor, texts: Tensor) -> None:
        """Count the similarities among the pairs of all ranks; every rank must call it.

        Args:
            images: Embeddings of length 1, shape ``(B, K)``; B may differ between ranks. A pair of which anything is
                not finite is left out.
            texts: Those of their captions.
        """
        images, texts = images.float(), texts.float()
        finite = (torch.isfinite(images) & torch.isfinite(texts)).all(1, keepdim=True)
        images, texts = (torch.where(finite, each, 0) for each in (images, texts))
        parts = gather_rows(torch.cat([images, texts, finite], 1))
        width, start = images.shape[1], sum(map(len, parts[: rank()]))
        others, captions, known = torch.cat(parts).split([width, width, 1], 1)
        with torch.autocast(images.device.type, enabled=False):
            similarities = images @ captions.T
            repeated = (images @ others.T > SAME) | (texts @ captions.T > SAME)
        valid = finite & (known.T > 0)
        columns = torch.arange(len(known), device=images.device)
        own = columns == (start + torch.arange(len(images), device=images.device)).unsqueeze(1)
        places = _places(similarities).flatten()
        zeros = torch.zeros(BINS, dtype=torch.float64, device=images.device)
        counts = [zeros.index_add(0, places, (valid & chosen).double().flatten()) for chosen in (own, ~own & ~repeated)]
        pairs, mismatches = sum_over_ranks(torch.stack(counts))
        count = pairs.sum()
        # Per pair, so that a large batch weighs no more than its pairs.
        mismatches = mismatches * (count / mismatches.sum().clamp(min=1))
        new = torch.stack([pairs, mismatches])
        old = self._counts if self._counts.numel() else torch.zeros_like(new)
        self._counts = old * torch.exp(-count / MEMORY) + new

    @torch.no_grad()
    def posteriors(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return each pair's probability of a match; no host sync.

        Args:
            images: Embeddings of length 1, shape ``(B, K)``.
            texts: Those of their captions.

        Returns:
            Shape ``(B,)``. 1 where the similarities do not distinguish pairs from mismatches; NaN for a pair that is
            not finite, and for all before enough pairs were counted.
        """
        similarities = (images.float() * texts.float()).sum(1)
        if not self._counts.numel():
            return torch.full_like(similarities, torch.nan)
        found = _posteriors(self._counts).float()[_places(similarities.nan_to_num(0, 0, 0))]
        known = torch.isfinite(similarities) & (self._counts[0].sum() >= MIN_PAIRS)
        return torch.where(known, found, torch.nan)

    @property
    def wrong_share(self) -> Tensor:
        """The estimated share of mismatched pairs, a scalar on the device; 0 where nothing is known."""
        if not self._counts.numel():
            return torch.zeros(())
        return torch.where(_is_informative(self._counts), _wrong_share(self._counts)[0], 0).float()

    def calibration(self) -> PairCalibration | None:
        """Return what is known so far (a host sync); ``None`` before the first :meth:`update`."""
        if not self._counts.numel():
            return None
        share, error = _wrong_share(self._counts)
        figures = [share, share - 1.96 * error, share + 1.96 * error, _separation(self._counts)]
        wrong, low, high, separation = torch.stack(figures).clamp(0, 1).tolist()
        return PairCalibration(wrong, low, high, separation, float(self._counts[0].sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the histograms."""
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the histograms from a state."""
        self._counts = state["counts"]


def _places(similarities: Tensor) -> Tensor:
    return ((similarities + 1) * (BINS / 2)).long().clamp(0, BINS - 1)


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


def _separation(counts: Tensor) -> Tensor:
    pairs, mismatches = _shares(counts)
    return torch.dot(pairs, mismatches.cumsum(0) - mismatches / 2)


def _is_informative(counts: Tensor) -> Tensor:
    return (counts[0].sum() >= MIN_PAIRS) & (_separation(counts) >= MIN_SEPARATION)


def _wrong_share(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of mismatched pairs and its standard error."""
    samples = counts[0].sum().clamp(min=1)
    pairs, mismatches = _shares(counts).cumsum(1)
    usable = (mismatches >= TAILS[0]) & (mismatches <= TAILS[1])
    tail = torch.where(usable, mismatches, 1)
    share = pairs / tail
    # One pair more, for tails that are empty so far.
    error = ((pairs * (1 - pairs)).clamp(min=0) / samples + samples.pow(-2)).sqrt() / tail
    # The larger the tail, the smaller the error, and the more matches in it (Lepski's choice between the two).
    bound = torch.where(usable, share + ERRORS * error, torch.inf).cummin(0).values
    fits = usable & (share <= bound)
    chosen = torch.where(fits, torch.arange(BINS, device=counts.device), 0).amax(0, keepdim=True)
    # Where all mismatches lie in one bin there is no such tail.
    share, error = (torch.where(fits.any(), each.gather(0, chosen)[0], 1) for each in (share, error))
    return share.clamp(max=1), error


def _posteriors(counts: Tensor) -> Tensor:
    """Return the probability of a match in each bin."""
    share, _ = _wrong_share(counts)
    pairs, mismatches = _smoothed(counts)
    mismatched = (share * mismatches / pairs.clamp(min=torch.finfo(pairs.dtype).tiny)).clamp(max=1)
    return torch.where(_is_informative(counts), 1 - _falling(mismatched, pairs), 1)


def _smoothed(counts: Tensor) -> Tensor:
    shares, places = _shares(counts), torch.arange(BINS, dtype=counts.dtype, device=counts.device)
    mean = (shares[1] * places).sum()
    width = BANDWIDTH * (shares[1] * (places - mean).square()).sum().sqrt().clamp(min=1)
    kernel = torch.exp(-0.5 * ((places[:, None] - places) / width).square())
    return shares @ (kernel / kernel.sum(0)).T


def _falling(values: Tensor, weights: Tensor) -> Tensor:
    """Return the falling sequence nearest to the values, by weighted squares: the least of the highest means."""
    weights = weights + 1e-9  # for bins without any
    sums = torch.stack([weights, weights * values]).cumsum(1)
    before = torch.cat([sums.new_zeros(2, 1), sums[:, :-1]], 1)
    width, total = sums[:, None, :] - before[:, :, None]  # [a, b]: of the bins from a to b
    ordered = torch.ones_like(width, dtype=torch.bool).triu()
    means = torch.where(ordered, total / width, -torch.inf)
    highest = means.flip(1).cummax(1).values.flip(1)  # [a, k]: of all that begin at a and end at k or later
    return torch.where(ordered, highest, torch.inf).amin(0)
