"""torch-uncertainty's routines."""

import torch
from torch_uncertainty import losses
from torch_uncertainty.layers.distributions import NormalLinear
from torch_uncertainty.routines import ClassificationRoutine, RegressionRoutine

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of

CLASSES, FEATURES = 3, 6


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def classifier(loss) -> ClassificationRoutine:
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES))
    return ClassificationRoutine(model, CLASSES, loss(), optim_recipe=optimizer(model))


def regressor(loss, probabilistic: bool) -> RegressionRoutine:
    last = NormalLinear(torch.nn.Linear, event_dim=2, in_features=8) if probabilistic else torch.nn.Linear(8, 2)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), last)
    return RegressionRoutine(
        model, 2, loss(), dist_family="normal" if probabilistic else None, optim_recipe=optimizer(model)
    )


def classes(size: int):
    return batches_of((torch.randn(4, FEATURES).double(), torch.arange(4) % CLASSES), size)


def numbers(size: int):
    return batches_of((torch.randn(4, FEATURES).double(), torch.randn(4, 2).double()), size)


def classified(name: str, loss, plain: bool = True) -> Case:
    return Case(f"`ClassificationRoutine`, {name}", classifier, classes, "model.2", plain=plain, options={"loss": loss})


CASES = [
    classified("cross-entropy", torch.nn.CrossEntropyLoss),
    classified("`FocalLoss`", lambda: losses.FocalLoss(2.0)),
    classified("`DECLoss` (evidential)", lambda: losses.DECLoss(1, reg_weight=0.1)),
    classified("`ConflictualLoss`", losses.ConflictualLoss),
    classified("`ConfidencePenaltyLoss`", losses.ConfidencePenaltyLoss),
    Case(
        "`RegressionRoutine`, a distribution's parameters, `DistributionNLLLoss`",
        regressor,
        numbers,
        "model.2",
        options={"loss": losses.DistributionNLLLoss, "probabilistic": True},
    ),
    Case(
        "`RegressionRoutine`, mse",
        regressor,
        numbers,
        "model.2",
        options={"loss": torch.nn.MSELoss, "probabilistic": False},
    ),
]
