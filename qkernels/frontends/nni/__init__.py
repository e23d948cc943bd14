# ruff: noqa: F401
"""NNI's quantizers (API of 3.0) over the core of qkernels: `import qkernels.frontends.nni as nni`.

    optimizer = nni.trace(SGD)(model.parameters(), lr=0.01)
    evaluator = nni.TorchEvaluator(training_func, optimizer, training_step)
    quantizer = nni.QATQuantizer(model, config_list, evaluator)
    quantizer.track_forward(x)
    model, calibration_config = quantizer.compress(None, max_epochs=5)
    converted = quantizer.convert()

The last line is what the original has not: the network in integers. See docs/frontends.md.
"""

from qkernels.frontends.nni import calibration
from qkernels.frontends.nni.evaluator import (
    SCHEDULER,
    DeepspeedTorchEvaluator,
    LightningEvaluator,
    TorchEvaluator,
    TransformersEvaluator,
    model_wrapper,
    trace,
)
from qkernels.frontends.nni.quantizers import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
