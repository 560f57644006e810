"""Image classifiers: some with a stem for small pictures, all others of torchvision by name, and normalisation inside.

A name of ``MODELS`` is the one here; ``torchvision/NAME`` is always torchvision's own.
"""

from collections.abc import Callable

import torch
from torch import nn
from torchvision import models as vision
from torchvision.models.resnet import BasicBlock

from salun_diffusion.errors import SalunError
from salun_diffusion.tensors import read_safetensors

from .data import Data


class Normalised(nn.Module):
    """A network behind its normalisation: it takes pictures in 0…1, ``(n, channels, height, width)``, fp32.

    So a mask, a checkpoint and an attack all speak of one model, whatever the data were normalised with.
    """

    def __init__(self, network: nn.Module, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.network((pictures - self.mean) / self.std)


class Mixture(nn.Module):
    """Networks behind a gate: log p(c | x) = log Σ_s g_s(x) p_s(c | x), fp32 ``(n, classes)``, p_s the softmax of
    network s and g that of the gate's first outputs, one for each network.
    """

    def __init__(self, networks: list[Normalised], gate: Normalised):
        super().__init__()
        self.networks, self.gate = nn.ModuleList(networks), gate

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        shares = self.gate(pictures)[:, : len(self.networks)].log_softmax(1)
        each = torch.stack([network(pictures).log_softmax(1) for network in self.networks], 1)
        return (shares[:, :, None] + each).logsumexp(1)


def _resnet18(channels: int, classes: int, size: int) -> nn.Module:
    """With CIFAR's stem: a 3×3 convolution of stride 1, and no pooling after it."""
    network = vision.resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _small_resnet(blocks: int, widths: tuple[int, ...] = (16, 32, 64)) -> Callable[[int, int, int], nn.Module]:
    """The thin ResNets of He et al. 2016, section 4.2: three stages of ``blocks`` basic blocks."""

    def build(channels: int, classes: int, size: int) -> nn.Module:
        layers = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        inside = widths[0]
        for width in widths:
            for number in range(blocks):
                stride = 2 if width != widths[0] and number == 0 else 1
                shortcut = None
                if stride != 1 or inside != width:
                    shortcut = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                layers.append(BasicBlock(inside, width, stride, shortcut))
                inside = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))

    return build


def _vgg16_bn(channels: int, classes: int, size: int) -> nn.Module:
    network = vision.vgg16_bn(num_classes=classes)
    network.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    if size < 64:  # the three large layers at its end are made for 224 pixels
        network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)
    return network


def _swin_t(channels: int, classes: int, size: int) -> nn.Module:
    if size >= 128:
        return vision.swin_t(num_classes=classes)
    return vision.SwinTransformer(
        patch_size=[2, 2], embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=[4, 4],
        stochastic_depth_prob=0.2, num_classes=classes,
    )  # fmt: skip


def _vit(layers: int, heads: int, width: int, patches: int) -> Callable[[int, int, int], nn.Module]:
    """A ViT of ``patches`` patches a side (as many as there are pixels, where these are fewer)."""

    def build(channels: int, classes: int, size: int) -> nn.Module:
        patch = max(size // patches, 1)
        network = vision.VisionTransformer(
            image_size=size, patch_size=patch, num_layers=layers, num_heads=heads, hidden_dim=width, mlp_dim=4 * width,
            num_classes=classes,
        )  # fmt: skip
        if channels != 3:
            network.conv_proj = nn.Conv2d(channels, width, patch, patch)
        return network

    return build


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet8": _small_resnet(1),
    "resnet20": _small_resnet(3),
    "resnet18": _resnet18,
    "vgg16_bn": _vgg16_bn,
    "swin_t": _swin_t,
    "vit_s": _vit(12, 6, 384, 8),
    "vit_xs": _vit(4, 4, 64, 4),
}


def build(name: str, data: Data, seed: int, moments: tuple | None = None) -> Normalised:
    """A fresh model for ``data``, its weights drawn from ``seed`` alone.

    Args:
        data: whose classes, channels and size it is made for.
        seed: of its weights.
        name: of ``MODELS``, or of a classifier of torchvision.
        moments: mean and standard deviation of each channel; those of the training pictures without it.

    Raises:
        SalunError: a model for colour on grey pictures, pictures that are too small for it, or moments of other
            channels.
    """
    channels, size = data.train.images.shape[1], data.train.images.shape[-1]
    if channels != 3 and (name == "swin_t" or name not in MODELS):
        raise SalunError(f"The model {name} takes colour pictures, and {data.name} has grey ones: choose another.")
    mean, std = (torch.tensor(each) for each in moments) if moments else _moments(data.train.images)
    if len(mean) != channels:
        raise SalunError(f"--mean and --std have {len(mean)} numbers, and {data.name} has {channels} channels.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in MODELS:
            return Normalised(MODELS[name](channels, len(data.classes), size), mean, std)
        return Normalised(_torchvision(name.removeprefix("torchvision/"), len(data.classes), size), mean, std)


def _torchvision(name: str, classes: int, size: int) -> nn.Module:
    own = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        own = {"aux_logits": False, "init_weights": True}
    try:
        network = vision.get_model(name, weights=None, num_classes=classes, **own).eval()
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:  # its layers run out of pixels, or patches do not fit
        reason = str(error).strip().splitlines()[0]
        raise SalunError(f"{name} takes no pictures of {size} pixels ({reason}): give another --image_size.") from None
    return network.train()


def load_weights(model: Normalised, path: str, given: bool) -> None:
    """Put a trained model's weights in place: those of ``model`` itself, or of the network within it.

    Args:
        model: what is filled.
        path: a safetensors file of a state dict, with or without the prefixes of DataParallel and of this room.
        given: whether the normalisation was given beside it; then the file's own is not looked at.

    Raises:
        SalunError: a file of another kind, or of another network or number of classes, or no normalisation.
    """
    tensors = {name.removeprefix("module."): value for name, value in read_safetensors(path)[0].items()}
    network = {name.removeprefix("network."): v for name, v in tensors.items() if name not in ("mean", "std")}
    if not given:
        if not {"mean", "std"} <= tensors.keys():
            raise SalunError(
                f"{path} does not say how its pictures were normalised: give --mean and --std, one number a channel "
                "(0 and 1 if they were not)."
            )
        try:
            model.mean.copy_(tensors["mean"].view_as(model.mean))
            model.std.copy_(tensors["std"].view_as(model.std))
        except RuntimeError:
            raise SalunError(f"{path} has mean and std of other channels: give --mean and --std.") from None
    try:
        model.network.load_state_dict(network)
    except RuntimeError as error:
        fault = (str(error).splitlines() + [""])[1].strip()
        raise SalunError(
            f"{path} does not fit --model for this data: {fault[:300]} Name the model that it is of (torchvision/NAME "
            "where the one here has another stem)."
        ) from None


def _moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, pictures in 0…1, without a float copy of them all."""
    counts = torch.stack([torch.bincount(images[:, c].flatten().int(), minlength=256) for c in range(images.shape[1])])
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = ((share @ values**2) - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1).float()  # a channel that never changes would divide 0 by 0
