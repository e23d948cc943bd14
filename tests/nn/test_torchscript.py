"""`torch.jit.script` of a converted model gives its bits, also from a file and on another instruction set."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.testing import isa_cap

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Everything(nn.Module):
    """Every kind of layer, and float operations behind."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 4, 1)
        self.up, self.pool = nn.ConvTranspose2d(12, 8, 3, 2, 1, 1, groups=4), nn.MaxPool2d(2)
        self.avg, self.fc, self.act = nn.AvgPool2d(2), nn.Linear(8, 10), nn.Hardswish()

    def forward(self, x):
        x = F.relu6(self.c1(x))
        x = torch.relu(x + self.c2(x))
        x = self.up(torch.cat([self.c3(x), x], 1))
        x = F.interpolate(self.pool(self.act(x)), scale_factor=2.0)
        x = self.avg(x * torch.sigmoid(x)).mean([2, 3])
        return F.softmax(self.fc(x), dim=-1)


def converted(model, x):
    prepared = qkernels.prepare(model.eval(), x)
    with qkernels.calibrating(prepared):
        prepared(x)
    return qkernels.convert(prepared)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return converted(Everything(), torch.randn(4, 3, 16, 16))


def through_file(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file), file.getbuffer().nbytes


def test_scripted_model_gives_the_same_bits_for_every_size(network):
    names = list(network.state_dict())
    scripted = torch.jit.script(network)
    assert list(network.state_dict()) == names  # the model itself stays as it is
    loaded, _ = through_file(scripted)
    for shape in ((4, 3, 16, 16), (1, 3, 16, 16), (2, 3, 24, 40)):
        x = torch.randn(shape)
        for model in (scripted, loaded):
            assert torch.equal(model(x), network(x))


def test_file_of_a_model_that_ran_fits_other_machines(network, isa):
    x = torch.randn(2, 3, 16, 16)
    torch.jit.script(network)  # from the second time on torch's names of classes are longer
    scripted = torch.jit.script(network)
    scripted(x)
    _, size = through_file(scripted)
    loaded, _ = through_file(scripted)
    with isa_cap("scalar"):
        assert torch.equal(loaded(x), network(x))
    assert size == pytest.approx(through_file(torch.jit.script(network))[1], rel=0.01)  # nothing packed is written


def test_one_layer_and_a_frozen_model_script(network):
    x = torch.randn(2, 3, 16, 16)
    frozen = torch.jit.freeze(torch.jit.script(network))
    assert torch.equal(frozen(x), network(x))
    layer = next(m for m in network.modules() if getattr(m, "kind", "") == "quantize")
    assert torch.equal(torch.jit.script(layer)(x), layer(x))
