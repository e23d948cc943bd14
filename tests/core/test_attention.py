"""Transformers: torch's attention modules take part in quantization, and compute what they did."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.attention import open_attention
from qkernels.errors import Unsupported

N, L, S, E, H = 3, 5, 7, 16, 4


def opened(module: nn.Module) -> nn.Module:
    return open_attention(copy.deepcopy(module))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- the forms compute what torch's modules do --------------------------------------------------------------------


FLOAT_MASK = torch.triu(torch.full((L, S), -math.inf), diagonal=3)
BOOL_MASK = torch.rand(L, S, generator=torch.Generator().manual_seed(1)) < 0.3
BOOL_MASK[:, 0] = False
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [1]])
CALLS = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of every head": {"average_attn_weights": False},
    "additive mask": {"attn_mask": FLOAT_MASK, "need_weights": False},
    "finite additive mask": {"attn_mask": torch.randn(L, S)},
    "boolean mask": {"attn_mask": BOOL_MASK},
    "mask of every head": {"attn_mask": BOOL_MASK.expand(N * H, L, S)},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "additive padding": {"key_padding_mask": torch.zeros(N, S).masked_fill(PADDING, -math.inf)},
    "both masks": {"attn_mask": BOOL_MASK, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_attention_computes_what_torch_does(call, batch_first):
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first).eval()
    nn.init.normal_(layer.in_proj_bias)
    query, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    close(opened(layer)(query, memory, memory, **CALLS[call]), layer(query, memory, memory, **CALLS[call]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_takes_a_single_sequence(batch_first):
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first).eval()
    query, memory = torch.randn(L, E), torch.randn(S, E)
    close(opened(layer)(query, memory, memory), layer(query, memory, memory))


@pytest.mark.parametrize("options", [{"kdim": 6, "vdim": 9}, {"bias": False}])
def test_attention_takes_other_widths_and_no_bias(options):
    layer = nn.MultiheadAttention(E, H, batch_first=True, **options).eval()
    key, value = torch.randn(N, S, layer.kdim), torch.randn(N, S, layer.vdim)
    query = torch.randn(N, L, E)
    close(opened(layer)(query, key, value), layer(query, key, value))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_with_extra_keys_stays_as_it_is(options):
    assert type(opened(nn.MultiheadAttention(E, H, **options))) is nn.MultiheadAttention


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", nn.SiLU()])
def test_transformer_computes_what_torch_does(norm_first, activation):
    model = nn.Transformer(E, H, 2, 2, 32, activation=activation, norm_first=norm_first, batch_first=True).eval()
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.zeros(N, S).masked_fill(PADDING, -math.inf)  # additive as the other mask, which torch asks for
    masks = {"tgt_mask": causal, "memory_key_padding_mask": padding}
    close(opened(model)(source, target, **masks), model(source, target, **masks))


def test_shared_attention_stays_shared():
    layer = nn.MultiheadAttention(E, H)
    model = opened(nn.ModuleList([nn.ModuleDict({"a": layer}), nn.ModuleDict({"b": layer})]))
    assert model[0]["a"] is model[1]["b"] is not layer


# --- and take part in quantization ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 32, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, 5)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


def test_every_linear_layer_of_an_encoder_becomes_integer(tmp_path):
    model, batches = Classifier(0.1).eval(), [torch.randn(N, L, E) for _ in range(4)]
    prepared = qkernels.prepare(model, batches[0])
    qkernels.calibrate(prepared, batches)
    converted = qkernels.convert(prepared)
    kinds = [type(m).__name__ for m in converted.modules()]
    assert kinds.count("QLinear") == 2 * (3 + 1 + 2) + 1
    assert "Linear" not in kinds
    assert qkernels.verify(prepared, converted, batches).total_mismatches == 0
    assert qkernels.compare(model, converted, batches).output_sqnr_db > 20

    qkernels.save(converted, tmp_path / "model.qk")
    expected = converted(batches[0])
    assert torch.equal(qkernels.load(tmp_path / "model.qk")(batches[0]), expected)
    with pytest.warns(UserWarning, match="torch runs"):
        plan = qkernels.compile(converted, batches[0])
    assert torch.equal(plan(batches[0]), expected)
    assert torch.equal(plan(batches[1][:1]), converted(batches[1][:1]))


def test_padding_mask_is_an_argument_of_the_converted_model():
    model, x, padding = Classifier().eval(), torch.randn(N, S, E), PADDING
    prepared = qkernels.prepare(model, (x, padding))
    with qkernels.calibrating(prepared):
        prepared(x, padding)
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [(x, padding)]).total_mismatches == 0
    with torch.enable_grad():  # without gradients torch zeroes what is padded
        torch.testing.assert_close(converted(x, padding), model(x, padding), rtol=0, atol=0.1)


def test_attention_can_be_skipped_by_its_type():
    prepared = qkernels.prepare(Classifier().eval(), torch.randn(N, L, E), skip=[nn.MultiheadAttention])
    with qkernels.calibrating(prepared):
        prepared(torch.randn(N, L, E))
    converted = qkernels.convert(prepared)
    linear = [name for name, m in converted.named_modules() if type(m) is nn.Linear]
    assert len(linear) == 8
    assert all(".self_attn." in name for name in linear)


def test_attention_trains():
    prepared = qkernels.prepare_qat(Classifier(0.1), torch.randn(N, L, E))
    x = torch.randn(8, L, E)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(x), torch.arange(8) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0


def test_a_part_whose_owner_reads_its_weight_is_refused_by_name():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(E, E)

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.inner(x) + self.inner.weight.sum()

    with pytest.raises(Unsupported, match=re.escape("Owner cannot be prepared part by part")):
        qkernels.prepare(Owner().eval(), torch.randn(2, E))
