"""Per-sample gradients and what is done with them, in pure torch."""

from lightning_mimic.gradients.direction import Direction
from lightning_mimic.gradients.gate import gate_rows
from lightning_mimic.gradients.layers import LayerGradients
from lightning_mimic.gradients.parameters import nearest_names, owning_layer, select_parameters

__all__ = [
    "Direction",
    "LayerGradients",
    "gate_rows",
    "nearest_names",
    "owning_layer",
    "select_parameters",
]
