"""torch.func and forward-mode AD: an error instead of a derivative that is lost; torch.vmap is a loop."""

import pytest
import torch
from torch.autograd import forward_ad

from qkernels import ops

GRID = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
LEARNED = GRID[0], GRID[1].float()
STATE = (
    *(torch.tensor([float("inf")]), torch.tensor([-float("inf")]), torch.ones(1)),
    *(torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
)
FUNCTIONS = {
    "fake_quant": lambda x: ops.fake_quant(x, *GRID, None, 0, 15),
    "fake_quant, mask": lambda x: ops.fake_quant(x, *GRID, None, 0, 15, keep="mask"),
    "fake_quant_codes": lambda x: ops.fake_quant_codes(x, *GRID, 0, 15, torch.uint8)[0],
    "fake_quant_mask": lambda x: ops.fake_quant_mask(x, *GRID, None, 0, 15)[0],
    "fake_quant_mask_backward": lambda x: ops.fake_quant_mask_backward(x, torch.ones(1, dtype=torch.uint8), None),
    "fake_quant_backward": lambda x: ops.fake_quant_backward(x, x.detach(), *GRID, None, 0, 15),
    "lsq": lambda x: ops.lsq(x, *LEARNED, None, 0, 15, 1.0),
    "lsq_backward": lambda x: ops.lsq_backward(x, x, *LEARNED, None, 0, 15, 1.0)[0],
    "pact": lambda x: ops.pact(x, *GRID, None, 0, 15),
    "pact_backward": lambda x: ops.pact_backward(x, x, *GRID, None, 0, 15)[0],
    "dorefa_weight": lambda x: ops.dorefa_weight(x, *GRID, 0, 15),
    "dorefa_weight_backward": lambda x: ops.dorefa_weight_backward(x, x, *GRID, 0, 15),
    "dorefa_gradient": lambda x: ops.dorefa_gradient(x, torch.tensor([7]), 4),
    "binary_sign": ops.binary_sign,
    "binary_sign_backward": lambda x: ops.binary_sign_backward(x, x),
    "round_gradient": lambda x: ops.round_gradient(x, 4, torch.tensor([7])),
    "observe_fake_quant": lambda x: ops.observe_fake_quant(x, *STATE, None, 0, 15, False, 1e-6, None, "x"),
    "foreach_fake_quant": lambda x: ops.foreach_fake_quant([x], *([t] for t in GRID), [None], 0, 15)[0],
    "foreach_observe_fake_quant": lambda x: ops.foreach_observe_fake_quant([x], [None], 0, 15, False, 1e-6)[0][0],
    "foreach_fake_quant_backward": lambda x: ops.foreach_fake_quant_backward(
        [x], [x.detach()], *([t] for t in GRID), [None], 0, 15
    )[0],
}
LOOPED = ("fake_quant", "fake_quant, mask", "fake_quant_backward", "lsq", "pact", "dorefa_weight", "binary_sign")


def refused(name: str):
    return pytest.raises(NotImplementedError, match=f"{name.split(',')[0]}: its gradient is for torch.autograd alone")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_would_lose_a_derivative_is_refused(name):
    function, x = FUNCTIONS[name], torch.randn(8)
    transforms = [
        lambda: torch.func.grad(lambda x: function(x).sum())(x),
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.vmap(torch.func.grad(lambda x: function(x).sum()))(x.expand(2, 8)),
        lambda: torch.func.grad(lambda x: torch.vmap(function)(x).sum())(x.expand(2, 8)),
    ]
    for transform in transforms:
        with refused(name):
            transform()
    with forward_ad.dual_level():
        for leaf in (x, x.clone().requires_grad_()):
            with refused(name):
                function(forward_ad.make_dual(leaf, x))
        function(x)  # without a tangent


def test_a_scale_with_a_tangent_is_refused():
    with forward_ad.dual_level(), refused("lsq"):
        ops.lsq(torch.randn(8), forward_ad.make_dual(LEARNED[0], torch.ones(1)), LEARNED[1], None, 0, 15, 1.0)


def test_a_parameter_inside_of_a_transform_is_refused():
    weight = torch.nn.Parameter(torch.randn(8))
    with refused("fake_quant"):
        torch.func.grad(lambda x: (x * FUNCTIONS["fake_quant"](weight)).sum())(torch.randn(8))


def test_a_constant_inside_of_a_transform_is_rounded():
    x, constant = torch.randn(8), torch.randn(8)
    for function in (FUNCTIONS["fake_quant"], FUNCTIONS["lsq"]):
        gradient = torch.func.grad(lambda x, function=function: (x * function(constant)).sum())(x)
        assert torch.equal(gradient, function(constant))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LOOPED)
def test_vmap_is_a_loop(name):
    function, x, grad = FUNCTIONS[name], torch.randn(3, 8), torch.randn(3, 8)
    ours, looped = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = torch.vmap(function)(ours), torch.stack([function(row) for row in looped])
    assert torch.equal(*results)
    for result in results:
        result.backward(grad)
    assert torch.equal(ours.grad, looped.grad)


@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_a_second_derivative_that_is_not_there_is_an_error(name):
    x = torch.randn(8).requires_grad_()
    first = torch.autograd.grad((FUNCTIONS[name](x) ** 2 + x**3).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{name}: its gradient cannot be differentiated again"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match=f"{name}: its gradient cannot be differentiated again"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_nor_is_it_left_out_where_the_incoming_gradient_is_constant(name):
    x = torch.randn(8).requires_grad_()
    first = torch.autograd.grad((FUNCTIONS[name](x) + x**3).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{name}: its gradient cannot be differentiated again"):
        torch.autograd.grad(first.sum(), x)
