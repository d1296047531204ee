"""pytorch-forecasting's networks and losses."""

import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import MAE, SMAPE, NormalDistributionLoss, QuantileLoss

from scripts.compatibility.case import Case

HIDDEN = {"learning_rate": 0.01, "dropout": 0.0, "log_interval": 0}


def series(**options) -> TimeSeriesDataSet:
    values = np.random.default_rng(0).normal(size=40) + 3.0
    table = pd.DataFrame({"series": np.repeat(["a", "b"], 20), "time": np.tile(np.arange(20), 2), "value": values})
    given = {
        "time_idx": "time",
        "target": "value",
        "group_ids": ["series"],
        "max_encoder_length": 5,
        "max_prediction_length": 3,
        "time_varying_unknown_reals": ["value"],
    }
    return TimeSeriesDataSet(table, **given | options)


def transformer(loss):
    options = {"hidden_size": 8, "attention_head_size": 1, "hidden_continuous_size": 4}
    return TemporalFusionTransformer.from_dataset(series(**KNOWN), loss=loss(), **options, **HIDDEN)


def deep_ar():
    options = {"hidden_size": 8, "rnn_layers": 1, "loss": NormalDistributionLoss()}
    return DeepAR.from_dataset(series(**KNOWN), **options, **HIDDEN)


def nbeats():
    options = {"widths": [8, 8], "num_blocks": [1, 1], "num_block_layers": [1, 1], "backcast_loss_ratio": 0.0}
    return NBeats.from_dataset(series(), loss=MAE(), **options, **HIDDEN)


KNOWN = {"time_varying_known_reals": ["time"], "static_categoricals": ["series"]}


def batches(**options):
    return lambda size: series(**options).to_dataloader(train=False, batch_size=size, num_workers=0)


def case(name: str, module, layer: str, data=KNOWN, **options) -> Case:
    return Case(name, module, batches(**data), layer, precision="32-true", options=options)


CASES = [
    case("`TemporalFusionTransformer`, `QuantileLoss`", transformer, "output_layer", loss=QuantileLoss),
    case("`TemporalFusionTransformer`, `SMAPE`", transformer, "output_layer", loss=SMAPE),
    case("`DeepAR`, `NormalDistributionLoss`", deep_ar, "distribution_projector"),
    case("`NBeats`, `MAE`", nbeats, "net_blocks.1", {}),
]
