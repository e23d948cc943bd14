"""torchvision's MobileNetV2 in int8: your weights, or random ones to see sizes and speed.

python examples/mobilenet_v2.py --weights mobilenet_v2-7ebf99e0.pth
"""

from _torchvision import main

if __name__ == "__main__":
    main(__doc__, ["mobilenet_v2"])
