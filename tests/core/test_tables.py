"""The tables of unary functions: rounded once from float64, indexed by the byte of the code."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qkernels import ops
from qkernels.core import tables
from qkernels.core.qspec import QParams
from qkernels.errors import InvalidArgument, Unsupported

IN_UINT8 = QParams.per_tensor(0.05, 131)
IN_INT8 = QParams.per_tensor(0.05, -3, -128, 127, torch.int8)
OUT = QParams.per_tensor(0.03, 20)
FUNCTIONS = {
    "relu": ({}, F.relu),
    "relu6": ({}, F.relu6),
    "hardtanh": ({"min_val": -0.5, "max_val": 2.0}, lambda x: x.clamp(-0.5, 2.0)),
    "hardswish": ({}, F.hardswish),
    "sigmoid": ({}, torch.sigmoid),
    "silu": ({}, F.silu),
    "gelu": ({"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": ({"negative_slope": 0.2}, lambda x: F.leaky_relu(x, 0.2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("grid", [IN_UINT8, IN_INT8], ids=["uint8", "int8"])
def test_lookup_is_within_half_a_step_of_the_function(name, grid):
    options, function = FUNCTIONS[name]
    q = torch.arange(256, dtype=torch.uint8).view(grid.dtype)
    out = ops.lookup(q, tables.unary_table(name, options, grid, OUT))
    real = function((q.double() - grid.item()[1]) * grid.item()[0])
    inside = (out > 0) & (out < 255)
    error = (out.double() - 20) * OUT.item()[0] - real
    assert inside.any()
    assert error[inside].abs().max() <= OUT.item()[0] * 0.5 * (1 + 1e-9)


def test_requantize_to_the_same_grid_is_the_identity():
    identity = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(tables.requantize_table(IN_UINT8, IN_UINT8), identity)
    assert torch.equal(tables.requantize_table(IN_INT8, IN_INT8).view(torch.uint8), identity)


def test_a_narrow_output_grid_is_kept():
    narrow = QParams.per_tensor(0.03, 20, 20, 40)
    table = tables.unary_table("relu", {}, IN_UINT8, narrow)
    assert table.min() == 20
    assert table.max() == 40


def test_unknown_names_options_and_undefined_values_are_refused():
    with pytest.raises(InvalidArgument, match="unknown function 'erf'"):
        tables.unary_table("erf", {}, IN_UINT8, OUT)
    with pytest.raises(InvalidArgument, match="relu takes"):
        tables.unary_table("relu", {"alpha": 1}, IN_UINT8, OUT)
    with pytest.raises(Unsupported, match="not defined everywhere"):
        tables.function_table(torch.sqrt, IN_UINT8, OUT)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_table_lies_where_its_output_grid_does(device):
    """As a model on a GPU needs it; the device without memory stands for that."""
    output = SimpleNamespace(item=OUT.item, qmin=0, qmax=255, dtype=torch.uint8, scale=torch.empty(1, device=device))
    assert tables.requantize_table(IN_UINT8, output).device.type == device
