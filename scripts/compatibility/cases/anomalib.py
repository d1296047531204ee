"""anomalib's models that are trained by gradients."""

import anomalib.models.components.feature_extractors.timm as extractor
import torch
from anomalib.data import ImageBatch
from anomalib.models import Fastflow, ReverseDistillation, Stfpm

from scripts.compatibility.case import Case

SIZE = 64


def images(size: int):
    drawn = torch.randn(4, 3, SIZE, SIZE)
    labels = torch.zeros(4, dtype=torch.bool)
    return (ImageBatch(image=drawn[at : at + size], gt_label=labels[at : at + size]) for at in range(0, 4, size))


#: Nothing of anomalib's evaluation and pictures takes part in a step.
PLAIN = {"evaluator": False, "visualizer": False, "post_processor": False}


def without_weights(kind, **options):
    """Return a model whose backbone has random weights."""
    create = extractor.timm.create_model

    def created(*args, **kwargs):
        return create(*args, **(kwargs | {"pretrained": False}))

    extractor.timm.create_model = created
    try:
        return kind(**PLAIN, pre_processor=kind.configure_pre_processor((SIZE, SIZE)), **options)
    finally:
        extractor.timm.create_model = create


def stfpm():
    return without_weights(Stfpm)


def fastflow():
    return without_weights(Fastflow, pre_trained=False, flow_steps=2)


def reverse_distillation():
    return without_weights(ReverseDistillation, pre_trained=False)


def case(name: str, module, layer: str, plain: bool = True) -> Case:
    return Case(name, module, images, layer, plain=plain, precision="32-true")


CASES = [
    case("`Stfpm` (student and teacher)", stfpm, "model.student_model.feature_extractor.layer3"),
    case("`Fastflow` (a normalising flow)", fastflow, "model.fast_flow_blocks.2"),
    case("`ReverseDistillation`", reverse_distillation, "model.bottleneck"),
]
