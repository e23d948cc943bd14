"""In the place of torchvision's MNIST and transforms: digits that are on the machine, at MNIST's size."""

import torch.nn.functional as F
from torch.utils.data import Dataset

from qkernels.data import load_images


class MNIST(Dataset):
    def __init__(self, root, train=True, transform=None, download=False):
        images = load_images("digits")
        x, self.y = (images.train_x, images.train_y) if train else (images.test_x, images.test_y)
        x, self.y = x[:640], self.y[:640]
        self.x = F.interpolate(x, (28, 28), mode="bilinear")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


class transforms:
    """`load_images` has done it all."""

    def Compose(steps):
        return steps

    def ToTensor():
        return None

    def Normalize(mean, deviation):
        return None
