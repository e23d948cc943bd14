"""Parts of a model that are not float32: they stay as they are, on disk too."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import qkernels


class Mixed(nn.Module):
    """float32, then a part in another dtype."""

    def __init__(self, dtype, with_graph=True):
        super().__init__()
        self.first, self.with_graph = nn.Conv2d(3, 4, 1), with_graph
        self.norm, self.last = nn.BatchNorm2d(4).to(dtype), nn.Conv2d(4, 4, 1).to(dtype)
        self.register_buffer("offset", torch.ones(1, dtype=dtype))

    def forward(self, x):
        y = self.first(x)
        y = y if self.with_graph or y.sum() < 1e9 else -y
        return self.last(self.norm(y.to(self.offset.dtype))) + self.offset


@pytest.mark.parametrize("prepare", [qkernels.prepare, qkernels.prepare_qat])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_norm_that_is_not_float32_stays(prepare, dtype):
    model, x = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).to(dtype).eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="the whole model stays float"):
        assert not prepare(model, x.to(dtype)).report.integer
    model = Mixed(dtype).eval()
    prepared = prepare(model, x)
    assert [row.name for row in prepared.report.integer] == ["first"]
    assert any("not float32" in row.reason or "float32 tensors" in row.reason for row in prepared.report)


@pytest.mark.parametrize("with_graph", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loaded_model_has_the_dtypes_of_the_saved_one(dtype, with_graph, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = Mixed(dtype, with_graph).eval()
    converted = qkernels.convert(qkernels.calibrate(qkernels.prepare(model, x), [x]))
    qkernels.save(converted, tmp_path / "model")
    skeleton = None if with_graph else Mixed(torch.float32, with_graph)
    loaded = qkernels.load(tmp_path / "model", skeleton)
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in converted.state_dict().items()
    }
    assert torch.equal(loaded(x), converted(x))


def test_a_model_with_weight_normalization_is_pickled():
    x = torch.randn(4, 8)
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    state = copy.deepcopy(model.state_dict())
    prepared = qkernels.calibrate(qkernels.prepare(model, x), [x])
    for each in (prepared, qkernels.convert(prepared)):
        file = io.BytesIO()
        torch.save(each, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), each(x))
    model.load_state_dict(state)  # the model itself keeps its hook
    assert model[0]._load_state_dict_pre_hooks
