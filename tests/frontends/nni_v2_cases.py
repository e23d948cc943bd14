"""Training scripts in the words of NNI 2.x, run by the original and by the front end.

As a program, `python nni_v2_cases.py results.pt` runs them with the original (nni 2.10.1 must be importable) and saves
what comes out.
"""

import sys
import tempfile
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from nni_cases import Net

BATCHES, STEPS = 4, 8
LAYERS = ["Conv2d", "Linear"]


def entry(types, **changed):
    usual = {"quant_types": types, "quant_bits": 8, "op_types": LAYERS}
    return {key: value for key, value in (usual | changed).items() if value is not None}


ALL = ["weight", "input", "output"]
SIGNED = {"quant_dtype": "int", "quant_scheme": "per_tensor_symmetric"}
CHANNELS = {"quant_dtype": "int", "quant_scheme": "per_channel_symmetric"}
RELU = entry(["output"], op_names=["relu1"], op_types=None)
DELAYED = entry(ALL, quant_start_step=4)
FOUR_BITS = entry(["weight"], quant_bits=4, op_names=["conv1"], op_types=None)
SCHEMES = {
    "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_affine", "output": "per_tensor_symmetric"},
    "quant_dtype": {"weight": "int", "input": "uint", "output": "int"},
}
WITHOUT_CONV2 = {"op_names": ["conv2"], "exclude": True}

# name: (class, config_list, whether a dummy_input is given, which folds batch norms and without which QAT fails)
CASES = {
    "naive": ("NaiveQuantizer", [entry(["weight"], op_types=["Conv2d"])], False),
    "qat": ("QAT_Quantizer", [entry(ALL), RELU], True),
    "qat symmetric": ("QAT_Quantizer", [entry(ALL, **SIGNED)], True),
    "qat per channel": ("QAT_Quantizer", [entry(["weight"], **CHANNELS), RELU], True),
    "qat schemes": ("QAT_Quantizer", [entry(ALL, **SCHEMES)], True),
    "qat bits": ("QAT_Quantizer", [entry(["weight", "input"], quant_bits={"weight": 4, "input": 8})], True),
    "qat delayed": ("QAT_Quantizer", [DELAYED], True),
    "qat last wins": ("QAT_Quantizer", [entry(ALL), FOUR_BITS, WITHOUT_CONV2], True),
    "qat weights": ("QAT_Quantizer", [entry(["weight"]), RELU], True),
    "qat 16 bits": ("QAT_Quantizer", [entry(ALL, quant_bits=16), RELU], True),
    "lsq 12 bits": ("LsqQuantizer", [entry(ALL, quant_bits=12)], False),
    "dorefa 10 bits": ("DoReFaQuantizer", [entry(["weight"], quant_bits=10, op_types=["Conv2d"])], False),
    "lsq": ("LsqQuantizer", [entry(ALL), RELU], False),
    "lsq bn fold": ("LsqQuantizer", [entry(ALL), RELU], True),
    "dorefa": ("DoReFaQuantizer", [entry(["weight"], quant_bits=4, op_types=["Conv2d"])], False),
    "bnn": ("BNNQuantizer", [entry(["weight"], quant_bits=1, op_names=["conv2"], op_types=None)], False),
    "bnn outputs": ("BNNQuantizer", [entry(["output"], quant_bits=1, op_names=["relu2"], op_types=None)], False),
    "observer": ("ObserverQuantizer", [entry(ALL), RELU], False),
}


def run(api, name, done_with=None):
    """What one case gives: losses, logits in eval mode, the exported calibration config and state_dict.

    `done_with` gets to see it before the export takes the quantizers off.
    """
    kind, config_list, folded = CASES[name]
    torch.manual_seed(0)
    model = Net()
    images, labels = torch.randn(BATCHES, 8, 1, 16, 16), torch.randint(0, 10, (BATCHES, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trained = kind not in ("NaiveQuantizer", "ObserverQuantizer")
    options = {"dummy_input": images[0]} if folded else {}
    quantizer = getattr(api, kind)(model.eval(), config_list, *[optimizer] * trained, **options)
    losses = []
    if trained:
        quantizer.compress()
        model.train()
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = F.nll_loss(model(images[step % BATCHES]), labels[step % BATCHES])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    else:
        with torch.no_grad():
            for batch in images:
                model(batch)
        quantizer.compress()
    with torch.no_grad():
        logits = model.eval()(images[1])
    done = SimpleNamespace(losses=losses, logits=logits, quantizer=quantizer, model=model, images=images)
    if done_with is not None:
        done_with(done)
    if kind != "NaiveQuantizer":
        with tempfile.TemporaryDirectory() as folder:
            done.calibration = quantizer.export_model(f"{folder}/model.pth", f"{folder}/calibration.pth")
            done.state = torch.load(f"{folder}/model.pth")
    else:
        done.calibration, done.state = {}, {}
    return done


def corrected():
    """Changes of the original that make up for where it differs (docs/frontends.md)."""
    from nni.algorithms.compression.pytorch import quantization as q
    from nni.compression.pytorch import compressor
    from torch.ao.quantization import MinMaxObserver

    def codes(x, scale, zero_point, qmin, qmax):
        # x * (1 / s), rounded before the zero point is added
        return (torch.round(x * (1.0 / scale)) + zero_point).clamp(qmin, qmax)

    def backward(tensor, gradient, quant_type, scale, zero_point, qmin, qmax):
        # the gradient of others is not overwritten; mapped to codes as above
        inside = torch.round(tensor * (1.0 / scale)) + zero_point
        if not scale.any():
            return gradient  # nothing is rounded yet; the original lets nothing pass
        return torch.where((inside >= qmin) & (inside <= qmax), gradient, 0.0)

    q.QAT_Quantizer._quantize = lambda self, *arguments: codes(*arguments)
    q.qat_quantizer.QATGrad.quant_backward = staticmethod(backward)
    q.observer_quantizer.ObserverQuantizer._quantize = lambda self, x, scale, zero_point, qmin, qmax: (
        (codes(x, scale, zero_point, qmin, qmax) - zero_point) * scale
    )

    def learned(self, x, scale, qmin, qmax):
        # as in nni_cases.corrected
        factor = 1.0 / (qmax * x.numel()) ** 0.5
        scale = self.grad_scale(scale, factor)
        return Learned.apply(x, scale, qmin, qmax)

    class Learned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale, qmin, qmax):
            ctx.save_for_backward(x * (1.0 / scale))
            ctx.limits, ctx.shape = (qmin, qmax), scale.shape
            return torch.round(x * (1.0 / scale)).clamp(qmin, qmax) * scale

        @staticmethod
        def backward(ctx, gradient):
            (value,) = ctx.saved_tensors
            nearest = torch.round(value)
            inside = (nearest >= ctx.limits[0]) & (nearest <= ctx.limits[1])
            slope = torch.where(inside, nearest - value, value.clamp(*ctx.limits))
            return gradient * inside, (gradient * slope).sum_to_size(ctx.shape), None, None

    q.LsqQuantizer.quantize = learned

    def trained(quantize_weight):
        def with_graph(self, wrapper, **options):
            module = wrapper.module
            if isinstance(self, q.QAT_Quantizer):
                waits = wrapper.training and module.layer_quant_setting.quant_start_step > int(self.bound_model.steps)
                module.weight = module.weight.clone() if waits else module.weight
                return module.weight if waits else quantize_weight(self, wrapper, **options)
            if wrapper.bn_module is None:
                module.weight = module.old_weight * 1.0
            elif self.bound_model.steps == 1:  # a scale begins with the weight that it is for: the folded one
                module.weight_scale.data = module.weight.detach().abs().mean() * 2 / module.weight_qmax**0.5
            return quantize_weight(self, wrapper, **options)

        return with_graph

    class DoReFaQuantizer(q.DoReFaQuantizer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.quant_grad = compressor.QuantForward()  # the gradient goes through tanh, as in the paper

        def quantize(self, x, bits):
            steps = 2**bits - 2  # one of the levels is zero
            return x + (torch.round((x - 0.5) * steps) / steps + 0.5 - x).detach()

    q.DoReFaQuantizer = DoReFaQuantizer
    for cls in (q.QAT_Quantizer, q.LsqQuantizer, q.DoReFaQuantizer):
        # weights are trained: the original cuts them off the graph (LSQ), or does while it waits (QAT)
        cls.quantize_weight = trained(cls.quantize_weight)
    # what was rounded by compress() is used; the original goes back to the float weights
    record = q.ObserverQuantizer.quantize_weight

    def frozen(self, wrapper, **_):
        module = wrapper.module
        if not self.compressed:
            return record(self, wrapper)
        grid = module.weight_scale, module.weight_zero_point
        module.weight = (codes(module.weight, *grid, -127, 127) - grid[1]) * grid[0]

    q.ObserverQuantizer.quantize_weight = frozen
    # the range of weights is that of the codes in use
    kind = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric, "quant_min": -127, "quant_max": 127}
    q.observer_quantizer.default_weight_observer = lambda: MinMaxObserver(**kind)

    def rounded(self, wrapper, **_):
        # to the nearest code instead of towards zero
        scale = wrapper.module.weight.abs().max() / 127
        wrapper.module.weight = codes(wrapper.module.weight, scale, 0, -127, 127) * scale

    q.NaiveQuantizer.quantize_weight = rounded

    fold = compressor.Quantizer.fold_bn

    def folded(self, *inputs, wrapper):
        # statistics of the layer itself, not of the layer that was folded and rounded in the step before
        module = wrapper.module
        module.weight = module.old_weight.data
        module.bias = module.old_bias.data if hasattr(module, "old_bias") else torch.zeros_like(module.bias)
        return fold(self, *inputs, wrapper=wrapper)

    compressor.Quantizer.fold_bn = folded


def main():
    from nni.algorithms.compression.pytorch import quantization

    def all_cases():
        results = {name: run(quantization, name) for name in CASES}
        parts = ("losses", "logits", "calibration", "state")
        return {name: {part: getattr(result, part) for part in parts} for name, result in results.items()}

    found = {"as it is": all_cases()}
    corrected()
    torch.save(found | {"corrected": all_cases()}, sys.argv[1])


if __name__ == "__main__":
    main()
