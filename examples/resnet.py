"""torchvision's ResNet18 or ResNet50 in int8: your weights, or random ones to see sizes and speed.

python examples/resnet.py --model resnet50 --weights resnet50-11ad3fa6.pth
"""

from _torchvision import main

if __name__ == "__main__":
    main(__doc__, ["resnet18", "resnet50"])
