"""Shared by the examples that take a network of torchvision."""

import torch
from _common import arguments, existing_file, positive, quantize_and_compare, random_views
from torch import nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def normalized(views: torch.Tensor) -> torch.Tensor:
    """As torchvision's weights were trained."""
    return (views / 255 - MEAN) / DEVIATION


def settle(model: nn.Module, views: torch.Tensor) -> None:
    """Gives a network with random weights the batch statistics of the photographs, so that its activations are sane."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(views)
    model.eval()


def main(description: str, names: list[str]) -> None:
    parser = arguments(description.splitlines()[0])
    parser.add_argument("--model", choices=names, default=names[0])
    parser.add_argument("--weights", type=existing_file, help="a state dict of torchvision; random without")
    parser.add_argument("--size", type=positive, default=224)
    options = parser.parse_args()
    try:
        import torchvision.models
    except ImportError as error:
        raise SystemExit("this example needs torchvision: pip install torchvision") from error
    torch.manual_seed(0)
    model = getattr(torchvision.models, options.model)(weights=None)
    calibration = normalized(random_views(options.calibration, options.size, seed=options.seed))
    if options.weights:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        settle(model, calibration[:32])
    views = normalized(random_views(options.views, options.size, seed=options.seed + 1))
    quantize_and_compare(model, calibration, views, options)
