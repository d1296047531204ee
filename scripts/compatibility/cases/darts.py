"""darts' forecasting models: the LightningModule that each trains."""

from functools import cache, partial

import numpy as np
import pytorch_lightning as pl
from darts import TimeSeries, models
from darts.utils.likelihood_models import GaussianLikelihood, QuantileRegression

from scripts.compatibility.case import Case
from scripts.compatibility.data import batches_of


class Keep(pl.Callback):
    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch)


def trained(kind: str, **options):
    """Return darts' model after one epoch, and the batches that it was trained on."""
    kept = Keep()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = {"accelerator": "cpu", "callbacks": [kept], "enable_checkpointing": False, **quiet}
    found = getattr(models, kind)(
        input_chunk_length=5,
        output_chunk_length=1 if kind == "RNNModel" else 3,
        n_epochs=1,
        batch_size=4,
        random_state=0,
        pl_trainer_kwargs=trainer,
        **options,
    )
    values = np.random.default_rng(0).normal(size=14)
    found.fit(TimeSeries.from_values(values), dataloader_kwargs={"shuffle": False}, verbose=False)
    return found, kept.batches


def module(kind: str, **options):
    found = trained(kind, **options)[0].model
    found.trainer = None
    return found


def case(name: str, kind: str, layer: str, **options) -> Case:
    batches = cache(lambda: trained(kind, **options)[1][0])
    return Case(name, partial(module, kind, **options), lambda size: batches_of(batches(), size), layer)


NBEATS = {"num_stacks": 1, "num_blocks": 1, "num_layers": 1, "layer_widths": 8}

CASES = [
    case("`NBEATSModel`, mse", "NBEATSModel", "stacks.0.blocks.0.forecast_linear_layer", **NBEATS),
    case("`TiDEModel`, quantile loss", "TiDEModel", "temporal_decoder", hidden_size=8, likelihood=QuantileRegression()),
    case("`TCNModel`, a distribution's likelihood", "TCNModel", "res_blocks.0.conv2", likelihood=GaussianLikelihood()),
    case("`BlockRNNModel`, LSTM, mse", "BlockRNNModel", "fc.0", model="LSTM", hidden_dim=8),
]
