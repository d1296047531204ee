"""Small networks of the architectures that people train."""

import open_clip
import timm
import torch
import torchvision
from torch import nn

IMAGES, TOKENS = (3, 32, 32), (6,)


def mlp(**options):
    return nn.Sequential(nn.Linear(5, 4, **options), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="circular", bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def timm_vit(**options):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=8, depth=2, num_heads=2, num_classes=3, **options
    )


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, dropout=0.2, num_classes=3
    )


def torchvision_convnext():
    blocks = [torchvision.models.convnext.CNBlockConfig(*sizes, 1) for sizes in ((4, 8), (8, None))]
    return torchvision.models.convnext.ConvNeXt(blocks, num_classes=3, layer_scale=0.3)


def timm_convnext():
    return timm.models.convnext.ConvNeXt(depths=(1,) * 4, dims=(4, 4, 8, 8), num_classes=3)


def mixer():
    return timm.models.mlp_mixer.MlpMixer(img_size=32, patch_size=16, num_blocks=2, embed_dim=8, num_classes=3)


def torchvision_resnet():
    block = torchvision.models.resnet.BasicBlock
    return moved(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3))


def timm_resnet():
    block = timm.models.resnet.BasicBlock
    return moved(timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=3))


def moved(net):
    """Running statistics and scales that are not those of a new net."""
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
    return net


def clip_image_tower(**options):
    return open_clip.model.VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=5, **options
    )


def clip_text_tower(**options):
    return open_clip.model.TextTransformer(
        context_length=6, vocab_size=12, width=8, heads=2, layers=2, mlp_ratio=2.0, output_dim=4, **options
    )


def swin():
    return torchvision.models.SwinTransformer([2, 2], 4, [2], [1], [2, 2], num_classes=3, stochastic_depth_prob=0.0)


NETS = {  # how the net is made, the shape of a sample, and what cannot be seen in it
    "mlp": (mlp, (5,), []),
    "mlp of tokens": (mlp, (2, 5), []),
    "mlp of tokens on a grid": (mlp, (2, 2, 5), []),
    "conv net": (conv_net, (3, 8, 8), []),
    "torchvision vit": (torchvision_vit, (3, 8, 8), []),
    "timm vit": (timm_vit, IMAGES, []),
    "timm vit, layer scale": (lambda: timm_vit(init_values=1e-2), IMAGES, []),
    "timm vit, qk norm, registers, dropout": (
        lambda: timm_vit(qk_norm=True, reg_tokens=2, attn_drop_rate=0.3, proj_drop_rate=0.3),
        IMAGES,
        [],
    ),
    "timm vit, attention pooling": (lambda: timm_vit(global_pool="map"), IMAGES, []),
    "CLIP image tower": (clip_image_tower, IMAGES, []),
    "CLIP image tower, layer scale": (lambda: clip_image_tower(ls_init_value=0.1), IMAGES, []),
    "CLIP image tower, average": (lambda: clip_image_tower(pool_type="avg", final_ln_after_pool=True), IMAGES, []),
    "CLIP text tower": (clip_text_tower, TOKENS, []),
    "CLIP text tower, qk norm": (lambda: clip_text_tower(qk_norm=True), TOKENS, []),
    "CLIP text tower, linear projection": (lambda: clip_text_tower(proj_bias=True), TOKENS, []),
    "CLIP text tower, class token": (lambda: clip_text_tower(embed_cls=True), TOKENS, []),
    "torchvision convnext": (torchvision_convnext, (3, 16, 16), []),
    "timm convnext": (timm_convnext, IMAGES, []),
    "mixer": (mixer, IMAGES, []),
    "torchvision resnet in eval mode": (lambda: torchvision_resnet().eval(), IMAGES, []),
    "timm resnet in eval mode": (lambda: timm_resnet().eval(), IMAGES, []),
    "torchvision swin": (swin, (3, 8, 8), []),
}


def made(kind, rows=4, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape, unseen = NETS[kind]
    net = make().to(dtype)
    for parameter in net.parameters():  # nothing is zero, as class tokens are in a new net
        with torch.no_grad():
            parameter += 0.05 * torch.randn_like(parameter)
    x = torch.randint(1, 12, (rows, *shape)) if shape == TOKENS else torch.randn(rows, *shape, dtype=dtype)
    return net, x, unseen
