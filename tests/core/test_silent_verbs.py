"""Verbs that find nothing to do say so; under `model.apply`, which visits every part, they keep silent."""

import warnings

import pytest
import torch
from torch import nn

import qkernels
from qkernels.errors import InvalidArgument, InvalidType

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PHASES = [
    qkernels.disable_observer,
    qkernels.enable_observer,
    qkernels.disable_fake_quant,
    qkernels.enable_fake_quant,
    qkernels.freeze,
    qkernels.freeze_bn,
    qkernels.unfreeze_bn,
]


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def prepared():
    return qkernels.calibrate(qkernels.prepare(network(), X), [X])


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_of_a_model_without_quantizers_warns(phase, prepared):
    for model in (network(), qkernels.convert(prepared)):
        with pytest.warns(UserWarning, match=rf"^{phase.__name__}: nothing changes, for there is no Quantizer in this"):
            phase(model)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_keeps_silent_where_there_are_quantizers_and_under_apply(phase, prepared):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phase(prepared)
        prepared.apply(phase)
        nn.Sequential(prepared, nn.Softmax(1)).apply(lambda module: phase(module))
        network().apply(phase)


def test_phases_under_apply_do_what_they_do_to_the_whole():
    one, other = (qkernels.prepare_qat(network(), X) for _ in range(2))
    qkernels.freeze_bn(one)
    other.apply(qkernels.freeze_bn)
    frozen = [[m.frozen for m in model.modules() if hasattr(m, "frozen")] for model in (one, other)]
    assert frozen == [[True], [True]]


def test_changes_of_a_phase_are_functions(prepared):
    with (
        pytest.raises(InvalidType, match=r"^phase: changes must be functions of a model, .*, got 'freeze'$"),
        qkernels.phase(prepared, "freeze"),
    ):
        pass


def test_reestimate_bn_needs_batch_norms_that_train(prepared):
    for model in (network(), prepared, qkernels.prepare_qat(nn.Linear(4, 4), torch.randn(2, 4))):
        with pytest.raises(InvalidArgument, match=r"^reestimate_bn: the model must come from `prepare_qat`, and have"):
            qkernels.reestimate_bn(model, [X])
    qat = qkernels.prepare_qat(network(), X)
    qat(X)
    assert qkernels.reestimate_bn(qat, [X]) is qat
