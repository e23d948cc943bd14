"""Observers agree with torch.ao's where both exist, and refuse data that cannot give a grid."""

import pytest
import torch

from qkernels.core.observers import OBSERVERS, make_observer
from qkernels.core.qspec import QSpec, choose_qparams
from qkernels.errors import CalibrationError, InvalidArgument

ao = torch.ao.quantization
PER_CHANNEL = ("minmax", "moving_average", "mse")


def batches(kind: str, seed: int = 0, count: int = 4):
    g = torch.Generator().manual_seed(seed)
    for i in range(count):
        x = torch.randn(3, 7, 11, generator=g)
        yield {
            "normal": x,
            "relu": x.relu(),
            "heavy tail": x**5,
            "growing": x * (1 + i),
            "shifted": x * 0.1 + 3.0 + i,
            "constant": torch.full_like(x, 2.5),
            "tiny": x * 1e-3,
        }[kind]


KINDS = ["normal", "relu", "heavy tail", "growing", "shifted", "constant", "tiny"]


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("minmax", ao.MinMaxObserver),
        ("moving_average", ao.MovingAverageMinMaxObserver),
        ("histogram", ao.HistogramObserver),
    ],
)
def test_per_tensor_grids_equal_torch_ao(name, theirs, kind, symmetric):
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    reference = theirs(dtype=torch.quint8, qscheme=scheme)
    ours = make_observer(name, QSpec(symmetric=symmetric))
    for seed in range(3):
        for x in batches(kind, seed):
            reference(x)
            ours.observe(x)
    scale, zero_point = reference.calculate_qparams()
    assert torch.equal(ours.qparams().scale, scale)
    assert torch.equal(ours.qparams().zero_point, zero_point.to(torch.int32))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("minmax", ao.PerChannelMinMaxObserver), ("moving_average", ao.MovingAveragePerChannelMinMaxObserver)],
)
def test_per_channel_grids_equal_torch_ao(name, theirs, axis):
    reference = theirs(
        ch_axis=axis, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    spec = QSpec(torch.int8, -127, 127, symmetric=True, per_channel=True, axis=axis)
    ours = make_observer(name, spec, channels=(3, 7)[axis])
    for x in batches("growing"):
        reference(x)
        ours.observe(x)
    scale, zero_point = reference.calculate_qparams()
    assert torch.equal(ours.qparams().scale, scale)
    assert torch.equal(ours.qparams().zero_point, zero_point.to(torch.int32))


def squared_error(x, grid):
    return float((torch.fake_quantize_per_tensor_affine(x, *grid.item(), grid.qmin, grid.qmax) - x).square().sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy tail"])
def test_range_searches_do_not_lose_to_minmax(kind, bits):
    x = torch.cat([b.reshape(-1) for b in batches(kind, count=20)])
    errors = {}
    for name in ("minmax", "mse", "histogram"):
        watcher = make_observer(name, QSpec.activation(bits))
        watcher.observe(x)
        errors[name] = squared_error(x, watcher.qparams())
    assert errors["mse"] <= errors["minmax"] * 1.02
    if bits == 4:
        assert errors["mse"] < 0.9 * errors["minmax"] or kind == "relu"


def test_mse_per_channel_beats_minmax_on_four_bit_weights():
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(1)) ** 3
    spec = QSpec.weight(bits=4)
    errors = {}
    for name in ("minmax", "mse"):
        watcher = make_observer(name, spec, channels=6)
        watcher.observe(weight)
        grid = watcher.qparams()
        rounded = torch.fake_quantize_per_channel_affine(weight, grid.scale, grid.zero_point, 0, grid.qmin, grid.qmax)
        errors[name] = (rounded - weight).square().sum(1)
    assert bool((errors["mse"] < errors["minmax"]).all())


def test_percentile_leaves_out_the_tails():
    x = torch.linspace(-1.0, 1.0, 100_001)
    x[0], x[-1] = -50.0, 80.0
    watcher = make_observer("percentile", QSpec(), percentile=99.9, bins=65536)
    watcher.observe(x)
    low, high = (float(v) for v in watcher.range())
    assert low == pytest.approx(-0.998, abs=0.01)
    assert high == pytest.approx(0.998, abs=0.01)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_data_is_refused_by_name(name, bad):
    watcher = make_observer(name, QSpec())
    watcher.source = "layer1.conv"
    x = torch.ones(5)
    x[2] = bad
    with pytest.raises(CalibrationError, match=r"layer1\.conv.*(NaN|infinite)"):
        watcher.observe(x)
    assert not watcher.has_data()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_non_finite_data_can_be_left_out_and_counted(name):
    """The grid is that of the finite values; a batch without any changes nothing."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ours, expected = (make_observer(name, QSpec.activation()) for _ in range(2))
    ours.ignore_non_finite()
    bad = x.clone()
    bad[3], bad[100], bad[999] = float("nan"), float("inf"), -float("inf")
    for batch in (bad, torch.full((5,), float("nan")), bad * 2):
        ours.observe(batch)
    for batch in (x, x * 2):
        expected.observe(batch[torch.isfinite(bad)])
    assert ours.qparams() == expected.qparams()
    assert ours.non_finite.tolist() == [7, 4]
    ours.reset()
    assert ours.non_finite.tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_empty_batches_are_ignored_and_no_data_is_an_error(name):
    watcher = make_observer(name, QSpec())
    watcher.observe(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="no data"):
        watcher.qparams()
    watcher.observe(torch.tensor([1.0, 2.0]))
    watcher.reset()
    assert not watcher.has_data()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_all_zero_data_gives_a_usable_grid(name):
    watcher = make_observer(name, QSpec())
    watcher.observe(torch.zeros(10))
    scale, zero_point = watcher.qparams().item()
    assert scale > 0
    assert 0 <= zero_point <= 255


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_state_round_trips(name):
    watcher, again = make_observer(name, QSpec()), make_observer(name, QSpec())
    for x in batches("growing"):
        watcher.observe(x)
    again.load_state_dict(watcher.state_dict())
    assert again.qparams() == watcher.qparams()


def test_wrong_names_and_options_are_refused():
    with pytest.raises(InvalidArgument, match="unknown observer 'minmaxx'"):
        make_observer("minmaxx", QSpec())
    with pytest.raises(InvalidArgument, match="per tensor"):
        make_observer("histogram", QSpec.weight(), channels=3)
    with pytest.raises(InvalidArgument, match="momentum"):
        make_observer("moving_average", QSpec(), momentum=0.0)
    with pytest.raises(InvalidArgument, match="percentile"):
        make_observer("percentile", QSpec(), percentile=30.0)


def test_observers_choose_through_the_one_function():
    watcher = make_observer("minmax", QSpec())
    watcher.observe(torch.tensor([-1.0, 4.0]))
    assert watcher.qparams() == choose_qparams(QSpec(), torch.tensor(-1.0), torch.tensor(4.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_observing_without_waiting_gives_the_same_grid(name, kind):
    """What CUDA tensors take: here on the CPU, where both ways exist."""
    waits, does_not = make_observer(name, QSpec()), make_observer(name, QSpec())
    for x in batches(kind):
        waits.observe(x)
        does_not.observe_without_waiting(x)
    assert does_not.qparams() == waits.qparams()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_observing_without_waiting_leaves_out_and_counts_what_is_not_finite(name):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[3], x[100], x[999] = float("nan"), float("inf"), -float("inf")
    waits, does_not = make_observer(name, QSpec()), make_observer(name, QSpec())
    for watcher in (waits, does_not):
        watcher.ignore_non_finite()
    for batch in (x, torch.full((5,), float("nan")), x * 2):
        waits.observe(batch)
        does_not.observe_without_waiting(batch)
    assert does_not.qparams() == waits.qparams()
    assert does_not.non_finite.tolist() == waits.non_finite.tolist()


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_a_batch_that_was_not_waited_for_changes_no_channel_if_it_is_at_fault(name):
    watcher = make_observer(name, QSpec(per_channel=True), 2)
    watcher.observe_without_waiting(torch.tensor([[1.0, -2.0], [0.5, 4.0]]))
    before = [t.clone() for t in watcher.range()]
    watcher.observe_without_waiting(torch.tensor([[float("nan"), 5.0], [float("inf"), 8.0]]))
    assert all(torch.equal(a, b) for a, b in zip(watcher.range(), before, strict=True))
    with pytest.raises(CalibrationError, match="had 1 NaN and 1 infinite"):
        watcher.qparams()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_what_was_not_waited_for_is_an_error_of_the_grid(name):
    watcher, expected = make_observer(name, QSpec()), make_observer(name, QSpec())
    watcher.source = "layer1.conv"
    watcher.observe_without_waiting(torch.tensor([1.0, 2.0]))
    watcher.observe_without_waiting(torch.tensor([float("nan"), 5.0, float("inf"), float("nan")]))
    with pytest.raises(CalibrationError, match=r"layer1\.conv had 2 NaN and 1 infinite"):
        watcher.qparams()
    watcher.reset()
    for each in (watcher, expected):
        each.observe(torch.tensor([-1.0, 2.0]))
    assert watcher.qparams() == expected.qparams()


@pytest.mark.parametrize(
    ("name", "spec"),
    [*((name, QSpec()) for name in sorted(OBSERVERS)), *((n, QSpec(per_channel=True)) for n in PER_CHANNEL)],
    ids=lambda of: "per channel" if getattr(of, "per_channel", False) else None,
)
def test_observing_on_cuda_asks_the_device_for_nothing(name, spec):
    """A fake CUDA tensor has no values: whatever asks for one is an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        watcher = make_observer(name, spec, 8)
        x = torch.empty(8, 5, device="cuda")
        for buffer in ("low", "high", "histogram", "best_low", "best_high"):
            if buffer in watcher._buffers:
                setattr(watcher, buffer, getattr(watcher, buffer).to("cuda"))
        if getattr(watcher, "seen", None) is not None:
            watcher.seen.to("cuda")
        for _ in range(2):
            watcher.observe(x)
        with pytest.raises(DataDependentOutputException):
            watcher.qparams()
