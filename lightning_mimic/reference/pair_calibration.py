"""The share of mismatched pairs and each pair's probability of a match, from similarities that mismatches have."""

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
#: Pairs of which the share of mismatches is estimated at all.
MIN_PAIRS = 256
#: Captions (images) whose cosine exceeds this are the same one, so that exchanging them makes no mismatch.
SAME = 0.9999
#: Shares of the mismatches that lie in the tails by which the share of mismatched pairs is estimated.
TAILS = (0.1, 0.8)
ERRORS = 3.0
#: Standard deviation of the smoothing along the similarities, in units of that of mismatches.
_BANDWIDTH = 0.15
#: Below this area under the curve of own pairs against mismatches, there is nothing to calibrate.
MIN_SEPARATION = 0.6


@dataclass(frozen=True)
class PairCalibration:
    """What is known of a reference's similarities.

    Attributes:
        wrong_share: Estimated share of mismatched pairs; 0 to 1. An upper bound in expectation: matches that the
            reference finds less similar than most mismatches count as mismatched.
        low: Lower end of its 95 % interval.
        high: Upper end.
        separation: Probability that a pair is more similar than its image with another pair's caption: 0.5 by chance,
            and ``1 - wrong_share / 2`` under a perfect reference.
        samples: Pairs, each by its weight.
    """

    wrong_share: float
    low: float
    high: float
    separation: float
    samples: float

    @property
    def informative(self) -> bool:
        """Whether the similarities tell pairs from mismatches at all."""
        return self.samples >= MIN_PAIRS and self.separation >= MIN_SEPARATION

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain numbers, for a file."""
        return asdict(self) | {"informative": self.informative}


class RunningPairCalibration:
    """Running histograms of the similarities of pairs, and of images with the captions of other pairs.

    The latter are mismatches by construction: an empirical null distribution, in every batch. What is left of them in
    the similarities of the pairs themselves are the mismatched pairs.

    Example:
        >>> calibration = RunningPairCalibration()
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = torch.nn.functional.normalize(torch.randn(400, 16, generator=generator))
        >>> texts = torch.cat([images[:300], images[300:].roll(1, 0)])  # a quarter does not match
        >>> calibration.update(images, texts)
        >>> round(calibration.calibration().wrong_share, 1)
        0.2
        >>> posteriors = calibration.posteriors(images, texts)
        >>> int((posteriors[:300] > 0.5).sum()), int((posteriors[300:] < 0.5).sum())
        (300, 99)
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    @torch.no_grad()
    def update(self, images: Tensor, texts: Tensor) -> None:
        """Count the similarities of the pairs of all ranks; every rank must call it.

        Args:
            images: Embeddings of length 1, shape ``(B, K)``. A row that is not finite, or whose text's is not, is left
                out. B may differ between ranks.
            texts: Of their captions.
        """
        finite = (torch.isfinite(images).all(1) & torch.isfinite(texts).all(1)).unsqueeze(1)
        both = torch.cat([torch.where(finite, each, 0) for each in (images, texts)] + [finite.to(images.dtype)], 1)
        parts = gather_rows(both)
        start = sum(map(len, parts[: rank()]))
        width = images.shape[1]
        all_images, all_texts, known = torch.cat(parts).split([width, width, 1], 1)
        own = slice(start, start + len(images))
        with torch.autocast(images.device.type, enabled=False):
            similar = all_images[own] @ all_texts.T
            same = (all_images[own] @ all_images.T > SAME) | (all_texts[own] @ all_texts.T > SAME)
        valid = (known[own] * known.T) > 0
        mine = torch.zeros_like(valid)
        mine[torch.arange(len(mine)), torch.arange(own.start, own.stop)] = True
        places = _places(similar)
        zeros = torch.zeros(BINS, dtype=torch.float64, device=images.device)
        counts = [
            zeros.index_add(0, places.flatten(), (chosen & valid).double().flatten()) for chosen in (mine, ~same)
        ]
        new = sum_over_ranks(torch.stack(counts))
        if self._counts is None:
            self._counts = torch.zeros_like(new)
        # Mismatches count by pair, so that large batches weigh no more than small ones.
        new[1] *= new[0].sum() / new[1].sum().clamp(min=1)
        self._counts = self._counts * torch.exp(-new[0].sum() / MEMORY) + new

    @torch.no_grad()
    def posteriors(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return each pair's probability of a match, shape ``(B,)``; equal for all where nothing is known.

        Args:
            images: As for :meth:`update`.
            texts: Of their captions.
        """
        similar = (images * texts).sum(1)
        if self._counts is None:
            return torch.ones_like(similar)
        table = _posterior_table(self._counts)
        found = table.to(similar.dtype)[_places(torch.nan_to_num(similar))]
        return torch.where(torch.isfinite(similar), found, torch.nan)

    def calibration(self) -> PairCalibration | None:
        """Return what is known so far (a host sync); ``None`` before the first update."""
        if self._counts is None:
            return None
        counts = self._counts
        share, error = (float(each) for each in _wrong_share(counts))
        return PairCalibration(
            share,
            max(share - 1.96 * error, 0.0),
            min(share + 1.96 * error, 1.0),
            float(_separation(counts)),
            float(counts[0].sum()),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the histograms; empty before the first :meth:`update`."""
        return {} if self._counts is None else {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the histograms from a state."""
        self._counts = state.get("counts")


def _places(similar: Tensor) -> Tensor:
    return ((similar + 1) * (BINS / 2)).long().clamp(0, BINS - 1)


def _separation(counts: Tensor) -> Tensor:
    """Area under the curve of pairs against mismatches."""
    pairs, null = counts / counts.sum(1, keepdim=True).clamp(min=1e-300)
    return (pairs * (null.cumsum(0) - null / 2)).sum()


def _wrong_share(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The share of mismatched pairs and its standard error, by the tail of dissimilar pairs that bounds it best.

    Storey's estimate, ``P(s < t) / P0(s < t)``, exceeds the share by what matches have below t and spreads the more the
    fewer pairs lie there; the t with the lowest upper limit is taken.
    """
    samples = counts[0].sum().clamp(min=1)
    pairs, null = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp(min=1e-300)
    tail = null.clamp(min=1e-12)
    share = pairs / tail
    # A pair more, for tails in which none was seen.
    error = ((pairs * (1 - pairs)).clamp(min=0) / samples + 1 / samples**2).sqrt() / tail
    usable = (null >= TAILS[0]) & (null <= TAILS[1])
    upper = torch.where(usable, share + ERRORS * error, torch.inf).cummin(0).values
    last = torch.arange(BINS, device=counts.device)
    chosen = torch.where(usable & (share <= upper), last, 0).amax(0, keepdim=True)
    return share.gather(0, chosen)[0].clamp(max=1), error.gather(0, chosen)[0]


def _posterior_table(counts: Tensor) -> Tensor:
    """The probability of a match in each bin, from 0 to 1 and never falling with the similarity."""
    samples = counts[0].sum()
    share, _ = _wrong_share(counts)
    pairs, null = _smoothed(counts)
    mismatch = share * null / pairs.clamp(min=1e-300)
    table = 1 - _antitonic(mismatch.clamp(max=1), pairs)
    known = (samples >= MIN_PAIRS) & (_separation(counts) >= MIN_SEPARATION)
    return torch.where(known, table, torch.ones_like(table))


def _smoothed(counts: Tensor) -> Tensor:
    """Densities over the bins."""
    at = torch.arange(BINS, dtype=counts.dtype, device=counts.device)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1e-300)
    mean = (shares[1] * at).sum()
    width = _BANDWIDTH * ((shares[1] * (at - mean).square()).sum().sqrt()).clamp(min=1)
    kernel = torch.exp(-0.5 * ((at[:, None] - at) / width).square())
    kernel = kernel / kernel.sum(0, keepdim=True)
    return shares @ kernel.T


def _antitonic(values: Tensor, weights: Tensor) -> Tensor:
    """Return the falling sequence nearest to the values by weighted squares: the least of the highest means."""
    weights = weights + 1e-12  # of bins in which nothing lies
    sums, totals = ((x.cumsum(0)) for x in (weights, weights * values))
    before = [torch.cat([x.new_zeros(1), x[:-1]])[:, None] for x in (sums, totals)]
    means = (totals - before[1]) / (sums - before[0])  # [a, b]: over the bins from a to b
    means = torch.where(torch.ones_like(means, dtype=torch.bool).triu(), means, -torch.inf)
    highest = means.flip(1).cummax(1).values.flip(1)  # [a, k]: of those that begin at a and end at k or later
    highest = torch.where(torch.ones_like(means, dtype=torch.bool).triu(), highest, torch.inf)
    return highest.amin(0)
