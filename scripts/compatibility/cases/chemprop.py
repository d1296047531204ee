"""chemprop's message passing over molecules."""

from functools import partial

import numpy as np
from chemprop import data, models, nn

from scripts.compatibility.case import Case

MOLECULES = ["CCO", "c1ccccc1O", "CC(=O)N", "CCCl"]


class MoleculesOfSamples(models.MPNN):
    def sample_losses(self, batch):
        bmg, V_d, X_d, targets, weights, *_ = batch
        mask = targets.isfinite()
        predicted = self.predictor.train_step(self.fingerprint(bmg, V_d, X_d))
        losses = self.criterion._calc_unreduced_loss(predicted, targets.nan_to_num(), mask, weights, None, None)
        return weights.view(-1) * (losses * mask).sum(1) / mask.sum(1)

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


def made(kind: type[models.MPNN], predictor: str, tasks: int) -> models.MPNN:
    head = getattr(nn, predictor)(n_tasks=tasks, input_dim=8, hidden_dim=8)
    return kind(nn.BondMessagePassing(d_h=8, depth=2), nn.MeanAggregation(), head)


def molecules(tasks: int, missing: bool, classes: bool):
    def batches(size: int):
        targets = np.random.default_rng(0).normal(size=(4, tasks))
        targets = (targets > 0).astype(float) if classes else targets
        if missing:
            targets[0, 0] = targets[2, 1] = targets[3, 1] = np.nan
        points = [data.MoleculeDatapoint.from_smi(smi, y) for smi, y in zip(MOLECULES, targets, strict=True)]
        return data.build_dataloader(data.MoleculeDataset(points), batch_size=size, shuffle=False)

    return batches


def case(name: str, predictor: str, plain: bool, tasks: int = 1, missing: bool = False) -> Case:
    return Case(
        name,
        partial(made, models.MPNN),
        molecules(tasks, missing, predictor.startswith("Binary")),
        "predictor.ffn.1",
        plain=plain,
        fixed=partial(made, MoleculesOfSamples),
        lines=MoleculesOfSamples,
        settings={"on_nonfinite": "mask_loss"} if missing else {},
        precision="32-true",
        options={"predictor": predictor, "tasks": tasks},
    )


CASES = [
    case("`MPNN`, regression", "RegressionFFN", True),
    case("`MPNN`, three tasks with missing (NaN) targets", "RegressionFFN", False, 3, True),
    case("`MPNN`, classification", "BinaryClassificationFFN", True),
]
