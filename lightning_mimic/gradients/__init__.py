"""Products with per-sample gradients, in pure torch."""

from lightning_mimic.gradients.direction import Direction
from lightning_mimic.gradients.gradient_direction import GradientDirection
from lightning_mimic.gradients.graph import Graph
from lightning_mimic.gradients.layer_rule import LayerRule
from lightning_mimic.gradients.layer_rules import is_linear, register_layer_rule
from lightning_mimic.gradients.layers import LayerGradients
from lightning_mimic.gradients.losses import LossGradients
from lightning_mimic.gradients.model import ModelHooks, WholeModelGradients
from lightning_mimic.gradients.nodes import gate_rows, hook_gradient
from lightning_mimic.gradients.output_gradients import OutputGradients
from lightning_mimic.gradients.parameters import named_parameters, owning_layer, select_parameters
from lightning_mimic.gradients.rule_check import check_layer_rule
from lightning_mimic.gradients.sample_gradients import SampleGradients

#: The classes that represent per-sample gradients.
REPRESENTATIONS: tuple[type[SampleGradients], ...] = (LayerGradients, WholeModelGradients, LossGradients)

__all__ = [
    "REPRESENTATIONS",
    "Direction",
    "GradientDirection",
    "Graph",
    "LayerGradients",
    "LayerRule",
    "LossGradients",
    "ModelHooks",
    "OutputGradients",
    "SampleGradients",
    "WholeModelGradients",
    "check_layer_rule",
    "gate_rows",
    "hook_gradient",
    "is_linear",
    "named_parameters",
    "owning_layer",
    "register_layer_rule",
    "select_parameters",
]
