"""scvi-tools: variational autoencoders of cells."""

from functools import partial

import anndata
import numpy as np
import scvi
import torch
from scvi.train import TrainingPlan

from scripts.compatibility.case import Case

CELLS, GENES = 8, 10


def cells() -> anndata.AnnData:
    counts = np.random.default_rng(0).poisson(3.0, size=(CELLS, GENES)).astype(np.float32)
    return anndata.AnnData(counts)


def model(kind: str):
    found = cells()
    getattr(scvi.model, kind).setup_anndata(found)
    return getattr(scvi.model, kind)(found, n_hidden=8, n_latent=2)


def plan(kind: str) -> TrainingPlan:
    return TrainingPlan(model(kind).module)


def same_noise(self, sample_shape=()):
    """Draw a latent variable with noise that does not depend on the other samples of the batch."""
    return self.loc + self.scale * (0.0 * torch.randn_like(self.loc) + 0.7)


torch.distributions.Normal.rsample = same_noise


def batches(kind: str, size: int):
    found = model(kind)
    return found._make_data_loader(adata=found.adata, indices=list(range(4)), batch_size=size, shuffle=False)


def case(name: str, kind: str, layer: str) -> Case:
    return Case(name, partial(plan, kind), partial(batches, kind), layer, precision="32-true")


CASES = [
    case("`TrainingPlan` of `SCVI`", "SCVI", "module.decoder.px_scale_decoder.0"),
    case("`TrainingPlan` of `LinearSCVI`", "LinearSCVI", "module.z_encoder.mean_encoder"),
]
