"""A LightningModule around a model and its loss, where a library has none."""

from typing import Any

import lightning as L
import torch


class Trained(L.LightningModule):
    """Trains by plain gradient descent; a case adds the training step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.01)
