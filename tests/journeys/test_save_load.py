"""A network converted here runs there: another process, another instruction set, the same bits."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.testing import supported_isas


class Everything(nn.Module):
    """Each kind of integer layer, and a float part in the middle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.gate = nn.Conv2d(16, 16, 1)
        self.norm = nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + F.relu6(self.depthwise(x))
        y = F.max_pool2d(self.up(x), 2)
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        z = torch.cat([x, F.avg_pool2d(F.interpolate(y, scale_factor=2), 2)], 1)
        z = self.norm(z)  # stays float
        return self.head(F.relu(z).mean((2, 3)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = Everything(), nn.Linear(10, 3)

    def forward(self, x):
        y = self.features(x)
        return self.head(y) if y.sum() > -1e9 else y


def converted(model, x):
    prepared = qkernels.prepare(model, x[:1])
    with qkernels.calibrating(prepared):
        prepared(x)
    return qkernels.convert(prepared)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 3, 20, 16)


def test_a_loaded_model_is_the_saved_one(x, tmp_path):
    model = converted(Everything().eval(), x)
    qkernels.save(model, tmp_path / "model.qk")
    again = qkernels.load(tmp_path / "model.qk")
    assert torch.equal(again(x), model(x))
    assert str(again.report) == str(model.report)
    assert again.meta["sources"] == model.meta["sources"]
    assert again.state_dict().keys() == model.state_dict().keys()


FLOAT_MODULES = [
    (nn.ReflectionPad2d(1), [2, 3, 6, 6]),
    (nn.ConstantPad2d((1, 0, 2, 1), 0.5), [2, 3, 6, 6]),
    (nn.CircularPad1d(2), [2, 3, 6]),
    (nn.LSTM(6, 4, 2, bias=False, batch_first=True, dropout=0.2, bidirectional=True), [2, 5, 6]),
    (nn.GRU(6, 4), [2, 5, 6]),
    (nn.RNN(6, 4, nonlinearity="relu"), [2, 5, 6]),
    (nn.RMSNorm(6), [2, 5, 6]),
    (nn.LocalResponseNorm(2, 0.1), [2, 3, 6, 6]),
    (nn.Unfold(2, stride=2), [2, 3, 6, 6]),
    (nn.AdaptiveMaxPool3d(2), [2, 3, 4, 4, 4]),
    (nn.Threshold(0.1, 0.3), [2, 6]),
]


@pytest.mark.parametrize(("module", "shape"), FLOAT_MODULES, ids=lambda value: type(value).__name__)
def test_torch_modules_that_stay_float_are_saved_with_their_arguments(module, shape, tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.float_part, self.linear = module, nn.Linear(5, 4)

        def forward(self, x):
            y = self.float_part(x)
            if isinstance(module, nn.RNNBase):
                y = y[0]
            return self.linear(y.flatten(1)[:, :5])

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = converted(Network().eval(), x)
    qkernels.save(model, tmp_path / "model.qk")
    again = qkernels.load(tmp_path / "model.qk")
    assert torch.equal(again(x), model(x))
    assert repr(again.float_part) == repr(module)


PROGRAM = """
import sys, torch, qkernels
model = qkernels.load(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize("isa", supported_isas())
def test_another_process_with_another_instruction_set_gives_the_same_bits(x, tmp_path, isa):
    model = converted(Everything().eval(), x)
    qkernels.save(model, tmp_path / "model.qk")
    torch.save(x, tmp_path / "x.pt")
    paths = [str(tmp_path / name) for name in ("model.qk", "x.pt", "y.pt")]
    environment = {**os.environ, "QKERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, *paths], check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


def test_a_model_converted_in_parts_is_saved_and_loaded_onto_its_code(x, tmp_path):
    float_model = Branching().eval()
    model = converted(float_model, x)
    qkernels.save(model, tmp_path / "model.qk")
    with pytest.raises(InvalidArgument, match="skeleton=model"):
        qkernels.load(tmp_path / "model.qk")
    again = qkernels.load(tmp_path / "model.qk", skeleton=Branching())
    assert torch.equal(again(x), model(x))
    comparison = qkernels.compare(float_model, again, [x])
    assert comparison.output_sqnr_db > 15


def test_a_prepared_model_is_refused(x, tmp_path):
    with pytest.raises(InvalidArgument, match=r"call qkernels\.convert"):
        qkernels.save(qkernels.prepare(Everything(), x), tmp_path / "model.qk")


class Positions(nn.Module):
    """A float part of a Parameter and of numbers that it makes itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(9, 11, 3, padding=1)
        self.mixing = nn.Parameter(torch.randn(8, 4) * 0.4)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        mixed = self.conv(x).tanh() @ self.mixing.t() + torch.arange(8) / torch.linspace(1, 2, 8)
        return mixed * self.frozen + self.shift


def test_parameters_of_float_parts_remain_parameters_and_matmul_gives_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(2, 9, 3, 4)
    converted = qkernels.convert(qkernels.calibrate(qkernels.prepare(model, x), [x]))
    qkernels.save(converted, tmp_path / "model.qk")
    loaded = qkernels.load(tmp_path / "model.qk")
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (converted, loaded)]
    assert flags[0] == flags[1] == {"mixing": True, "frozen": False}
    with torch.inference_mode():
        assert torch.equal(loaded(x), converted(x))


def test_a_function_that_no_file_may_call_is_named_as_its_user_writes_it(tmp_path):
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.sort(self.linear(x))[0]

    model, x = Sorted().eval(), torch.randn(2, 4)
    converted = qkernels.convert(qkernels.calibrate(qkernels.prepare(model, x), [x]))
    with pytest.raises(Unsupported, match=r"calls torch\.sort at node 'sort'"):
        qkernels.save(converted, tmp_path / "model.qk")
