"""Known networks of torchvision, with random weights on small images: plans give the bits of the modules."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from networks import converted, leaves, tensors

import qkernels

torchvision = pytest.importorskip("torchvision")

NAMES = (
    *("mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnet50", "resnext50_32x4d", "efficientnet_b0"),
    *(
        "efficientnet_v2_s",
        "squeezenet1_1",
        "shufflenet_v2_x1_0",
        "regnet_y_400mf",
        "regnet_x_400mf",
        "googlenet",
        "mnasnet0_5",
    ),
    *("vgg11_bn", "densenet121", "inception_v3", "lraspp_mobilenet_v3_large", "fcn_resnet50"),
)
OPTIONS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
    "fcn_resnet50": {"weights_backbone": None},
}


@pytest.mark.parametrize("name", NAMES)
def test_plan_gives_the_bits_of_the_modules(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    size = 96 if name == "inception_v3" else 40
    example = tensors([(2, 3, size, size)])
    int8 = converted(model, *example)
    plan = qkernels.compile(int8, tuple(example))
    for inputs in (example, tensors([(1, 3, size + 9, size - 5)], seed=1)):
        for got, expected in zip(leaves(plan(*inputs)), leaves(int8(*inputs)), strict=True):
            assert torch.equal(got, expected)
