"""The cases of `make gpu-check` are sound: they pass where the CPU stands in for the GPU, and notice what is wrong."""

import dataclasses
import itertools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qkernels import nn as qnn
from qkernels import ops

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def weighted():
    import weighted_cases

    return weighted_cases


@pytest.fixture
def device(monkeypatch):
    """With the CPU in the place of the GPU; one thread, as everything is small."""
    import cpu_device
    import device

    for name, value in cpu_device.OFFERS.items():
        monkeypatch.setattr(device, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield device
    torch.set_num_threads(threads)


# ---- every part ------------------------------------------------------------------------------------------------------

# The first case of a part and the distance to the next; tests/architecture runs opcheck on the samples themselves.
SHARE = {"linear": (0, 17), "wgmma": (1, 5), "opcheck": (88, 3)}  # wgmma's first case is about the kernel alone


@pytest.mark.parametrize(
    "part",
    [
        *("linear", "wgmma", "conv", "rows", "floats", "ops", "large", "model", "training", "graph", "streams"),
        *("opcheck", "bench"),
    ],
)
def test_its_cases_pass_where_the_gpu_is_the_cpu(device, monkeypatch, part):
    import bench_cases
    import cases

    monkeypatch.setattr(bench_cases, "WARM_UP", 0)
    monkeypatch.setattr(bench_cases, "BLOCKS", 1)
    if part == "wgmma":
        monkeypatch.setenv("QKERNELS_WGMMA", "0")  # so that it is put back
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    first, step = SHARE.get(part, (0, 1))
    names = []
    for name, run in itertools.islice(cases.cases_of(part, True), first, None, step):
        run()
        names.append(name)
    assert len(set(names)) == len(names)
    assert names


def test_errors_are_looked_for_where_they_are_made(device):
    import cases

    for name, run in cases.cases_of("errors", True):
        if name[0] in "356":  # the others are about two devices, and about the memory of one
            run()


def test_the_parts_of_the_program_are_those_of_the_table():
    import cases
    import gpu_check

    assert set(gpu_check.PARTS) - {"sanitizer"} == set(cases._PLACES)


# ---- linear and conv -------------------------------------------------------------------------------------------------


def test_its_linear_cases_run_on_the_cpu(weighted):
    dtypes, codes = set(), set()
    for case in itertools.islice(weighted.linear_cases(small=True), 0, None, 11):
        pack, epilogue, x, residual = case.arguments()
        out = ops.linear(x, ops.linear_pack(*pack, epilogue), case.n, case.dtype, residual)
        assert out.dtype == case.dtype, case.name
        dtypes.add(out.dtype)
        if out.dtype == torch.uint8:
            codes |= set(out.unique().tolist())
    assert len(dtypes) == 6
    assert len(codes) > 64  # not all clamped


def test_its_convolutions_run_on_the_cpu(weighted):
    for case in weighted.conv_cases(small=True):
        packed = ops.conv_pack(*case.pack, case.epilogue, **case.geometry)
        out = ops.conv(case.x, packed, case.residual, case.channels, case.size, case.epilogue.dtype)
        assert list(out.shape) == [2, case.channels, *case.size], case.name


@pytest.mark.parametrize("which", ["linear_cases", "wgmma_cases"])
def test_its_full_linear_cases_can_be_packed(weighted, which):
    """The sums fit whatever a case is on: one row of the weight shows it."""
    everything = list(getattr(weighted, which)(small=False))
    for case in everything:
        pack, epilogue, *_ = dataclasses.replace(case, m=1, n=1).arguments()
        ops.linear_pack(*pack, epilogue)
    assert len({case.name for case in everything}) == len(everything)


def test_its_full_convolutions_can_be_packed(weighted):
    names = []
    for case in weighted.conv_cases(small=False):
        ops.conv_pack(*case.pack, case.epilogue, **case.geometry)
        names.append(case.name)
    assert len(set(names)) == len(names)


def test_wgmma_meets_every_type_around_every_edge(weighted):
    everything = list(weighted.wgmma_cases(small=False))
    types = {(case.dtype, case.input_dtype) for case in everything}
    assert len(types) == 12
    for size in {(case.m, case.n, case.k) for case in everything}:
        assert {(c.dtype, c.input_dtype) for c in everything if (c.m, c.n, c.k) == size} == types
    for case in everything:  # what csrc/gemm/cuda.cu asks for
        assert (case.m >= 65, case.zero_points, case.lies) == (True, False, "aligned")


PLAN = """
#include <iostream>
#include "csrc/conv/cuda.h"
int main() {
  const qk::CudaMachine h100{90, 132, 227 << 10, 228 << 10};
  long m, n, k, groups, is_conv;
  while (std::cin >> m >> n >> k >> groups >> is_conv) {
    const auto tiles = is_conv ? qk::cuda::kConvCudaTiles : qk::kAllCudaTiles;
    const auto plan = qk::plan_cuda_gemm(m, n, qk::cuda_depth(k), groups, h100, tiles);
    std::cout << plan.tile << ' ' << plan.splits << '\\n';
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the plan with")
def test_its_cases_reach_every_tile(weighted, tmp_path):
    """On a GPU of 132 multiprocessors, by the plan itself."""
    source, root = tmp_path / "plan.cc", HERE.parents[1]
    source.write_text(PLAN)
    command = ["g++", "-std=c++20", f"-I{root / 'tests/simt'}", f"-I{root}", source, "-o", tmp_path / "plan"]
    subprocess.run(command, check=True)

    def tiles(layers: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        text = "\n".join(" ".join(map(str, layer)) for layer in layers)
        plan = subprocess.run([tmp_path / "plan"], input=text, capture_output=True, text=True, check=True).stdout
        return [tuple(map(int, line.split())) for line in plan.splitlines()]

    linear = tiles([(m, n, k, 1, 0) for m, n, k in weighted.TILED_LINEAR])
    assert {tile for tile, _ in linear} == {0, 1, 2, 3, 4}
    assert any(splits > 1 for _, splits in linear)
    layers = []
    for inner, outer, _, kernel, stride, padding, dilation, transposed, _, size in weighted.TILED_CONV:
        rows, columns = ops.conv_output_size(size, kernel, stride, padding, dilation, transposed)
        layers.append((2 * rows * columns, outer, kernel[0] * kernel[1] * inner, 1, 1))
    conv = tiles(layers)
    assert {tile for tile, _ in conv} == {1, 2, 3, 4}
    assert any(splits > 1 for _, splits in conv)


def test_an_input_keeps_its_rows_and_its_alignment(weighted, device, monkeypatch):
    linear, seen = ops.linear, []
    monkeypatch.setattr(
        ops, "linear", lambda x, *rest: seen.append((x.storage_offset(), x.stride())) or linear(x, *rest)
    )
    for lies, expected in [("aligned", (0, 112)), ("off by one", (1, 112)), ("dense", (0, 100)), ("apart", (2, 103))]:
        seen.clear()
        weighted.compare_linear(weighted.LinearCase(0, 17, 65, 100, torch.uint8, torch.uint8, False, lies))
        assert seen == [(expected[0], (expected[1], 1))] * 2


def test_the_convolution_of_several_streams_has_a_split_of_k(weighted):
    import stream_cases

    assert stream_cases.a_conv(small=False).name.startswith(f"conv {weighted.TILED_CONV[3]}")


# ---- operations ------------------------------------------------------------------------------------------------------


def test_every_cuda_op_is_in_its_list(monkeypatch):
    """What gpu-check compares is what the architecture test demands."""
    monkeypatch.syspath_prepend(str(HERE.parent / "architecture"))
    monkeypatch.syspath_prepend(str(HERE.parent / "ops"))
    import op_cases
    import test_op_table

    assert sorted(op_cases.CUDA_OPS) == sorted(test_op_table.CUDA_OPS)


def test_bits_that_differ_are_named(device):
    nan = math.nan
    device.equal(torch.tensor([1.0, nan]), torch.tensor([1.0, nan]))
    with pytest.raises(AssertionError, match=r"1 of 2 values differ, the first at \[1\]: 3.0 instead of 2.0"):
        device.equal(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError, match="tensor 1 of 2: 1 of 1 values differ"):
        device.all_equal([torch.ones(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)])


def test_nothing_of_lists_and_tuples_is_left_behind(device, monkeypatch):
    monkeypatch.setattr(device, "NAME", "meta")
    x = torch.ones(2)
    moved = device.on((x, [x, 3], None, ("zeros", [x])))
    assert [t.device.type for t in device.tensors(moved)] == ["meta"] * 3
    assert (moved[1][1], moved[2], moved[3][0]) == (3, None, "zeros")


# ---- models ----------------------------------------------------------------------------------------------------------


def test_its_networks_have_every_kind_of_layer(device):
    from gpu_networks import NETWORKS, batches, float_network
    from model_cases import calibrated

    layers = []
    for make, shape in NETWORKS.values():
        converted = calibrated(float_network(make), batches(shape))
        assert all(row.integer for row in converted.report)
        layers += [m for m in converted.modules() if isinstance(m, qnn.QLayer)]
    others = {"QEmbedding", "QDynamicLinear", "FakeQuantize", "QLayer"}
    assert {type(m).__name__ for m in layers} == set(qnn.__all__) - others
    options = [m.options for m in layers if isinstance(m, qnn.QConv)]
    assert {o["padding_mode"] for o in options} >= {"zeros", "reflect", "circular"}
    assert {(o["groups"] > 1, o["transposed"]) for o in options} == set(itertools.product((False, True), repeat=2))
    assert {len(o["stride"]) for o in options} == {1, 2, 3}


def test_the_first_layer_that_differs_is_named(device):
    import copy

    from gpu_networks import NETWORKS, batches, float_network
    from model_cases import calibrated, compare_layers

    make, shape = NETWORKS["squeeze-excitation"]
    inputs = batches(shape)
    here = calibrated(float_network(make), inputs)
    compare_layers(here, copy.deepcopy(here), inputs)
    there = copy.deepcopy(here)
    there.get_submodule("squeeze.1").bias.add_(1)
    with pytest.raises(AssertionError, match=r"batch 0, squeeze.1: \d+ of \d+ values differ"):
        compare_layers(here, there, inputs)


# ---- graphs and streams ----------------------------------------------------------------------------------------------


def test_a_replay_that_computes_something_else_is_noticed(device, monkeypatch):
    import graph_cases

    x, state = torch.zeros(3), torch.zeros(1)
    step = lambda: (state.add_(x.sum()), x * 2)[1]  # noqa: E731
    graph_cases.repeat(step, x.normal_, [state])
    capture = device.capture

    def nothing(step):
        return (lambda: None), capture(step)[1]

    def twice(step):
        replay, captured = capture(step)
        return (lambda: (replay(), replay())), captured

    def never_again(step):
        """Replays what the input was at the capture."""
        replay, captured = capture(step)
        then = x.clone()

        def stale():
            now = x.clone()
            x.copy_(then)
            replay()
            x.copy_(now)

        return stale, captured

    for wrong, where in ((nothing, 0), (twice, 1), (never_again, 0)):
        monkeypatch.setattr(device, "capture", wrong)
        with pytest.raises(AssertionError, match=f"tensor {where} of 2"):
            graph_cases.repeat(step, x.normal_, [state])


def test_a_training_step_without_its_update_is_noticed(device, monkeypatch):
    import graph_cases

    capture = device.capture

    def forgetful(step):
        replay, captured = capture(step)

        def replay_without_update():
            with monkeypatch.context() as inside:
                inside.setattr(torch.optim.SGD, "step", lambda self: None)
                replay()

        return replay_without_update, captured

    monkeypatch.setattr(device, "capture", forgetful)
    with pytest.raises(AssertionError, match="values differ"):
        graph_cases.training_step("ste", "SGD")


def test_every_op_that_runs_on_the_device_is_captured():
    import cases
    import op_cases
    from graph_cases import ON_THE_HOST

    names = " ".join(name for name, _ in cases.cases_of("graph", True))
    for op in set(op_cases.CUDA_OPS) - set(ON_THE_HOST):
        assert f"{op} " in names, op


def test_streams_that_disturb_one_another_are_noticed(device):
    import stream_cases

    calls = [0]

    def disturbed():
        calls[0] += 1
        return torch.full((2,), float(calls[0] == 7))

    with pytest.raises(AssertionError, match="streams disturb one another, turn 5, call 0"):
        stream_cases.on_several([disturbed])


# ---- times -----------------------------------------------------------------------------------------------------------


def test_a_target_is_data(device):
    from bench_cases import target

    assert target("speed", 1.6, least=1.5) == {
        "name": "speed", "measured": 1.6, "target": 1.5, "bound": "least", "reached": True
    }  # fmt: skip
    assert not target("speed", 1.4, least=1.5)["reached"]
    assert target("time", 1.1, most=1.15) == {
        "name": "time", "measured": 1.1, "target": 1.15, "bound": "most", "reached": True
    }  # fmt: skip
    assert not target("time", 1.2, most=1.15)["reached"]


def test_alternatives_take_turns(device, monkeypatch):
    import bench_cases

    monkeypatch.setattr(bench_cases, "WARM_UP", 1)
    monkeypatch.setattr(bench_cases, "BLOCKS", 3)
    order, clock = [], iter([100.0, 100.0, 1.0, 4.0, 3.0, 6.0, 2.0, 5.0])
    monkeypatch.setattr(device, "elapsed", lambda run: (run(), next(clock))[1])
    calls = {"a": [lambda: order.append("a")] * 2, "b": [lambda: order.append("b")]}
    assert bench_cases.times(calls, captured=False) == {"a": 1.0, "b": 5.0}
    assert order == ["a", "a", "b"] * 4
