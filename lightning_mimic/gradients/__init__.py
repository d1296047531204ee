"""Per-sample gradients and what is done with them, in pure torch."""

from lightning_mimic.errors import nearest_names
from lightning_mimic.gradients.descent import Descent
from lightning_mimic.gradients.direction import Direction
from lightning_mimic.gradients.gate import gate_rows, hook_gradient
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.layers import LayerGradients
from lightning_mimic.gradients.losses import LossGradients
from lightning_mimic.gradients.model import ModelTap, WholeModelGradients
from lightning_mimic.gradients.parameters import owning_layer, select_parameters

__all__ = [
    "Descent",
    "Direction",
    "Graph",
    "LayerGradients",
    "LossGradients",
    "ModelTap",
    "WholeModelGradients",
    "gate_rows",
    "hook_gradient",
    "nearest_names",
    "owning_layer",
    "select_parameters",
]
