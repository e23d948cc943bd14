"""Embeddings that are trained on a grid, and looked up as codes afterwards."""

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.prepare import quantizers
from qkernels.errors import InvalidType


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(30, 8, **options)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        return self.last(torch.relu(self.first(self.table(tokens).mean(1))))


def tokens(seed: int = 0, rows: int = 6) -> torch.Tensor:
    return torch.randint(0, 30, (rows, 5), generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, **options) -> tuple[nn.Module, list[float]]:
    qat = qkernels.prepare_qat(model, tokens(), **options)
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-2)
    losses = []
    for step in range(15):
        optimizer.zero_grad()
        loss = (qat(tokens(step)) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return qat, losses


@pytest.mark.parametrize("rule", ["ste", "lsq", "pact", "range"])
@pytest.mark.parametrize("options", [{}, {"weight_granularity": "per_tensor"}, {"weight_bits": 4}])
def test_it_trains_and_converts_without_a_mismatch(rule, options, tmp_path):
    torch.manual_seed(0)
    qat, losses = trained(Words(), rule=rule, **options)
    assert losses[-1] < losses[0]
    assert "table.weight" in {q.source for q in quantizers(qat)}
    converted = qkernels.convert(qat)
    assert type(converted.table) is qkernels.nn.QEmbedding
    assert converted.table.weight.dtype == torch.int8
    batches = [tokens(50), tokens(51, 1)]
    assert qkernels.verify(qat, converted, batches).total_mismatches == 0
    rounded = qat.eval().get_submodule("table")(tokens(50))
    assert torch.equal(converted.table(tokens(50)), rounded)
    qkernels.save(converted, tmp_path / "words.safetensors")
    assert torch.equal(qkernels.load(tmp_path / "words.safetensors")(tokens(50)), converted(tokens(50)))


def test_rows_that_were_not_looked_up_get_no_gradient():
    qat = qkernels.prepare_qat(Words(padding_idx=7), tokens())
    x = tokens(1)
    x[0, 0] = 7
    qat(x).sum().backward()
    used = qat.get_submodule("table").weight.grad.abs().sum(1) > 0
    assert set(used.nonzero().flatten().tolist()) == set(x.flatten().tolist()) - {7}


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_a_table_that_lookups_change_stays_float(options):
    qat = qkernels.prepare_qat(Words(**options), tokens())
    assert type(qat.get_submodule("table")) is nn.Embedding


def test_it_can_be_left_float_and_calibration_leaves_it_so():
    assert type(qkernels.prepare_qat(Words(), tokens(), skip=["table"]).get_submodule("table")) is nn.Embedding
    assert type(qkernels.prepare(Words(), tokens()).get_submodule("table")) is nn.Embedding


def test_empty_batches_and_other_index_types():
    qat, _ = trained(Words())
    table = qkernels.convert(qat).table
    assert table(torch.empty(0, 5, dtype=torch.int64)).shape == (0, 5, 8)
    assert torch.equal(table(tokens().int()), table(tokens()))
    with pytest.raises(InvalidType, match="indices"):
        table(tokens().float())
