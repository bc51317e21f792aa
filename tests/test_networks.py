"""Whole networks of torchvision and timm: converted, they compute what they computed before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import checks
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import dlops

pytestmark = pytest.mark.compose

# One of each family, by the smallest image it takes.
TORCHVISION = {
    "resnet18": 33,
    "resnext50_32x4d": 32,
    "densenet121": 32,
    "squeezenet1_1": 33,
    "googlenet": 33,
    "inception_v3": 75,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 33,
    "shufflenet_v2_x0_5": 33,
    "mnasnet0_5": 32,
    "efficientnet_b0": 33,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
}
TIMM = {
    "resnet10t": 33,
    "resnest14d": 33,
    "res2net50_14w_8s": 32,
    "hrnet_w18_small": 32,
    "dla46_c": 64,
    "cspresnet50": 32,
    "repvgg_a0": 32,
    "ghostnet_100": 33,
    "hardcorenas_a": 33,
    "convnext_atto": 32,
    "edgenext_xx_small": 64,
    "mobilevit_xxs": 64,
    "efficientnet_lite0": 33,
    "selecsls42b": 33,
    "vovnet39a": 33,
    "pit_ti_224": 224,
}


def torchvision_network(name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": True}
    if name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False
    else:
        options = {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def timm_network(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10)


def results(model: nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    images = images.clone().requires_grad_()
    output = model(images)
    output.square().sum().backward()
    assert images.grad is not None
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.detach(), images.grad, *grads]


@pytest.mark.parametrize(
    ("build", "name", "size"),
    [
        *[(torchvision_network, name, size) for name, size in TORCHVISION.items()],
        *[(timm_network, name, size) for name, size in TIMM.items()],
    ],
)
def test_network(build: Callable[[str], nn.Module], name: str, size: int) -> None:
    torch.manual_seed(0)
    model = build(name).double().eval()
    keys, images = list(model.state_dict()), checks.normal((1, 3, size, size))
    expected = results(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left alone
        dlops.convert(model)
    assert not any(type(m) in (nn.Conv2d, nn.MaxPool2d) for m in model.modules())
    assert list(model.state_dict()) == keys
    for ours, theirs in zip(results(model, images), expected, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-9, atol=1e-9)
    dlops.revert(model)
    assert all(torch.equal(a, b) for a, b in zip(results(model, images), expected, strict=True))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "nf_regnet_b0"])
def test_what_is_left_alone_is_named(name: str) -> None:
    """timm's convolutions with padding or weights of their own are subclasses of Conv2d."""
    model = timm_network(name)
    with pytest.warns(UserWarning, match=r"left subclasses .* conv_stem|stem") as caught:
        dlops.convert(model)
    assert len(caught) == 1
    left = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert any(cls is dlops.nn.Conv2d for cls in left)
    assert any(cls is not dlops.nn.Conv2d for cls in left)
