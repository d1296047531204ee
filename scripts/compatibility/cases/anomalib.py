"""anomalib's models that are trained by gradients."""

from functools import partial

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
        found = kind(**PLAIN, pre_processor=kind.configure_pre_processor((SIZE, SIZE)), **options)
    finally:
        extractor.timm.create_model = create
    found.train = partial(train, found)
    return found


def train(module, mode: bool = True):
    """Set the mode of all layers; the model itself returns anomaly maps in evaluation, and nothing to train on."""
    type(module).train(module, mode)
    module.model.training = True
    return module


class StfpmOfSamples(Stfpm):
    def sample_losses(self, batch):
        features = self.model(batch.image)  # of the teacher, and of the student
        rows = [
            [{name: f[i : i + 1] for name, f in each.items()} for each in features] for i in range(len(batch.image))
        ]
        return torch.stack([self.loss(*row) for row in rows])

    def training_step(self, batch, *args, **kwargs):
        return self.sample_losses(batch).mean()


class FastflowOfSamples(Fastflow):
    def sample_losses(self, batch):
        hidden, jacobians = self.model(batch.image)
        return sum(0.5 * (h**2).sum((1, 2, 3)) - j for h, j in zip(hidden, jacobians, strict=True))

    def training_step(self, batch, *args, **kwargs):
        return self.sample_losses(batch).mean()


class ReverseDistillationOfSamples(ReverseDistillation):
    def sample_losses(self, batch):
        features = self.model(batch.image)  # of the encoder, and of the decoder
        rows = [[[f[i : i + 1] for f in each] for each in features] for i in range(len(batch.image))]
        return torch.stack([self.loss(*row) for row in rows])

    def training_step(self, batch, *args, **kwargs):
        return self.sample_losses(batch).mean()


def case(name: str, kind: type, fixed: type, layer: str, plain: bool = True, **options) -> Case:
    module, repaired = partial(without_weights, kind), partial(without_weights, fixed)
    return Case(
        name, module, images, layer, plain=plain, fixed=repaired, lines=fixed, precision="32-true", options=options
    )


RESNET = {"backbone": "resnet18", "pre_trained": False}

CASES = [
    case(
        "`Stfpm` (student and teacher, a sum)",
        Stfpm,
        StfpmOfSamples,
        "model.student_model.feature_extractor.layer3",
        plain=False,
    ),
    case(
        "`Fastflow` (a normalising flow)",
        Fastflow,
        FastflowOfSamples,
        "model.fast_flow_blocks.2.module_list.1.subnet.2",
        **RESNET,
        flow_steps=2,
    ),
    case(
        "`ReverseDistillation`",
        ReverseDistillation,
        ReverseDistillationOfSamples,
        "model.decoder.layer3.1.conv2",
        **RESNET,
    ),
]
