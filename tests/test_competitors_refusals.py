"""What the competitors cannot do they refuse, before training where that is possible, in whole sentences."""

import itertools
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_mimic import GradMimic
from lightning_mimic.scorers import Agra, GradMatch, Influence, MimicScore, choose_weighting
from support.competitors import HEAD, NAN, OTHERS, Mixed
from support.toys import Convolution, Toy, WithLosses, loader, parameters_of, toy, toy_data, trainer

AGRA, MATCH = {"scorer": Agra(OTHERS), "parameters": "head"}, {"scorer": GradMatch(), "parameters": "head"}


class Pooled(Convolution, WithLosses):
    """A head that is no nn.Linear."""


class Scalar(WithLosses):
    """Forgets the samples of smaller batches, as the second ones are."""

    def sample_losses(self, batch: Any) -> Tensor:
        losses = super().sample_losses(batch)
        return losses if len(losses) == 4 else losses.mean()


class Detached(WithLosses):
    def sample_losses(self, batch: Any) -> Tensor:
        losses = super().sample_losses(batch)
        return losses if len(losses) == 4 else losses.detach()


class Stream(IterableDataset):
    """A data set without a length; after its first pass nothing is left of it."""

    def __init__(self) -> None:
        self.passes = itertools.count()

    def __iter__(self) -> Any:
        return iter(toy_data(4) if next(self.passes) == 0 else [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GradMimic({}, **AGRA),
            "`reference` is given, but Agra takes its direction from the batches of its `loader`; leave it out.",
        ),
        (
            lambda: GradMimic(scorer=Influence(OTHERS)),
            "`parameters` is missing; Influence needs one: a layer's path or 'all'.",
        ),
        (
            lambda: GradMimic(scorer=GradMatch()),
            "`parameters` is missing; GradMatch needs one: a layer's path or 'all'.",
        ),
        (lambda: GradMimic({}, **MATCH), "`reference` is given, but GradMatch takes none; leave it out."),
        (
            lambda: GradMimic(**AGRA, temperature=1.0),
            "`temperature` is 1.0, but Agra makes weights itself, without a softmax; leave it out (in a configuration: "
            "null).",
        ),
        (
            lambda: GradMimic(**MATCH, min_ess=0),
            "`min_ess` is 0, but GradMatch makes weights itself, without a softmax; leave it out (in a configuration: "
            "null).",
        ),
        (
            lambda: Agra(None),
            "`loader` of Agra is a NoneType; expected an iterable of batches, such as a DataLoader.",
        ),
        (
            lambda: Influence(OTHERS[0][0]),
            "`loader` of Influence is a Tensor; expected an iterable of batches, such as a DataLoader.",
        ),
        (
            lambda: Agra(iter(OTHERS)),
            "`loader` of Agra is a list_iterator, which ends once and for all; expected what can be begun again, such "
            "as a DataLoader or a list of batches.",
        ),
        (lambda: Influence([]), "`loader` of Influence is empty; expected at least one batch."),
        (
            lambda: GradMatch(fraction=0),
            "`fraction` is the share of a batch that is chosen, above 0 and at most 1, not 0.",
        ),
        (
            lambda: GradMatch(fraction=NAN),
            "`fraction` is the share of a batch that is chosen, above 0 and at most 1, not nan.",
        ),
        (
            lambda: GradMatch(regularization=-0.5),
            "`regularization` must be a finite number, 0 or more, not -0.5.",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_without_scipy_there_is_no_matching(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ValueError, match=r"^GradMatch needs the package SciPy: pip install 'lightning-mimic\[vision\]'\.$"
    ):
        GradMatch()


def fitted(kind: type[Toy], options: dict[str, Any], module: Toy | None = None) -> None:
    trainer(GradMimic(**options)).fit(toy(kind) if module is None else module, loader(toy_data(8)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            Toy,
            AGRA,
            "Agra needs the loss of every sample: give Toy a method `sample_losses(batch)` that returns one loss per "
            "sample, and average it in training_step.",
        ),
        (
            Pooled,
            MATCH,
            "GradMatch needs the inner products of per-sample gradients, which are known for nn.Linear; 'head' is a "
            "Conv2d.",
        ),
        (
            WithLosses,
            MATCH | {"parameters": "all"},
            "`parameters` selects 2 layers ('body', 'head'), but the scorer needs one nn.Linear.",
        ),
        (
            Mixed,
            MATCH,
            "the scorer needs the inner products of per-sample gradients, which can be computed only for a single "
            "nn.Linear under a loss of independent samples, and this is not such a case.",
        ),
        (
            Scalar,
            AGRA,
            "`sample_losses` returned shape () for 3 samples of the `loader` of Agra; expected one loss per sample.",
        ),
        (
            Detached,
            AGRA,
            "the losses of the `loader` of Agra do not depend on 'head.weight', 'head.bias'; name parameters that "
            "`sample_losses` uses.",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(kind, options, message):
    module = toy(kind)
    before = parameters_of(module)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fitted(kind, options, module)
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)
    assert all(part.training for part in module.modules())


def test_hooks_that_would_change_the_mean_gradient_are_refused():
    module = toy(WithLosses)
    module.head.bias.register_hook(lambda gradient: 2 * gradient)
    message = (
        "`parameters`: 'head.bias' carry gradient hooks of their own, which would change the scores or undo the "
        "weights. Remove the hooks, or leave these parameters out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fitted(WithLosses, AGRA, module)


def test_a_reference_batch_that_holds_nan_stops_the_fit_by_its_number():
    broken = [OTHERS[0], [torch.full_like(OTHERS[1][0], NAN), OTHERS[1][1]]]
    message = (
        "batch 1 of the `loader` of Influence has losses or gradients that are not finite, so samples cannot be "
        "compared with it. Remove samples that hold NaN from the loader, or lower the learning rate if the model has "
        "diverged."
    )
    with pytest.raises(FloatingPointError, match=f"^{re.escape(message)}$"):
        fitted(WithLosses, {"scorer": Influence(broken), "parameters": list(HEAD)})


def test_a_stream_that_runs_dry_stops_the_fit():
    dry = DataLoader(Stream(), 4)
    message = "the `loader` of Agra gave no batch; expected at least one batch per pass."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fitted(WithLosses, {"scorer": Agra(dry), "parameters": "head"})


def test_the_softmax_keeps_its_defaults_and_its_own_refusals():
    weighting = choose_weighting(MimicScore())
    assert (weighting.temperature, weighting.min_ess) == (1.0, 0.25)
    assert choose_weighting(MimicScore(), temperature=0.3).temperature == 0.3
    assert choose_weighting(MimicScore(), min_ess=0).min_ess == 0
    with pytest.raises(ValueError, match=r"^`temperature` must be a positive finite number or 'auto', not 0\.$"):
        GradMimic({}, "head", temperature=0)
