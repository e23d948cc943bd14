"""A plan may run parts of a network on slices of the batch: the bits stay those of single images."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import NETWORKS, conv, converted, leaves, network, tensors

import qkernels
from qkernels.ops.plan import NativePlan

BATCH = 7


@pytest.fixture
def threads():
    """Sets the number of threads; restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def slices(native, inputs):
    return {step["images"] for step in native.describe(inputs)["steps"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_slices_of_any_size_give_the_bits_of_the_modules(name, threads):
    model, shapes, _ = network(name)
    int8 = converted(model, *tensors(shapes))
    data = qkernels.compile(int8, tuple(tensors(shapes)))._native.data
    inputs = tensors([(BATCH, *shape[1:]) for shape in shapes], seed=2)
    expected = leaves(int8(*inputs))
    seen = set()
    for cache_bytes in (1000, 5000, 20000):
        native = NativePlan(data, cache_bytes)
        for count in (1, 2, 3):
            threads(count)
            seen |= slices(native, inputs)
            for e, got in zip(expected, native(inputs), strict=True):
                assert torch.equal(got, e)
    assert len(seen) > 1 or name in ("mlp", "mlp_sequence", "two_inputs")  # these fit


class MixesImages(nn.Module):
    """Between convolutions: the batch as channels, as pixels, and images in another order."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 8), conv(8, 8, act=None)

    def forward(self, x):
        x = self.first(x)
        x = self.second(x.permute(1, 0, 2, 3).reshape(x.shape[0], 8, x.shape[2], x.shape[3]))
        return self.third(x.permute(2, 1, 0, 3))


@pytest.mark.parametrize("batch", [8, 12])
def test_operations_that_mix_images_see_the_whole_batch(batch, threads):
    threads(2)
    images = torch.randn(batch, 3, 12, 12)
    int8 = converted(MixesImages(), images)
    data = qkernels.compile(int8, (images,))._native.data
    expected = int8(images)
    for cache_bytes in (500, 3000, 10000):
        native = NativePlan(data, cache_bytes)
        assert torch.equal(native([images])[0], expected)
        assert len(slices(native, [images])) > 1


def test_profile_and_describe_say_how_large_the_slices_are(threads):
    images = torch.randn(8, 3, 32, 32)
    plan = qkernels.compile(converted(nn.Sequential(conv(3, 16), conv(16, 16), conv(16, 8, act=None)), images), images)
    plan._native = NativePlan(plan._native.data, 40_000)
    for count in (1, 2):
        threads(count)
        profile = plan.profile(images, runs=2)
        assert any(step.images == 1 for step in profile.steps)
        assert "image by image" in str(profile)
        assert all(step.microseconds > 0 for step in profile.steps)
    assert "image by image" in str(plan)
    small = plan.describe(images[:1])
    assert all(step["images"] == 0 for step in small["steps"])
    assert small["arena_bytes"] < plan.describe(images)["arena_bytes"] < 8 * small["arena_bytes"]
