"""Transforms: the numbers they give, by hand, and that a cache can tell them apart."""

import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

from lightning_mimic.data.transforms import paper_transform, timm_preset, torchvision_preset

VALUES = torch.from_numpy(np.random.default_rng(0).integers(90, 166, (3, 40, 60), dtype=np.uint8))
PICTURE = Image.fromarray(VALUES.permute(1, 2, 0).numpy())
TINY = Image.fromarray(VALUES[:, :8, :8].permute(1, 2, 0).contiguous().numpy())


def resized(size, mode):
    """The picture in float, from 0 to 1, shape ``(3, *size)``; Pillow rounds to 255ths after each axis."""
    return F.interpolate(VALUES[None] / 255, size, mode=mode, antialias=True)[0]


def test_the_papers_transform_stretches_to_a_square_from_minus_one_to_one():
    found = paper_transform(24)(PICTURE)
    torch.testing.assert_close(found, resized((24, 24), "bilinear") * 2 - 1, rtol=0, atol=0.02)
    assert (found.dtype, paper_transform()(TINY).shape) == (torch.float32, (3, 224, 224))
    same = paper_transform(8)(TINY)
    torch.testing.assert_close(same, VALUES[:, :8, :8] / 127.5 - 1)


def test_torchvisions_preset_is_the_weights_own():
    for name in ("ViT_B_16_Weights.IMAGENET1K_V1", "ViT_L_16_Weights.DEFAULT"):
        own = torchvision.models.get_weight(name).transforms()
        assert repr(torchvision_preset(name)) == repr(own)
        torch.testing.assert_close(torchvision_preset(name)(TINY), own(TINY), rtol=0, atol=0)
    message = (
        "`weights`: torchvision has no 'ViT_B_16_Weights.IMAGENET1K_V2'; nearest: 'ViT_B_16_Weights.IMAGENET1K_V1'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        torchvision_preset("ViT_B_16_Weights.IMAGENET1K_V2")


def test_timms_preset_is_the_tags_own():
    found = timm_preset("vit_base_patch16_224.augreg_in21k")(PICTURE)
    cut = resized((248, 372), "bicubic")[:, 12:236, 74:298]
    torch.testing.assert_close(found, cut * 2 - 1, rtol=0, atol=0.03)
    assert "tensor([0.4850, 0.4560, 0.4060])" in repr(timm_preset("deit_base_patch16_224"))
    assert timm_preset("vit_base_patch16_224")(TINY).shape == (3, 224, 224)
    for name in ("vit_base_patch16_22", "vit_base_patch16_224.augreg_in22k"):
        with pytest.raises(ValueError, match=f"^`model_name`: timm has no '{name}'; nearest: 'vit_base_patch16_224"):
            timm_preset(name)


def test_no_two_transforms_look_alike_to_a_cache():
    made = [paper_transform(224), paper_transform(384), timm_preset("deit_base_patch16_224")]
    made += [torchvision_preset(f"ViT_B_16_Weights.{tag}") for tag in ("IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1")]
    made += [timm_preset(f"vit_base_patch16_{size}.augreg_in21k_ft_in1k") for size in (224, 384)]
    assert len({repr(each) for each in made}) == len(made)
    assert not any(" at 0x" in repr(each) for each in made)
