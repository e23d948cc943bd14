"""quantize_dynamic: linear layers without calibration, in models that have no graph too."""

import copy

import pytest
import torch
from torch import nn

import qkernels
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends import torch_ao
from qkernels.nn.dynamic import QDynamicLinear


class Branching(nn.Module):
    """Without a graph: what runs depends on the data."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        states, _ = self.recurrent(x)
        return self.head(states[:, -1] if x.sum() > 0 else states[:, 0])


def model_and_input() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Branching().eval(), torch.randn(64, 5, 8)


def dynamic_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, QDynamicLinear)]


@torch.no_grad()
def error_db(model: nn.Module, expected: torch.Tensor, x: torch.Tensor) -> float:
    return float(10 * torch.log10((model(x) - expected).square().mean() / expected.square().mean()))


def test_all_linear_layers_run_on_codes_and_are_at_least_as_exact_as_those_of_torch():
    model, x = model_and_input()
    expected = model(x).detach()
    ours = torch_ao.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert dynamic_paths(ours) == ["head.0", "head.2"]
    torchs = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert error_db(ours, expected, x) < error_db(torchs, expected, x)
    assert dynamic_paths(model) == []
    assert torch.equal(torch_ao.quantize_dynamic(model)(x), ours(x))


def test_rows_do_not_depend_on_each_other():
    layer = torch_ao.quantize_dynamic(model_and_input()[0].head)
    rows = torch.randn(9, 16) * torch.logspace(-3, 3, 9).unsqueeze(1)
    assert torch.equal(layer(rows), torch.cat([layer(row.unsqueeze(0)) for row in rows]))


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        (["head.2"], ["head.2"]),
        (["head"], ["head.0", "head.2"]),
        ({nn.Linear: torch_ao.default_qconfig, "head.0": None}, ["head.2"]),
        ({"head": torch_ao.default_qconfig, "head.2": None}, ["head.0"]),
        ([], []),
    ],
)
def test_layers_are_named_by_class_and_path(spec, paths):
    assert dynamic_paths(torch_ao.quantize_dynamic(model_and_input()[0], spec)) == paths


def test_attention_is_taken_apart():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 7, 32)
    dynamic = torch_ao.quantize_dynamic(encoder)
    assert len(dynamic_paths(dynamic)) == 12
    with torch.no_grad():
        assert error_db(dynamic, encoder(x), x) < -35


def test_in_place_shared_saved_and_copied(tmp_path):
    model, x = model_and_input()
    model.head[2] = model.head[0] = nn.Linear(16, 16)
    changed = torch_ao.quantize_dynamic(model, inplace=True)
    assert changed is model
    assert changed.head[0] is changed.head[2]
    assert torch.equal(copy.deepcopy(changed)(x), changed(x))
    fresh = torch_ao.quantize_dynamic(model_and_input()[0])
    qkernels.save(fresh, tmp_path / "model.qk")
    assert torch.equal(qkernels.load(tmp_path / "model.qk", skeleton=model_and_input()[0])(x), fresh(x))


def test_what_has_no_dynamic_form_is_refused_by_name():
    model, _ = model_and_input()
    with pytest.raises(Unsupported, match="LSTM has no form"):
        torch_ao.quantize_dynamic(model, {nn.LSTM, nn.Linear})
    with pytest.raises(Unsupported, match="float16"):
        torch_ao.quantize_dynamic(model, dtype=torch.float16)
    with pytest.raises(InvalidArgument, match=r"no module 'haed.0'; did you mean 'head.0'"):
        torch_ao.quantize_dynamic(model, ["haed.0"])
