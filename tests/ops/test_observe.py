"""Observers in one op: the bits of the Python observers and of fake_quant, however they are computed."""

import pytest
import torch

from qkernels import ops, reference
from qkernels.core.observers import make_observer
from qkernels.core.qspec import QSpec
from qkernels.testing import isa_cap, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


class State:
    """The arguments of an observer op for a QSpec."""

    def __init__(self, spec: QSpec, channels: int = 1, momentum: float | None = None, counts: bool = False):
        self.low, self.high = torch.full((channels,), INF), torch.full((channels,), -INF)
        self.scale, self.zero_point = torch.zeros(channels), torch.zeros(channels, dtype=torch.int32)
        self.non_finite = torch.zeros(2, dtype=torch.int64) if counts else None
        self.axis = spec.axis if spec.per_channel else None
        self.rest = spec.qmin, spec.qmax, spec.symmetric, spec.min_scale, momentum, "the output of conv1"

    def tensors(self):
        return self.low, self.high, self.scale, self.zero_point

    def args(self):
        return *self.tensors(), self.non_finite, self.axis, *self.rest


def data(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 3 + 0.4).to(dtype)


SPECS = {
    "affine": QSpec.activation(),
    "4 bit": QSpec.activation(bits=4),
    "signed": QSpec(torch.int8, -128, 127),
    "symmetric uint8": QSpec(torch.uint8, 0, 255, symmetric=True),
    "weight": QSpec.weight(per_channel=False),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("momentum", [None, 0.01, 0.3, 1.0])
def test_state_and_grid_have_the_bits_of_the_python_observer(isa, spec, momentum):
    options = {} if momentum is None else {"momentum": momentum}
    theirs = make_observer("minmax" if momentum is None else "moving_average", spec, **options)
    ours = State(spec, momentum=momentum)
    for batch in range(6):
        x = data(64, 33, seed=batch) * (1 + batch % 3) + (batch - 2)
        theirs.observe(x)
        y = ops.observe_fake_quant(x, *ours.args())
        grid = theirs.qparams()
        assert torch.equal(ours.low, theirs.low)
        assert torch.equal(ours.high, theirs.high)
        assert torch.equal(ours.scale, grid.scale)
        assert torch.equal(ours.zero_point, grid.zero_point)
        assert torch.equal(y, ops.fake_quant(x, grid.scale, grid.zero_point, None, spec.qmin, spec.qmax))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_channel_equals_the_python_observer(isa, axis, memory_format, dtype):
    spec = QSpec(torch.int8, -128, 127, per_channel=True, axis=axis)
    theirs, ours = make_observer("moving_average", spec, (3, 37, 5, 11)[axis]), None
    for batch in range(3):
        x = data(3, 37, 5, 11, seed=batch, dtype=dtype).contiguous(memory_format=memory_format)
        ours = ours or State(spec, x.shape[axis], momentum=0.01)
        theirs.observe(x)
        y = ops.observe_fake_quant(x, *ours.args())
    grid = theirs.qparams()
    assert torch.equal(ours.low, theirs.low)
    assert torch.equal(ours.high, theirs.high)
    assert torch.equal(ours.scale, grid.scale)
    assert torch.equal(ours.zero_point, grid.zero_point)
    assert torch.equal(y, ops.fake_quant(x, grid.scale, grid.zero_point, axis, -128, 127))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 63, 65, 16383, 16385, 200_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_every_length(isa, n, dtype):
    x = data(n, seed=n, dtype=dtype)
    for at, value in ((0, 99.0), (n - 1, -77.0), (n // 2, 123.0)):
        x[at] = value
        low, high, non_finite = ops.observe_minmax(x, None)
        assert [low.item(), high.item()] == [x.float().min().item(), x.float().max().item()]
        assert non_finite.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(5,), (700,), (3, 600), (4, 3, 7), (2, 300, 3, 3), (0, 4), (1, 1)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_extremes_equal_the_reference_with_non_finite_values(isa, shape, axis):
    g = torch.Generator().manual_seed(1)
    x = data(*shape)
    strange = torch.tensor([float("nan"), INF, -INF])[torch.randint(0, 3, shape, generator=g)]
    for share in (0.0, 0.05, 1.0):
        mixed = torch.where(torch.rand(shape, generator=g) < share, strange, x)
        for ours, expected in zip(ops.observe_minmax(mixed, axis), reference.observe_minmax(mixed, axis), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("values", [(-0.0,), (0.0, -0.0), (-0.0, 0.0), (-0.0, float("nan")), (INF, -0.0), (-0.0,) * 40])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_an_extreme_is_never_negative_zero(isa, values, axis):
    x = torch.tensor(values).expand(3, -1).contiguous()
    for observe in (ops.observe_minmax, reference.observe_minmax):
        for extremes in observe(x, axis)[:2]:
            assert not torch.signbit(extremes[extremes == 0]).any()


@pytest.mark.parametrize("strange", [float("nan"), INF, -INF])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("at", [0, 500, 1199])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_source_and_changes_nothing(
    isa, strange, per_channel, at
):
    spec = QSpec(torch.int8, -128, 127, per_channel=per_channel)
    state = State(spec, 30 if per_channel else 1, momentum=0.1)
    ops.observe_fake_quant(data(30, 40), *state.args())
    before = [t.clone() for t in state.tensors()]
    x = data(30, 40, seed=1)
    x.view(-1)[at] = strange
    for call in (ops.observe, ops.observe_fake_quant):
        with pytest.raises(RuntimeError, match=r"x \(the output of conv1\) must be finite, got . NaN and . infinite"):
            call(x, *state.args())
    for t, b in zip(state.tensors(), before, strict=True):
        assert torch.equal(t, b)


@pytest.mark.parametrize("per_channel", [False, True])
def test_values_that_are_not_finite_are_ignored_and_counted_if_asked(isa, per_channel):
    spec = QSpec(torch.int8, -128, 127, per_channel=per_channel)
    ours, expected = (State(spec, 30 if per_channel else 1, 0.1, counts=True) for _ in range(2))
    for batch in range(3):
        x = data(30, 40, seed=batch)
        x[3, 5], x[7, 1], x[7, 2], x[9] = float("nan"), INF, -INF, float("nan")
        y = ops.observe_fake_quant(x, *ours.args())
        assert torch.equal(y, reference.observe_fake_quant(x, *expected.args()))
        for a, b in zip(ours.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a, b)
    assert ours.non_finite.tolist() == [3 * 41, 3 * 2] == expected.non_finite.tolist()


def test_all_zero_constant_and_tiny_data_get_a_usable_grid(isa):
    for x in (torch.zeros(9), torch.full((9,), 5.0), torch.full((9,), -1e-30), torch.full((9,), 3e38)):
        for spec in SPECS.values():
            ours, expected = State(spec), State(spec)
            y = ops.observe_fake_quant(x, *ours.args())
            assert torch.equal(y, reference.observe_fake_quant(x, *expected.args()))
            assert torch.equal(ours.scale, expected.scale)
            assert torch.equal(ours.zero_point, expected.zero_point)
            assert torch.isfinite(y).all()


def test_an_empty_batch_changes_nothing():
    state = State(SPECS["affine"])
    y = ops.observe_fake_quant(torch.empty(0, 3), *state.args())
    assert y.shape == (0, 3)
    assert state.low.item() == INF


@pytest.mark.parametrize("momentum", [None, 0.01])
def test_gradient_equals_torch(momentum):
    """Also when the next batch has moved the grid before the backward, and when nothing is clipped."""
    spec = SPECS["affine"]
    state = State(spec, momentum=momentum)
    pending = []
    for batch in range(4):
        x = data(40, 50, seed=batch) * (1 + batch)
        grad = data(40, 50, seed=10 + batch)
        ours = x.clone().requires_grad_()
        y = ops.observe_fake_quant(ours, *state.args())
        theirs = x.clone().requires_grad_()
        torch.fake_quantize_per_tensor_affine(theirs, state.scale.item(), state.zero_point.item(), 0, 255).backward(
            grad
        )
        pending.append((ours, y, grad, theirs.grad))
    for ours, y, grad, expected in pending:
        y.backward(grad)
        assert torch.equal(ours.grad, expected)
    assert (pending[-1][3] == 0).any() == (momentum is not None)


def test_the_backward_of_a_batch_without_clipping_is_the_incoming_gradient_itself():
    x, grad = data(40, 50).requires_grad_(), data(40, 50, seed=1)
    y = ops.observe_fake_quant(x, *State(SPECS["affine"]).args())
    assert torch.autograd.grad(y, x, grad)[0].data_ptr() == grad.data_ptr()


def test_flags_switch_observing_and_quantizing():
    x, state = data(30), State(SPECS["affine"])
    assert ops.observe_fake_quant(x, *state.args(), observing=False, quantizing=False) is x
    assert state.low.item() == INF
    assert ops.observe_fake_quant(x, *state.args(), quantizing=False) is x
    assert state.low.item() == x.min()
    scale, zp = state.scale.clone(), state.zero_point.clone()
    y = ops.observe_fake_quant(x * 9, *state.args(), observing=False)
    assert torch.equal(y, ops.fake_quant(x * 9, scale, zp, None, 0, 255))
    assert state.low.item() == x.min()


def test_compiled_equals_eager():
    def step(x, low, high, scale, zero_point):
        y = ops.observe_fake_quant(x * 2, low, high, scale, zero_point, None, None, 0, 255, False, 1e-12, 0.1, "x")
        return (y**2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    states = [State(SPECS["affine"]) for _ in range(2)]
    for batch in range(3):
        grads = []
        for run, state in zip((step, compiled), states, strict=True):
            x = (data(20, 30, seed=batch) * (1 + batch)).requires_grad_()
            run(x, *state.tensors()).backward()
            grads.append(x.grad)
        assert torch.equal(*grads)
        for a, b in zip(*(s.tensors() for s in states), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_threads_and_instruction_sets_do_not_change_bits(axis):
    x = data(700, 900)
    spec = QSpec(torch.int8, -128, 127, per_channel=axis is not None, axis=axis or 0)
    results = []
    before = torch.get_num_threads()
    try:
        for isa in supported_isas():
            with isa_cap(isa):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    state = State(spec, 1 if axis is None else x.shape[axis], momentum=0.1)
                    y = ops.observe_fake_quant(x, *state.args())
                    results.append((y, *state.tensors()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("change", ["sliced", "expanded", "transposed"])
def test_any_layout(change):
    x = data(24, 40)
    x = {"sliced": x[:, ::2], "expanded": x[:1].expand(24, 40), "transposed": x.t()}[change]
    spec = QSpec(torch.int8, -128, 127, per_channel=True, axis=1)
    ours, expected = State(spec, x.shape[1]), State(spec, x.shape[1])
    assert torch.equal(ops.observe_fake_quant(x, *ours.args()), reference.observe_fake_quant(x, *expected.args()))
    assert torch.equal(ours.low, expected.low)
    assert torch.equal(ops.observe_minmax(x, 1)[0], expected.low)


STATE_NAMES = "low", "high", "scale", "zero_point", "non_finite", "axis"
RULE_NAMES = "qmin", "qmax", "symmetric", "min_scale", "momentum", "source"
GOOD = {"x": torch.ones(3, 4)} | dict(zip((*STATE_NAMES, *RULE_NAMES), State(SPECS["affine"]).args(), strict=True))
BAD = [
    ({"x": torch.ones(3, dtype=torch.float64)}, "x must be torch.float32, torch.bfloat16 or torch.float16"),
    ({"low": torch.ones(2)}, "low must be a contiguous torch.float32 tensor of 1 element"),
    ({"axis": 1}, "low must be a contiguous torch.float32 tensor of 4 elements"),
    ({"zero_point": torch.zeros(1)}, "zero_point must be a contiguous torch.int32 tensor"),
    ({"non_finite": torch.zeros(2)}, "non_finite must be a contiguous torch.int64 tensor of 2 elements"),
    ({"axis": 2}, "axis must be in"),
    ({"qmin": 255}, "qmin must be below qmax"),
    ({"qmax": 1 << 22}, r"qmin and qmax must be in \[-2\^21, 2\^21\]"),
    ({"min_scale": 0.0}, "min_scale must be positive"),
    ({"momentum": 0.0}, r"momentum must be in \(0, 1\]"),
    ({"momentum": float("nan")}, r"momentum must be in \(0, 1\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"observe: {message}"):
        ops.observe(**(GOOD | change))
    with pytest.raises(RuntimeError, match=f"observe_fake_quant: {message}"):
        ops.observe_fake_quant(**(GOOD | change))


NAN_PLACES = {
    "runs of a long row": ((40_000,), None),
    "rows of a channel": ((5, 3, 9_000), 1),
    "folded rows": ((17, 3), 1),
    "rows of many channels": ((400, 600), -1),
}


@pytest.mark.parametrize("place", NAN_PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_found_wherever_it_lies(isa, place, dtype):
    shape, axis = NAN_PLACES[place]
    for where in (0, 5, 1 / 3, 1 / 2, -1):
        x = data(*shape, dtype=dtype)
        at = int(where * x.numel()) if isinstance(where, float) else where
        x.view(-1)[at] = float("nan")
        low, high, counts = ops.observe_minmax(x, axis)
        expected = reference.observe_minmax(x, axis)
        assert torch.equal(low, expected[0])
        assert torch.equal(high, expected[1])
        assert counts.tolist() == [1, 0]
        spec = QSpec.activation()
        with pytest.raises(RuntimeError, match="must be finite, got 1 NaN and 0 infinite values"):
            ops.observe(x, *State(spec).args())


def test_an_empty_tensor_of_many_dimensions_has_no_extremes():
    low, high, counts = ops.observe_minmax(torch.empty([0] * 16), None)
    assert (low.tolist(), high.tolist(), counts.tolist()) == ([INF], [-INF], [0, 0])
    low, high, _ = ops.observe_minmax(torch.empty([0] * 9 + [3] + [0] * 5 + [2**40]), 9)
    assert (low.tolist(), high.tolist()) == ([INF] * 3, [-INF] * 3)
    assert ops.fake_quant(torch.empty([0] * 12), torch.ones(1), torch.zeros(1).int(), None, 0, 9).shape == (0,) * 12


@pytest.mark.parametrize("limits", [(0.0, None), (0.0, 6.0), (-1.0, 1.0), (5.0, 7.0)])
def test_limits_are_those_of_a_clamp_before_it(isa, limits):
    spec = SPECS["affine"]
    ours, theirs, reference_state = State(spec, momentum=0.1), State(spec, momentum=0.1), State(spec, momentum=0.1)
    for batch in range(4):
        x = data(17, 33, seed=batch)
        ops.observe(x, *ours.args(), *limits)
        ops.observe(x.clamp(*limits), *theirs.args())
        reference.observe(x, *reference_state.args(), *limits)
        for a, b, c in zip(ours.tensors(), theirs.tensors(), reference_state.tensors(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="floor must not be above ceiling"):
        ops.observe(x, *ours.args(), 1.0, 0.0)


@pytest.mark.parametrize("limits", [(0.0, None), (None, 1.0), (0.0, 6.0), (5.0, 7.0)])
def test_limits_hold_beside_a_channel_without_finite_values(isa, limits):
    spec = QSpec(torch.uint8, 0, 255, per_channel=True)
    ours, expected = (State(spec, 3, momentum=0.1, counts=True) for _ in range(2))
    for batch in range(3):
        x = data(3, 40, seed=batch)
        x[batch] = float("nan")
        ops.observe(x, *ours.args(), *limits)
        reference.observe(x, *expected.args(), *limits)
        for a, b in zip(ours.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a, b)


def histogram_state(bins: int):
    return torch.tensor([INF]), torch.tensor([-INF]), torch.zeros(bins)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [2, 33, 2048, 65536])
def test_histograms_count_as_torch_does(dtype, bins):
    """The first batch is torch.histc; later ones are the reference's, whatever the threads."""
    states = [histogram_state(bins) for _ in range(3)]
    for batch in range(5):
        x = data(300, 700, seed=batch, dtype=dtype) * (1 + batch % 3) + batch
        low, high, _ = ops.observe_minmax(x, None)
        ops.observe_histogram(x, low, high, *states[0])
        reference.observe_histogram(x, low, high, *states[1])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        ops.observe_histogram(x, low, high, *states[2])
        torch.set_num_threads(threads)
        if batch == 0:
            assert torch.equal(states[0][2], torch.histc(x.float(), bins, float(low), float(high)))
        for ours, expected, alone in zip(*states, strict=True):
            assert torch.equal(ours, expected)
            assert torch.equal(ours, alone)
    assert float(states[0][2].double().sum()) == pytest.approx(5 * x.numel(), rel=1e-5)


def test_histograms_refuse_wrong_state():
    x, low, high = torch.randn(5), torch.zeros(1), torch.ones(1)
    for words, state in {
        "histogram must have one dimension": (low, high, torch.zeros(1)),
        "histogram must be a contiguous": (low, high, torch.zeros(4, dtype=torch.float64)),
        "low must be a contiguous": (torch.zeros(2), high, torch.zeros(4)),
    }.items():
        with pytest.raises(RuntimeError, match=f"observe_histogram: {words}"):
            ops.observe_histogram(x, low, high, *state)


def test_the_range_of_a_histogram_grows_without_values():
    ours, expected = histogram_state(8), histogram_state(8)
    for x, low, high in ((torch.randn(50).clamp(-1, 1), -1.0, 1.0), (torch.empty(0), -3.0, 2.0)):
        for state, observe in ((ours, ops.observe_histogram), (expected, reference.observe_histogram)):
            observe(x, torch.tensor([low]), torch.tensor([high]), *state)
    assert (ours[0].item(), ours[1].item()) == (-3.0, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_histogram_of_a_single_value():
    ours, expected, x = histogram_state(8), histogram_state(8), torch.tensor(0.3)
    for state, observe in ((ours, ops.observe_histogram), (expected, reference.observe_histogram)):
        observe(x, torch.tensor([-1.0]), torch.tensor([1.0]), *state)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert ours[2].sum() == 1
