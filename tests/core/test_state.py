"""Saved models: what comes back is what was saved, and a damaged file never comes back at all."""

import json
import operator
import os
import pickle
import random
import stat
import threading

import pytest
import torch
from torch import fx, nn

from qkernels.core.qspec import QParams
from qkernels.core.state import load, save
from qkernels.errors import CheckpointError, InvalidArgument, Unsupported
from qkernels.nn import QConv, QLayer, QLinear, QLookup

GRID = QParams.per_tensor(0.05, 120)


class LayerTracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, QLayer) or super().is_leaf_module(module, name)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = QLookup(GRID, GRID, "leaky_relu", {"negative_slope": 0.2})
        self.inner = nn.Sequential(QLookup(GRID, GRID, "relu"), nn.Flatten(1))
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv1d(1, 2, 3, padding=1, bias=False)
        self.shift = nn.Parameter(torch.randn(12))

    def forward(self, q):
        q = self.inner(self.act(q))
        x = self.norm(q.float()) * self.shift
        x = self.conv(x.unsqueeze(1)).permute(0, 2, 1)
        return {"x": x[..., 0:1], "pair": (torch.flatten(x, start_dim=1), x.clamp(min=-float("inf")))}


def traced(model):
    return fx.GraphModule(model, LayerTracer().trace(model)).eval()


@pytest.fixture
def model():
    torch.manual_seed(3)
    return traced(Block())


def lookups_as_reference(monkeypatch_model):
    """Runs integer layers by their plain-torch definition, so that these tests need no kernel."""
    for module in monkeypatch_model.modules():
        if isinstance(module, QLookup):
            module.forward = lambda x, m=module: m.table[x.long()]
    return monkeypatch_model


def same(a, b):
    a, b = (torch.utils._pytree.tree_leaves(v) for v in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loaded_graph_computes_the_same(model, tmp_path):
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    q = torch.randint(0, 256, (5, 3, 4), dtype=torch.uint8)
    assert same(lookups_as_reference(model)(q), lookups_as_reference(again)(q))
    assert again.act.options == {"function": "leaky_relu", "negative_slope": 0.2}
    assert again.act.out_qparams == GRID
    assert again.act.name == "act"


def test_saving_a_loaded_model_describes_the_same_model(model, tmp_path):
    save(model, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    first, second = (json.loads(header(tmp_path / n)["__metadata__"]["content"]) for n in "ab")
    assert first == second


def header(path):
    blob = path.read_bytes()
    return json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])


def test_any_safetensors_reader_lists_the_tensors(model, tmp_path):
    from safetensors.torch import load_file

    save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    assert tensors.keys() == model.state_dict().keys()
    assert torch.equal(tensors["act.table"], model.act.table)


def test_weighted_layers_come_back_with_their_codes(tmp_path):
    torch.manual_seed(0)
    per_channel = QParams(torch.rand(6) + 0.1, torch.zeros(6), 0, -127, 127, torch.int8)
    weight = torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8)
    options = {"stride": [1, 1], "padding": [[1, 1], [1, 1]], "dilation": [1, 1], "groups": 1}
    options |= {"transposed": False, "output_padding": [0, 0], "padding_mode": "zeros"}
    conv = QConv(GRID, weight, per_channel, torch.randn(6), GRID, options=options)
    linear = QLinear(GRID, weight.reshape(6, 36), per_channel, None, None)
    model = nn.Sequential(conv, linear)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert type(again[0]) is QConv
    assert type(again[1]) is QLinear
    assert again[0].get_config() == conv.get_config()
    assert again[1].bias is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert again.state_dict()[name].dtype == tensor.dtype


@pytest.fixture
def blob(tmp_path):
    model = traced(nn.Sequential(QLookup(GRID, GRID, "relu"), nn.Flatten(1)))
    save(model, tmp_path / "m")
    return bytearray((tmp_path / "m").read_bytes())


def refused(blob, path):
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match="load: "):
        load(path)


def test_every_truncation_is_refused(blob, tmp_path):
    for length in [*range(0, 64), *range(64, len(blob), 7), len(blob) - 1]:
        refused(blob[:length], tmp_path / "cut")


def test_every_flipped_bit_is_refused(blob, tmp_path):
    chooser = random.Random(0)
    bits = [*range(0, 512), *(chooser.randrange(8 * len(blob)) for _ in range(2000))]
    for bit in bits:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(damaged, tmp_path / "flipped")


def test_appended_bytes_and_other_files_are_refused(blob, tmp_path):
    refused(blob + b"\0", tmp_path / "longer")
    refused(os.urandom(4096), tmp_path / "noise")
    refused(pickle.dumps({"a": 1}), tmp_path / "pickle")
    refused(b"", tmp_path / "empty")


def test_a_damaged_tensor_is_named(blob, tmp_path):
    blob[-1] ^= 1
    (tmp_path / "m").write_bytes(blob)
    with pytest.raises(CheckpointError, match=r"tensor '0\.\w+' fails its checksum"):
        load(tmp_path / "m")


def rewritten(blob, change):
    """The file with its description changed and the digests made right again: what a forger would write."""
    import hashlib

    import safetensors.torch

    tensors = safetensors.torch.load(bytes(blob))
    metadata = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    content = json.loads(metadata["content"])
    change(content, metadata)
    metadata |= {"content": json.dumps(content), "sha256": "0" * 64}
    new = bytearray(safetensors.torch.save(tensors, metadata))
    at = new.find(b'"sha256":"') + len('"sha256":"')
    new[at : at + 64] = hashlib.sha256(new).hexdigest().encode()
    return new


def change_version(content, metadata):
    metadata["qkernels"] = "99"


def call_system(content, metadata):
    content["model"]["graph"][1] |= {"op": "call_function", "target": "os.system"}


def call_format(content, metadata):
    content["model"]["graph"][1] |= {"op": "call_method", "target": "__reduce__"}


def read_class(content, metadata):
    content["model"]["graph"][1] |= {"op": "call_function", "target": "builtins.getattr"}
    content["model"]["graph"][1]["args"].append("__class__")


def unknown_module(content, metadata):
    content["model"]["modules"]["1"] = {"nn": "Module", "arguments": {}}


def unknown_layer(content, metadata):
    content["model"]["modules"]["0"]["layer"]["kind"] = "nonsense"


def missing_key(content, metadata):
    del content["model"]["modules"]["0"]["layer"]["grids"]


def lost_layer(content, metadata):
    content["model"]["modules"]["0"] = {"nn": "Identity", "arguments": {}}


@pytest.mark.parametrize(
    "change",
    [
        change_version,
        call_system,
        call_format,
        read_class,
        unknown_module,
        unknown_layer,
        missing_key,
        lost_layer,
    ],
)
def test_a_wrong_description_with_right_digests_is_refused(blob, tmp_path, change):
    refused(rewritten(blob, change), tmp_path / "forged")


def test_the_old_file_survives_a_failed_save(model, tmp_path, monkeypatch):
    save(model, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(model, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_the_file_has_the_usual_permissions(model, tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    save(model, tmp_path / "m")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("m", "plain")]
    assert modes[0] == modes[1]


def test_threads_saving_to_one_path_leave_a_whole_file(model, tmp_path):
    threads = [threading.Thread(target=save, args=(model, tmp_path / "m")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


def helper(x):
    return x + 1


def test_a_function_that_json_cannot_name_is_refused_with_its_name(tmp_path):
    graph = fx.Graph()
    graph.output(graph.call_function(helper, (graph.placeholder("x"),)))
    with pytest.raises(Unsupported, match="helper"):
        save(fx.GraphModule(nn.Module(), graph), tmp_path / "m")
    assert os.listdir(tmp_path) == []


class Untraceable(nn.Module):
    """Control flow that depends on the data: only its leaves can be converted."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        return self.act(self.blocks[int(x.sum() > 0)](x))


def test_a_model_with_python_code_of_its_own_needs_a_skeleton(tmp_path):
    model = Untraceable().eval()
    model.act = nn.Sequential(nn.Identity(), nn.ReLU6())
    save(model, tmp_path / "m")
    with pytest.raises(InvalidArgument, match=r"Untraceable.*skeleton=model"):
        load(tmp_path / "m")
    with pytest.raises(InvalidArgument, match="must be a Untraceable, got Linear"):
        load(tmp_path / "m", skeleton=nn.Linear(1, 1))
    float_model = Untraceable()
    again = load(tmp_path / "m", skeleton=float_model)
    x = torch.randn(4, 3) * 20
    assert torch.equal(again(x), model(x))
    assert isinstance(float_model.act, nn.ReLU)


def test_a_skeleton_inside_a_graph_is_refused_at_save(tmp_path):
    class Whole(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Untraceable)

    outer = nn.Sequential(Untraceable())
    with pytest.raises(Unsupported, match="'0' is a Untraceable"):
        save(fx.GraphModule(outer, Whole().trace(outer)), tmp_path / "m")


def test_operators_and_attributes_of_tensors_survive(tmp_path):
    class Shapes(nn.Module):
        def forward(self, x):
            n = x.shape[0]
            return operator.mul(x.reshape(n, -1), 2)[:, ::2].to(torch.float64)

    model = traced(Shapes())
    save(model, tmp_path / "m")
    x = torch.randn(3, 2, 4)
    assert torch.equal(load(tmp_path / "m")(x), model(x))
