"""Calibration of a reference on the given labels, and the probability that a label is right.

A reference may be unsure, overconfident or partial to some classes, and the labels that show it are noisy themselves.
So both are fitted together: with ``q = softmax(β z' + c)`` a label ``y`` of C classes is drawn with probability
``(1 − r) q_y + r (1 − q_y)/(C − 1)``, where r is the share of wrong labels.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mimic.distributed import gather_rows, world_size
from lightning_mimic.errors import MimicError

#: Samples without which nothing is fitted.
MIN_SAMPLES = 256
#: Samples of all ranks that a running calibration rests on, the latest ones; more where there are many classes,
#: and fewer where their logits would fill the memory.
WINDOW = 2048
WINDOW_PER_CLASS = 8
#: Micro-batches between two fits, at most.
FIT_EVERY = 16

# β by half octaves: an unsure reference needs a large one, an overconfident one a small one.
_SCALES = torch.exp2(torch.arange(-6.0, 9.01, 0.5))
_SHARES = 201
# Likelihoods over r follow from a histogram of the log-odds of q_y.
_LOG_ODDS = torch.arange(-15.0, 15.01, 0.0625)
#: Half the 95 % quantile of χ² with one degree of freedom.
_HALF_QUANTILE = 1.92
#: By which the log-likelihood must exceed that of labels which the reference says nothing about.
_LEAST_GAIN = 10.0
#: Share of the model's agreement with the labels, less that of chance, below which the reference knows far less.
#: On the digits (seeds 40 to 44) references of one epoch had at most 0.57 of it, within two standard errors, and harmed
#: where they were trusted; those of 70 % accuracy that helped had 0.73 or more.
_LEAST_KNOWLEDGE = 0.7
#: Between two logits of a row, so that no scale makes one infinite; beyond it, all scales agree.
_LARGEST_GAP = 1e4
#: Elements of a temporary tensor, and of the window unless that is very short.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Calibration:
    """A calibration of a reference on the given labels, in plain numbers.

    Attributes:
        scale: β, by which its logits are multiplied: above 1 it was unsure, below 1 overconfident.
        biases: c, added to the scaled logits, one per class; ``None`` where the data do not justify them.
        wrong_share: r, the estimated share of wrong labels.
        low: Lower end of its 95 % interval, by the profile likelihood.
        high: Upper end.
        samples: That were looked at.
        classes: C.
        agreement: Share of the given labels that the calibrated reference predicts.
        model_agreement: Share of them that the model had predicted before it trained on the samples, at its highest;
            ``None`` where that is not known.
        knows_less: Less chance, the first of these shares is surely not 70 % of the second, so that the reference can
            judge no label.
        informative: It explains the labels better than their frequencies do, and does not know less than the model.
            Otherwise no label is held to be wrong.
    """

    scale: float
    biases: tuple[float, ...] | None
    wrong_share: float
    low: float
    high: float
    samples: int
    classes: int
    agreement: float
    model_agreement: float | None
    knows_less: bool
    informative: bool

    def __str__(self) -> str:
        if not self.informative:
            own = self.model_agreement
            than = "" if own is None else f", the model {own:.0%} before it trained on them"
            return (
                "the reference does not explain the labels, so none is held to be wrong (it predicts "
                f"{self.agreement:.0%} of them{than}; {self.samples} samples)"
            )
        return (
            f"about {self.wrong_share:.1%} of the labels are wrong (95 % interval {self.low:.1%} to {self.high:.1%}, "
            f"{self.samples} samples; the reference's logits times {self.scale:.3g}"
            f"{' with class biases' * (self.biases is not None)})"
        )

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain numbers, for a file."""
        return asdict(self)


def calibrate(reference_outputs: Tensor, labels: Tensor) -> Calibration:
    """Calibrate a reference on given labels, some of which are wrong.

    β and r maximise the likelihood of the labels. The class biases c make the mean of q equal to the classes' shares
    among the right labels, which follow from those among the given ones and r; they are used if the likelihood rises by
    more than Akaike's information criterion asks for C − 1 parameters.

    Args:
        reference_outputs: Logits of samples that did not train the reference, shape ``(n, C)``.
        labels: Given classes, integers of shape ``(n,)``, from 0 to C − 1.

    Raises:
        MimicError: Shapes, types or labels that do not fit, or fewer than 256 samples.

    Example:
        >>> from lightning_mimic.random_streams import torch_generator
        >>> generator = torch_generator(0, "label noise")
        >>> logits = 4 * torch.randn(4000, 5, generator=generator)
        >>> labels = torch.distributions.Categorical(logits=logits).probs.multinomial(1, generator=generator)[:, 0]
        >>> labels[:1200] = (labels[:1200] + torch.randint(1, 5, (1200,), generator=generator)) % 5
        >>> found = calibrate(logits / 8, labels)
        >>> round(found.scale), round(found.wrong_share, 2)
        (8, 0.3)
    """
    _check(reference_outputs, labels)
    state = _Fitter(reference_outputs.shape[1], reference_outputs.device)
    fit = state.fit(reference_outputs.detach().float(), labels.long(), iterations=20)
    return fit.calibration(len(labels))


def label_posteriors(logits: Tensor, labels: Tensor, wrong_share: float | Tensor) -> Tensor:
    """Return the probability that each label is right: ``(1 − r) q_y / ((1 − r) q_y + r (1 − q_y)/(C − 1))``.

    Args:
        logits: Calibrated logits, shape ``(B, C)``; a shift of a row changes nothing.
        labels: Given classes, shape ``(B,)``; −1: unknown.
        wrong_share: r.

    Returns:
        Shape ``(B,)``; NaN where the label is unknown or a logit is not finite.

    Example:
        >>> label_posteriors(torch.zeros(2, 3), torch.tensor([0, -1]), 0.25)
        tensor([0.7500,    nan])
    """
    log_odds = _log_odds(logits.log_softmax(1), labels.clamp(min=0))
    share = torch.as_tensor(wrong_share, dtype=log_odds.dtype, device=log_odds.device)
    # In log-odds, so that a q_y near 0 or 1 loses no digits; r = 0 gives 1.
    prior = torch.log1p(-share) - share.log() + math.log(logits.shape[1] - 1)
    posteriors = torch.sigmoid(log_odds + prior)
    return torch.where((labels >= 0) & torch.isfinite(logits).all(1), posteriors, torch.nan)


def noise_matrix(reference_outputs: Tensor, labels: Tensor, calibration: Calibration) -> Tensor:
    """Return the probability of each given class for samples of each right class.

    Fitted by expectation maximisation in the likelihood of the calibration, with a matrix in the place of r. Sensible
    where every class has a few dozen samples.

    Args:
        reference_outputs: As for :func:`calibrate`.
        labels: As for :func:`calibrate`.
        calibration: Of the same reference.

    Returns:
        Shape ``(C, C)``; rows are right classes, columns given ones, and a row sums to 1.

    Raises:
        MimicError: Shapes, types or labels that do not fit.

    Example:
        >>> from lightning_mimic.random_streams import torch_generator
        >>> generator = torch_generator(0, "label noise")
        >>> logits = 8 * torch.randn(9000, 3, generator=generator)
        >>> right = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> given = torch.where(torch.rand(9000, generator=generator) < 0.2, (right + 1) % 3, right)
        >>> noise_matrix(logits, given, calibrate(logits, given)).round(decimals=1)
        tensor([[0.8000, 0.2000, 0.0000],
                [0.0000, 0.8000, 0.2000],
                [0.2000, 0.0000, 0.8000]])

    Source: Dawid and Skene, *Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm* (1979), with
    a reference in the place of unknown priors.
    """
    _check(reference_outputs, labels)
    classes = reference_outputs.shape[1]
    if calibration.classes != classes:
        raise MimicError(
            f"`calibration` is of {calibration.classes} classes, and `reference_outputs` has {classes}; expected that "
            "of the same reference."
        )
    biases = 0.0 if calibration.biases is None else torch.tensor(calibration.biases, dtype=torch.float64)
    q = (calibration.scale * reference_outputs.detach().double().cpu() + biases).softmax(1)
    labels = labels.long().cpu()
    share = calibration.wrong_share
    matrix = torch.full((classes, classes), share / (classes - 1), dtype=q.dtype).fill_diagonal_(1 - share)
    # As many samples' worth of the symmetric matrix as keep an empty class from dividing by nothing.
    prior = matrix.clone()
    for _ in range(100):
        likely = q * matrix[:, labels].T
        likely = likely / likely.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        counts = prior.clone().T.index_add_(0, labels, likely).T
        matrix = counts / counts.sum(1, keepdim=True)
    return matrix.float()


class RunningCalibration:
    """The calibration of a reference on the latest samples of all ranks, fitted again while a model trains.

    Wrong labels are claimed only as far as the data require: of the shares within the 95 % interval the smallest one is
    used, and none above the share of labels that the model itself did not predict, before it had trained on them.

    Args:
        classes: C.
        device: On which the outputs are.

    Example:
        >>> from lightning_mimic.random_streams import torch_generator
        >>> generator = torch_generator(0, "label noise")
        >>> labels = torch.randint(3, (512,), generator=generator)
        >>> logits = 6 * torch.nn.functional.one_hot(labels, 3).float() + torch.randn(512, 3, generator=generator)
        >>> running = RunningCalibration(3, logits.device)
        >>> running.update(logits, labels)
        >>> running.posteriors(logits[:2], labels[:2])
        tensor([1., 1.])
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes = classes
        self._window = max(min(max(WINDOW, WINDOW_PER_CLASS * classes), _CHUNK // classes), MIN_SAMPLES)
        self._fitter = _Fitter(classes, device)
        self._fit: _Fit | None = None
        self._samples = 0
        self._seen = 0
        self._steps = 0
        self._next_fit = 1
        # A fit takes as long as this many micro-batches' worth of logits are to be looked at.
        self._fit_every = FIT_EVERY * max(self._window * classes >> 18, 1)
        self._pending: list[tuple[Tensor, ...]] = []
        # Rows that the model had not trained on before: of several epochs, as many different samples.
        self._distinct = 0
        self._logits = torch.zeros(0, classes, device=device)
        self._labels = torch.zeros(0, dtype=torch.int64, device=device)
        # Whether the model predicted the label before it trained on the sample: 1, 0, or -1 where that is not known.
        self._predicted = torch.zeros(0, dtype=torch.int8, device=device)
        # Share of the given labels that the model predicted before it had trained on them, at its highest.
        self._model_agreement = 0.0

    @property
    def ready(self) -> bool:
        """There were enough samples for a fit."""
        return self._fit is not None

    @torch.no_grad()
    def update(self, reference_outputs: Tensor, labels: Tensor, unseen_outputs: Tensor | None = None) -> None:
        """Take in a micro-batch; every rank must call it. Now and then a fit, which gathers the rows of all ranks.

        Args:
            reference_outputs: The reference's logits, shape ``(B, C)``; rows that are not finite are left out.
            labels: Given classes, shape ``(B,)``; −1: unknown.
            unseen_outputs: The model's own logits, shape ``(B, C)``, of samples that it has not trained on before.
        """
        right = torch.full_like(labels, -1, dtype=torch.int8)
        if unseen_outputs is not None:
            right = (unseen_outputs.argmax(1) == labels).to(torch.int8)
        # In every row the number of the micro-batch, by which the ranks' rows are brought into order.
        steps = torch.full_like(labels, self._steps)
        self._pending.append((reference_outputs.detach().float(), labels, right, steps))
        while sum(len(each[1]) for each in self._pending[1:]) >= self._window:
            del self._pending[0]  # would be cut off
        self._steps += 1
        if self._steps >= self._next_fit:
            self._next_fit = self._steps + min(max(self._steps // 4, 1), self._fit_every)
            self._take_in()

    def calibrated(self, reference_outputs: Tensor) -> Tensor:
        """Return ``β z' + c``, shape ``(B, C)``, float32.

        Raises:
            RuntimeError: There was no fit yet.
        """
        fit = self._require()
        return fit.scale * reference_outputs.float() + fit.biases

    def posteriors(self, reference_outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the probability that each label is right, shape ``(B,)``.

        1 where the reference does not explain the labels at all; NaN where a label is unknown, an output not finite, or
        before the first fit.
        """
        if self._fit is None:
            return torch.full_like(labels, torch.nan, dtype=torch.float32)
        posteriors = label_posteriors(self.calibrated(reference_outputs), labels, self._fit.least)
        return torch.where(self._fit.informative | torch.isnan(posteriors), posteriors, torch.ones_like(posteriors))

    @property
    def informative(self) -> Tensor:
        """Whether the reference explains the labels, a boolean scalar."""
        return self._require().informative

    @property
    def knows_less(self) -> Tensor:
        """Whether the reference knows less of the labels than the model, a boolean scalar."""
        return self._require().knows_less

    @property
    def wrong_share(self) -> Tensor | None:
        """r, a scalar; ``None`` before the first fit."""
        return None if self._fit is None else torch.where(self._fit.informative, self._fit.wrong_share, 0.0)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """β, a scalar, and c, shape ``(C,)``."""
        fit = self._require()
        return fit.scale, fit.biases

    def calibration(self) -> Calibration | None:
        """Return the latest fit in plain numbers (a host sync); ``None`` before the first one."""
        return None if self._fit is None else self._fit.calibration(self._samples)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; of several ranks without the rows since the last fit, as each has others."""
        pending = self._pending if world_size() == 1 else []
        parts = [torch.cat(each) for each in zip(*pending, strict=True)]
        return {
            "pending": parts,
            "logits": self._logits,
            "labels": self._labels,
            "predicted": self._predicted,
            "offsets": self._fitter.offsets,
            "fit": None if self._fit is None else vars(self._fit),
            "model_agreement": self._model_agreement,
            "seen": self._seen,
            "distinct": self._distinct,
            "steps": self._steps,
            "next_fit": self._next_fit,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            MimicError: It is of another number of classes.
        """
        if state["logits"].shape[1:] != (self._classes,):
            raise MimicError(
                f"the state of the calibration is of {state['logits'].shape[-1]} classes; expected {self._classes}."
            )
        device = self._logits.device
        self._logits, self._labels = state["logits"].to(device), state["labels"].to(device)
        self._predicted = state["predicted"].to(device)
        self._fitter.offsets = state["offsets"].to(device)
        self._model_agreement = state["model_agreement"]
        self._seen, self._steps, self._next_fit = state["seen"], state["steps"], state["next_fit"]
        pending = [each.to(device) for each in state["pending"]]
        self._pending = [tuple(pending)] if pending else []
        self._distinct = state["distinct"]
        self._samples = min(len(self._labels), self._distinct or len(self._labels))
        if state["fit"] is not None:
            moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state["fit"].items()}
            self._fit = _Fit(**moved)

    def _require(self) -> "_Fit":
        if self._fit is None:
            raise RuntimeError(f"there is no calibration before {MIN_SAMPLES} samples.")
        return self._fit

    def _take_in(self) -> None:
        logits, labels, predicted, steps = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        known = (labels >= 0) & torch.isfinite(logits).all(1)
        order = torch.cat(gather_rows(steps[known])).argsort(stable=True)
        new = [torch.cat(gather_rows(each[known]))[order] for each in (logits, labels, predicted)]
        # While the model is young, its features change and so do the outputs of an aligned reference.
        self._seen += len(new[0])
        self._distinct += int((new[2] >= 0).sum())
        keep = min(max(self._seen // 2, MIN_SAMPLES), self._window)
        self._logits, self._labels, self._predicted = (
            torch.cat([old, more])[-keep:]
            for old, more in zip((self._logits, self._labels, self._predicted), new, strict=True)
        )
        self._refit()

    def _refit(self) -> None:
        rows = len(self._labels)
        if rows < MIN_SAMPLES:
            return
        # Repeats of a sample are no further evidence.
        self._samples = min(rows, self._distinct or rows)
        own = self._predicted[self._predicted >= 0][-MIN_SAMPLES:].double()
        if len(own) == MIN_SAMPLES:
            self._model_agreement = max(self._model_agreement, float(own.mean()))
        iterations = 10 if self._fit is None else 1
        self._fit = self._fitter.fit(
            self._logits, self._labels, iterations, self._model_agreement, self._samples / rows
        )


@dataclass(frozen=True)
class _Fit:
    """A calibration on the device."""

    scale: Tensor
    biases: Tensor
    biased: Tensor
    wrong_share: Tensor
    least: Tensor
    most: Tensor
    agreement: Tensor
    model_agreement: float
    knows_less: Tensor
    informative: Tensor

    def calibration(self, samples: int) -> Calibration:
        informative = bool(self.informative)
        return Calibration(
            scale=float(self.scale),
            biases=tuple(self.biases.tolist()) if bool(self.biased) else None,
            wrong_share=float(self.wrong_share) if informative else 0.0,
            low=float(self.least) if informative else 0.0,
            high=float(self.most) if informative else 1.0,
            samples=samples,
            classes=len(self.biases),
            agreement=float(self.agreement),
            model_agreement=self.model_agreement or None,
            knows_less=bool(self.knows_less),
            informative=informative,
        )


class _Fitter:
    """Fits β on a grid, r by its likelihood, and for every β the class biases.

    Attributes:
        offsets: Of the biases, from those that centre the logits of every class; shape ``(scales, C)``, kept between
            fits so that each begins where the last one ended.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        if classes < 2:
            raise MimicError(f"a calibration needs the logits of 2 classes or more, not {classes}.")
        self._classes = classes
        self._scales = _SCALES.to(device)
        chance = (classes - 1) / classes  # beyond it a given label would speak against its class
        self._shares = torch.linspace(0, 0.98 * chance, _SHARES, device=device)
        q = torch.sigmoid(_LOG_ODDS.to(device).double())[:, None]
        r = self._shares.double()
        self._log_likelihoods = torch.log((1 - r) * q + r * (1 - q) / (classes - 1))  # (bins, shares)
        self.offsets = torch.zeros(len(_SCALES), classes, device=device)

    @torch.no_grad()
    def fit(
        self, logits: Tensor, labels: Tensor, iterations: int, model_agreement: float = 0.0, weight: float = 1.0
    ) -> _Fit:
        """Return the fit.

        Args:
            logits: The reference's, shape ``(n, C)``.
            labels: Given classes, shape ``(n,)``.
            iterations: Corrections of the biases.
            model_agreement: Share of the labels that the model predicts without having trained on them; 0: not known.
            weight: Of a row in the likelihoods, below 1 where samples are repeated.
        """
        count = len(labels)
        logits = _centred(logits)
        # What the model predicts so is right but for chance, within two standard errors.
        most_wrong = 1 - model_agreement + 2 * math.sqrt(model_agreement * (1 - model_agreement) / MIN_SAMPLES)
        counts = torch.bincount(labels, minlength=self._classes).to(torch.float32)
        given = counts / count
        allowed = self._shares <= most_wrong
        centres = -self._scales[:, None] * logits.mean(0)
        for _ in range(iterations):
            biases = centres + self.offsets
            biased, means = self._evaluate(logits, labels, biases)
            self.offsets = self.offsets + self._correction(
                biased.masked_fill(~allowed, -torch.inf), means, given, count
            )
        plain, _ = self._evaluate(logits, labels, torch.zeros_like(self.offsets))
        both = weight * torch.stack([plain, biased]).masked_fill(~allowed, -torch.inf)  # (2, scales, shares)
        gains = both.flatten(1).amax(1)
        # By rows, repeats included: biases that are missing cost far more than biases that were not needed.
        uses_biases = gains[1] - gains[0] > weight * (self._classes - 1)
        chosen = torch.where(uses_biases, both[1], both[0])
        profile = chosen.amax(0)  # over the scales
        best = profile.argmax()
        within = profile >= profile[best] - _HALF_QUANTILE
        least, most = within.int().argmax(), len(within) - 1 - within.int().flip(0).argmax()
        place = chosen[:, least].argmax()
        biases = torch.where(uses_biases, biases[place], torch.zeros_like(given))
        scale = self._scales[place]
        by_frequency = weight * (counts * given.clamp(min=1 / count).log()).sum()
        needed = torch.where(uses_biases, weight * (self._classes - 1), 0.0) + _LEAST_GAIN
        agreement = ((scale * logits + biases).argmax(1) == labels).float().mean()
        by_chance = given.square().sum()
        surely = agreement - 2 * (agreement * (1 - agreement) / (weight * count)).sqrt()
        knows_less = (surely - by_chance < _LEAST_KNOWLEDGE * (model_agreement - by_chance)) & (model_agreement > 0)
        return _Fit(
            scale=scale,
            biases=biases,
            biased=uses_biases,
            wrong_share=self._shares[best],
            least=self._shares[least],
            most=self._shares[most],
            agreement=agreement,
            model_agreement=model_agreement,
            knows_less=knows_less,
            informative=(profile[best] - by_frequency > needed) & ~knows_less,
        )

    def _correction(self, likelihoods: Tensor, means: Tensor, given: Tensor, count: int) -> Tensor:
        """Return the change of the biases that brings the mean of q to the shares of the right labels.

        Args:
            likelihoods: Log-likelihoods, shape ``(scales, shares)``.
            means: Means of q, shape ``(scales, C)``.
            given: Shares of the classes among the given labels, shape ``(C,)``.
            count: Samples.

        Returns:
            Shape ``(scales, C)``.
        """
        r = self._shares[likelihoods.argmax(1)][:, None]
        other = r / (self._classes - 1)
        right = ((given - other) / (1 - r - other)).clamp(min=0.1 / count)  # a few draws do not rule a class out
        right = right / right.sum(1, keepdim=True)
        # Damped, because r and the means change with the biases.
        return 0.7 * (right.log() - means.clamp(min=1e-4 / count).log()).clamp(-4, 4)

    def _evaluate(self, logits: Tensor, labels: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihoods, shape ``(scales, shares)``, and the means of q, shape ``(scales, C)``."""
        scales, bins = len(self._scales), len(_LOG_ODDS)
        means = torch.empty_like(biases)
        histogram = torch.empty(scales, bins, device=logits.device)
        chunk = max(_CHUNK // max(logits.numel(), 1), 1)
        for first in range(0, scales, chunk):
            here = slice(first, first + chunk)
            log_q = (self._scales[here, None, None] * logits + biases[here, None]).log_softmax(2)
            means[here] = log_q.exp().mean(1)
            own = log_q.gather(2, labels.expand(len(log_q), -1)[..., None])[..., 0]
            odds = own - torch.log1p(-own.exp())  # infinite where q_y rounds to 1, which the last bin takes
            place = ((odds - _LOG_ODDS[0]) / (_LOG_ODDS[1] - _LOG_ODDS[0])).clamp(0, bins - 1)
            # Shared between two bins: rounded, the labels' own frequencies would be as likely as a reference.
            low = place.floor().clamp(max=bins - 2)
            counts = torch.zeros(len(log_q), bins, device=odds.device).scatter_add_(1, low.long(), low + 1 - place)
            histogram[here] = counts.scatter_add_(1, low.long() + 1, place - low)
        return histogram.double() @ self._log_likelihoods, means


def _centred(logits: Tensor) -> Tensor:
    """Return the logits with a mean of 0 in each row, none further than a limit below the highest one."""
    lower = (logits - logits.amax(1, keepdim=True)).clamp(min=-_LARGEST_GAP)
    return lower - lower.mean(1, keepdim=True)


def _log_odds(log_q: Tensor, labels: Tensor) -> Tensor:
    """Return ``log q_y − log(1 − q_y)``, shape ``(n,)``."""
    own = log_q.gather(1, labels[:, None])[:, 0]
    # 1 − q_y as the sum over the other classes: from q_y itself it would be 0 long before.
    others = log_q.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return own - others


def _check(logits: Tensor, labels: Tensor) -> None:
    for name, value in (("reference_outputs", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise MimicError(f"`{name}` is of type {type(value).__name__}; expected a tensor.")
    if logits.ndim != 2 or not logits.is_floating_point() or not torch.isfinite(logits.float()).all():
        raise MimicError(
            f"`reference_outputs` is a {logits.dtype} tensor of shape {tuple(logits.shape)}; expected logits that are "
            "finite in float32, a floating-point tensor of shape (n, C)."
        )
    if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise MimicError(
            f"`labels` is a {labels.dtype} tensor of shape {tuple(labels.shape)}; expected class indices, an integer "
            f"tensor of shape {tuple(logits.shape[:1])}."
        )
    if len(labels) < MIN_SAMPLES:
        raise MimicError(f"{len(labels)} samples are too few to calibrate a reference; expected {MIN_SAMPLES} or more.")
    low, high = int(labels.long().min()), int(labels.long().max())
    if low < 0 or high >= logits.shape[1]:
        raise MimicError(f"`labels` reach from {low} to {high}; expected classes from 0 to {logits.shape[1] - 1}.")
