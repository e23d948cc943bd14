"""A plan gives the bits of the modules: any shape, several threads, saved and loaded; and refuses everything else."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import NETWORKS, Residual, converted, leaves, network, tensors

import qkernels
from qkernels.core.qspec import QSpec
from qkernels.core.recipe import Match, Override, TensorRecipe, make_recipe
from qkernels.errors import CheckpointError, InvalidArgument, InvalidType, Unsupported
from qkernels.testing import isa_cap


def assert_same_bits(plan, model, inputs):
    expected, got = leaves(model(*inputs)), leaves(plan(*inputs))
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert (g.dtype, g.shape) == (e.dtype, e.shape)
        assert torch.equal(g, e)


def made(name):
    """(plan, converted model, example, inputs of other sizes)"""
    model, shapes, others = network(name)
    example = tensors(shapes)
    int8 = converted(model, *example)
    return qkernels.compile(int8, tuple(example)), int8, example, tensors(others, seed=1)


@pytest.fixture(scope="module")
def resnet():
    return made("resnet")


@pytest.mark.parametrize("name", NETWORKS)
def test_plan_gives_the_bits_of_the_modules_at_every_size(name, tmp_path):
    plan, model, example, others = made(name)
    assert isinstance(plan, qkernels.Plan)
    assert plan.islands == {}
    for inputs in (example, others, example):
        assert_same_bits(plan, model, inputs)
    plan.save(tmp_path / "plan")
    assert_same_bits(qkernels.load_plan(tmp_path / "plan"), model, others)


def test_every_instruction_set_gives_the_same_bits(resnet, isa):
    plan, model, example, others = resnet
    assert_same_bits(plan, model, example)
    assert plan.describe(*others)["isa"] == isa


def test_plan_follows_a_change_of_the_instruction_set(resnet):
    plan, model, example, _ = resnet
    before = plan(*example)
    with isa_cap("avx2"):
        assert torch.equal(plan(*example), before)
        assert torch.equal(model(*example), before)
    assert torch.equal(plan(*example), before)


def test_what_is_known_of_outputs_goes_with_the_packed_weights(resnet):
    plan, _, example, _ = resnet
    plan(*example)
    before = plan._native.packed
    assert before.specs
    with isa_cap("avx2" if before.plan.isa != "avx2" else "scalar"):
        plan.describe(*example)
        assert plan._native.packed is not before
        assert plan._native.packed.specs == {}


class MixedSigns(nn.Module):
    """Of int8 and uint8 operands the one that has to be copied lies otherwise."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        other = b.flatten(2).transpose(1, 2).reshape(b.shape)
        return self.out(a + other), self.out(other * a)


@pytest.mark.parametrize("signed", ["a", "b", "add", "mul"])
def test_operands_of_both_signs_may_lie_in_any_way(signed):
    int8 = TensorRecipe(QSpec.activation(8, torch.int8), "minmax")
    override = Override(Match("name", signed), activation=int8)
    recipe = dataclasses.replace(make_recipe("int8-minmax"), overrides=(override,))
    (x,) = tensors([(2, 3, 6, 6)])
    model = converted(MixedSigns(), x, recipe=recipe)
    plan = qkernels.compile(model, x[..., :1, :1])  # where there is one way only
    assert_same_bits(plan, model, [x])


def test_layout_of_the_input_does_not_matter(resnet):
    plan, _, (x,), _ = resnet
    expected = plan(x)
    wide = torch.zeros(2, 3, 24, 48)
    wide[..., ::2] = x
    for same in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., ::2],
    ):
        assert torch.equal(plan(same), expected)


def test_many_threads_may_call_one_plan(resnet):
    plan, model, _, _ = resnet
    inputs = [tensors([(1 + i % 3, 3, 24 + i, 20)], seed=i)[0] for i in range(8)]
    expected = [model(x) for x in inputs]
    wrong = []

    def work(start):
        for i in range(40):
            k = (start + i) % len(inputs)
            if not torch.equal(plan(inputs[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
def test_plan_works_in_a_forked_process(threads):
    code = """
import os, sys, torch
torch.set_num_threads(int(sys.argv[2]))
torch.ones(1 << 20).add_(1)  # with two threads there is a pool now, which the child will not have
sys.path.insert(0, sys.argv[1])
from test_plan import made
plan, model, example, _ = made("resnet")
images = torch.randn(16, 3, 64, 64)
expected = model(images)
plan(*example)
child = os.fork()
if child == 0:
    os._exit(0 if plan(images).tolist() == expected.tolist() else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(plan(images), expected)
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_copies_and_pickles_are_plans_of_their_own(resnet):
    plan, model, example, _ = resnet
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), nn.Sequential(plan)):
        assert_same_bits(twin, model, example)


def test_arguments_may_be_named():
    plan, model, (left, right), _ = made("two_inputs")
    assert torch.equal(plan(left, right=right)["scores"], model(left, right)["scores"])
    assert torch.equal(plan(right=right, left=left)["scores"], model(left, right)["scores"])
    assert plan(left, right)["rest"][1][1] is None
    with pytest.raises(InvalidArgument, match=r"the arguments are \(left, right\).*missing: \['right'\]"):
        plan(left=left)
    with pytest.raises(InvalidArgument, match=r"not expected: \['middle'\]"):
        plan(left, right, middle=left)


def test_plan_of_a_loaded_model_is_the_same(resnet, tmp_path):
    plan, model, example, _ = resnet
    qkernels.save(model, tmp_path / "model.qk")
    again = qkernels.compile(qkernels.load(tmp_path / "model.qk"), tuple(example))
    assert torch.equal(again(*example), plan(*example))


def test_a_call_without_memory_leaves_the_plan_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = qkernels.prepare(model, x)
    with qkernels.calibrating(prepared):
        prepared(x)
    plan = qkernels.compile(qkernels.convert(prepared), x)
    expected = plan(x)
    with pytest.raises(MemoryError, match="no memory for an arena of"):
        plan(torch.zeros(1, 3, 1, 1).expand(1, 3, 2**18, 2**18))
    assert torch.equal(plan(x), expected)


def test_empty_batch_gives_an_empty_result(resnet):
    plan, model, (x,), _ = resnet
    assert plan(x[:0]).shape == model(x[:0]).shape == (0, 10)


# ---- descriptions


def test_print_shows_steps_shapes_kernels_and_arena(resnet):
    text = str(resnet[0])
    assert "body.2.layers.0" in text
    assert "float32 [2, 3, 24, 24]" in text
    assert "arena" in text
    assert "igemm" in text


def test_profile_lists_every_step_and_is_drawn(resnet, tmp_path):
    pytest.importorskip("matplotlib")
    plan, _, example, _ = resnet
    profile = plan.profile(*example, runs=3)
    described = plan.describe(*example)["steps"]
    assert [step.name for step in profile.steps] == [step["name"] for step in described]
    assert all(step.microseconds >= 0 for step in profile.steps)
    conv = next(step for step in profile.steps if step.name == "body.2.layers.0.0")
    assert conv.macs == 2 * 16 * 16 * 9 * 6 * 6
    assert profile.peak_gmacs > 0
    assert "GMAC/s" in str(profile)
    for name in ("profile.html", "profile.png"):
        profile.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert "body.2.layers.0.0" in (tmp_path / "profile.html").read_text()
    with pytest.raises(InvalidArgument, match="must end in"):
        profile.save(tmp_path / "profile")
    with pytest.raises(InvalidArgument, match="runs must be"):
        plan.profile(*example, runs=0)


# ---- what is refused


def test_wrong_inputs_are_refused_by_name(resnet):
    plan, _, (x,), _ = resnet
    cases = [
        ((x.double(),), InvalidType, r"x must be torch.float32.*got torch.float64"),
        ((x.half(),), InvalidType, r"got torch.float16"),
        (([1.0],), InvalidType, r"x must be a tensor, got list"),
        ((x.to_sparse(),), InvalidType, r"x must be a dense tensor"),
        ((x[0],), InvalidArgument, r"x must be \[any, 3, any, any\], got \[3, 24, 24\]"),
        ((x[:, :2],), InvalidArgument, r"x must be \[any, 3, any, any\], got \[2, 2, 24, 24\]"),
        ((x.to("meta"),), InvalidArgument, r"x must be on the CPU, got meta"),
        ((), InvalidArgument, r"expected 1 inputs, got 0"),
        ((x, x), InvalidArgument, r"expected 1 inputs, got 2"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            plan(*arguments)
    assert plan(x).shape == (2, 10)


def test_image_smaller_than_the_kernels_is_refused_with_the_layer():
    plan, model, _, _ = made("conv1d")
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match="kernel"):
        model(x)
    with pytest.raises(InvalidArgument, match="3"):
        plan(x)


def test_what_is_not_converted_is_refused():
    with pytest.raises(InvalidArgument, match="compile: Linear has no integer layer: it must come from"):
        qkernels.compile(nn.Linear(2, 2), torch.randn(1, 2))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x):
        return self.body(x if x.sum() > 0 else -x)


def test_untraceable_model_is_refused_with_the_parts_that_can_be_compiled():
    x = torch.randn(1, 3, 12, 12)
    with pytest.raises(Unsupported, match=r"compile: Branching has no static graph.*(body|one by one)"):
        qkernels.compile(converted(Branching(), x), x)


@pytest.fixture(scope="module")
def saved(resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "net.plan"
    resnet[0].save(path)
    return path


def test_damaged_files_are_refused(saved, tmp_path):
    good = saved.read_bytes()
    positions = [*range(0, 192, 7), *range(192, len(good), max(1, len(good) // 60))]
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 0x21
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(CheckpointError, match="bad"):
            qkernels.load_plan(tmp_path / "bad")
    for length in (0, 1, 8, 100, 191, 192, len(good) // 2, len(good) - 1):
        (tmp_path / "short").write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="short"):
            qkernels.load_plan(tmp_path / "short")


def test_other_version_is_refused_with_its_number(saved, tmp_path):
    from qkernels.ops.plan import plan_checksum

    newer = bytearray(saved.read_bytes())
    newer[8:12] = (2).to_bytes(4, "little")
    newer[24:32] = plan_checksum(bytes(newer), 24).to_bytes(8, "little")
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(CheckpointError, match="version 2"):
        qkernels.load_plan(tmp_path / "newer")


def test_malformed_metadata_are_refused(saved, tmp_path):
    from qkernels.ops.plan import plan_checksum

    good = saved.read_bytes()
    for found, other in ((b'"inputs"', b'"imputs"'), (b'{"value": 0}', b'{"valve": 0}'), (b'["x"]', b'["x" ')):
        assert good.count(found) == 1
        bad = bytearray(good.replace(found, other))
        bad[24:32] = plan_checksum(bytes(bad), 24).to_bytes(8, "little")
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"bad.*metadata"):
            qkernels.load_plan(tmp_path / "bad")


def test_save_replaces_a_file_whole(resnet, tmp_path):
    path = tmp_path / "net.plan"
    path.write_text("old")
    resnet[0].save(path)
    assert os.listdir(tmp_path) == ["net.plan"]
    with pytest.raises(FileNotFoundError):
        resnet[0].save(tmp_path / "nowhere" / "net.plan")


# ---- float islands


class Island(nn.Module):
    """A softmax over positions between two convolutions; sizes and sequences cross the borders."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.block = Residual(8, 8)
        self.register_buffer("offset", torch.tensor([1, 2, 3]))

    def forward(self, x):
        y = F.relu(self.first(x))
        batch, channels = y.shape[:2]
        weights = torch.softmax(y.flatten(2), -1).reshape(batch, channels, x.shape[2], x.shape[3])
        top, where = torch.max(weights.flatten(1), 1)
        return self.last(self.block(weights)), [top, where + self.offset.sum()], weights.shape[1]


def test_float_islands_run_in_torch_and_are_listed(tmp_path):
    example = tensors([(2, 3, 8, 8)])
    model = converted(Island(), *example)
    with pytest.warns(UserWarning, match=r"torch runs \d+ operations .*softmax"):
        plan = qkernels.compile(model, tuple(example))
    assert set(plan.islands) >= {"softmax", "max_1"}
    assert "has no step" in plan.islands["softmax"]
    assert any(isinstance(part, qkernels.Plan) for part in plan.parts)
    assert "softmax" in str(plan)
    for inputs in (example, tensors([(1, 3, 11, 6)], seed=1)):
        expected, got = model(*inputs), plan(*inputs)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(g, e) for g, e in zip(got[1], expected[1], strict=True))
        assert got[2] == expected[2] == 8
    assert torch.equal(copy.deepcopy(plan)(*example)[0], model(*example)[0])
    with pytest.raises(Unsupported, match=r"plan.save.*softmax"):
        plan.save(tmp_path / "plan")
    profile, facts = plan.profile(*example, runs=2), plan.describe(*example)
    assert [(s.name, s.kind, s.inputs, s.output) for s in profile.steps] == [
        (s["name"], s["kind"], tuple(s["inputs"]), s["output"]) for s in facts["steps"]
    ]
    islands = [s for s in profile.steps if s.kind == "torch"]
    assert any("softmax" in s.name for s in islands)
    assert all(s.microseconds > 0 and s.bytes > 0 for s in islands)
    assert {"conv", "torch"} <= {s.kind for s in profile.steps}
    assert profile.arena_bytes == facts["arena_bytes"] > 0
    assert "softmax" in str(profile)
    profile.save(tmp_path / "profile.html")
    assert "softmax" in (tmp_path / "profile.html").read_text()
    with pytest.raises(InvalidArgument, match="runs must be"):
        plan.profile(*example, runs=0)
    with pytest.raises(InvalidArgument, match="missing"):
        plan.describe()


class Embedded(nn.Module):
    """Integers that no step takes, and sizes times a float."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.out = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.out(torch.relu(self.linear(self.table(tokens))))
        return torch.reshape(x, shape=(x.shape[0], -1)) * (x.shape[1] * 0.5)


@pytest.mark.filterwarnings("ignore:compile")
def test_arguments_without_a_step_go_to_torch():
    tokens = torch.arange(8).reshape(2, 4)
    model = converted(Embedded(), tokens)
    plan = qkernels.compile(model, tokens)
    assert "table" in plan.islands
    for given in (tokens, tokens[:1, :3]):
        assert torch.equal(plan(given), model(given))


@pytest.mark.filterwarnings("ignore:compile")
def test_activation_after_a_float_output_is_an_island():
    example = tensors([(2, 3, 8, 8)])
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1)), *example)
    plan = qkernels.compile(model, tuple(example))
    assert list(plan.islands) == ["_1"]
    assert torch.equal(plan(*example), model(*example))
