"""Training scripts in the words of NNI 3.0, run by the original and by the front end.

As a program, `python nni_cases.py results.pt` runs them with the original (nni 3.0 must be importable) and saves what
comes out.
"""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

BATCHES, STEPS = 4, 8
SEEDS = range(4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 6, 3, stride=2), nn.ReLU6()
        self.pool, self.fc = nn.MaxPool2d(2, 2), nn.Linear(6 * 3 * 3, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x)))
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


def entry(**changed):
    usual = {
        "op_names": ["conv1", "conv2", "fc"],
        "target_names": ["_input_", "weight", "_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
    }
    return {key: value for key, value in (usual | changed).items() if value is not None}


PER_CHANNEL = {"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "out_channel"}}
WEIGHTS = ["weight"]
RELU = entry(op_names=["relu1", "relu2"], target_names=["_output_"])

BLOCKS = {"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": [1, -1, -1, -1]}}
BY_TYPE = [
    entry(op_names=None, op_names_re=["conv.*"], op_types=["Conv2d", "Linear"], exclude_op_names=["conv1"]),
    entry(op_names=None, op_types=["Linear"], target_names=["weight", "_input_0"], quant_dtype="int4"),
]
FOLD = [entry(fuse_names=[("conv1", "bn1", "relu1")])]
FOLD_PER_CHANNEL = [entry(fuse_names=[("conv1", "bn1", "relu1")], target_settings=PER_CHANNEL)]


def weights(granularity, **changed):
    """Conv2d and Linear alike take it, or only one of the two: the sizes of blocks are those of one weight."""
    kind = {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": granularity} | changed
    return {"target_settings": {"weight": kind}}


CHANNELS = {"_input_": {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "per_channel"}}
CONVS_BY_CHANNEL = entry(op_names=["conv1", "conv2"], target_settings=CHANNELS)
WHOLE = {"granularity": [-1, -1, -1, -1]}
BLOCKS_OF_LINES = {"_output_": {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": [-1, 2, -1, -1]}}
BACK = entry(op_names=["fc"], **weights([[2], "back", -1], quant_scheme="affine"))
BIAS = ["_input_", "weight", "bias", "_output_"]
BIAS_ROWS = {"bias": {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "out_channel"}}
WIDE_BIAS = {"bias": {"quant_dtype": "int16", "quant_scheme": "symmetric"}}
UINT8 = entry(quant_dtype="uint8", target_settings={"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric"}})

# name: (class, config_list, options of the class)
CASES = {
    "qat affine": ("QATQuantizer", [entry(), RELU], {}),
    "qat symmetric": ("QATQuantizer", [entry(quant_scheme="symmetric"), RELU], {}),
    "qat uint4 weights": ("QATQuantizer", [entry(target_settings={"weight": {"quant_dtype": "uint4"}})], {}),
    "qat out_channel": ("QATQuantizer", [entry(target_settings=PER_CHANNEL)], {}),
    "qat delayed": ("QATQuantizer", [entry()], {"quant_start_step": 3}),
    "qat never": ("QATQuantizer", [entry()], {"quant_start_step": STEPS - 1}),
    "qat first wins": ("QATQuantizer", [entry(target_names=WEIGHTS), entry(quant_dtype="int4")], {}),
    "qat uint8": ("QATQuantizer", [UINT8, RELU], {}),
    "qat rows": ("QATQuantizer", [entry(op_names=["conv1", "conv2"], target_settings=BLOCKS)], {}),
    "qat by type": ("QATQuantizer", BY_TYPE, {}),
    "qat bn fold": ("QATQuantizer", FOLD, {}),
    "qat bn fold out_channel": ("QATQuantizer", FOLD_PER_CHANNEL, {}),
    "qat blocks": ("QATQuantizer", [entry(op_names=["conv2"], **weights([2, 2, -1, -1])), BACK], {}),
    "qat short blocks": ("QATQuantizer", [entry(op_names=["conv2"], **weights([3, 3])), BACK], {}),
    "qat elements": ("QATQuantizer", [entry(op_names=["conv1"], **weights([[1], "back"]))], {}),
    "qat in_channel": ("QATQuantizer", [entry(**weights("in_channel"))], {}),
    "qat whole tensors": ("QATQuantizer", [entry(op_names=["conv1", "conv2"], **WHOLE)], {}),
    "qat per_channel inputs": ("QATQuantizer", [CONVS_BY_CHANNEL, entry(op_names=["fc"]), RELU], {}),
    "qat output blocks": ("QATQuantizer", [entry(op_names=["conv2"], target_settings=BLOCKS_OF_LINES)], {}),
    "qat bias": ("QATQuantizer", [entry(target_names=BIAS)], {}),
    "qat bias rows": ("QATQuantizer", [entry(target_names=BIAS, target_settings=BIAS_ROWS)], {}),
    "qat only bias": ("QATQuantizer", [entry(target_names=["bias"])], {}),
    "qat wide bias": ("QATQuantizer", [entry(target_names=BIAS, target_settings=WIDE_BIAS)], {}),
    "qat bias bn fold": ("QATQuantizer", [entry(target_names=BIAS, fuse_names=[("conv1", "bn1", "relu1")])], {}),
    "qat all targets": ("QATQuantizer", [entry(target_names=None)], {}),
    "qat bn parameters": ("QATQuantizer", [entry(op_names=["bn1"], target_names=None), entry()], {}),
    "qat int16": ("QATQuantizer", [entry(quant_dtype="int16"), RELU], {}),
    "qat uint12 weights": ("QATQuantizer", [entry(target_settings={"weight": {"quant_dtype": "uint12"}})], {}),
    "lsq": ("LsqQuantizer", [entry(quant_scheme="symmetric")], {}),
    "lsq out_channel": ("LsqQuantizer", [entry(target_settings=PER_CHANNEL)], {}),
    "lsq whole tensors": ("LsqQuantizer", [entry(op_names=["conv2"], **weights([-1, -1, -1, -1]))], {}),
    "lsq blocks": ("LsqQuantizer", [entry(op_names=["conv2"], **weights([2, 2, -1, -1]))], {}),
    "lsq bias": ("LsqQuantizer", [entry(target_names=BIAS, quant_scheme="symmetric")], {}),
    "lsq int16": ("LsqQuantizer", [entry(quant_dtype="int16", quant_scheme="symmetric")], {}),
    "lsq plus": ("LsqPlusQuantizer", [entry()], {}),
    "lsq plus uint8": ("LsqPlusQuantizer", [entry(quant_dtype="uint8")], {}),
    "lsq plus int4": ("LsqPlusQuantizer", [entry(quant_dtype="int4"), RELU], {}),
    "dorefa": ("DoReFaQuantizer", [entry(target_names=WEIGHTS, quant_dtype="int4")], {}),
    "dorefa outputs": ("DoReFaQuantizer", [entry(target_names=WEIGHTS, quant_dtype="int4"), RELU], {}),
    "dorefa bias": ("DoReFaQuantizer", [entry(target_names=["weight", "bias"], quant_dtype="int4")], {}),
    "bnn bias": ("BNNQuantizer", [entry(target_names=["weight", "bias"], op_names=["conv2"])], {}),
    "bnn": ("BNNQuantizer", [entry(target_names=WEIGHTS, op_names=["conv2"])], {}),
    "bnn outputs": ("BNNQuantizer", [entry(target_names=WEIGHTS, op_names=["conv2"]), RELU], {}),
    "ptq": ("PtqQuantizer", [entry()], {}),
    "ptq bn fold": ("PtqQuantizer", [entry(fuse_names=[("conv1", "bn1", "relu1")])], {}),
    "ptq blocks and bias": ("PtqQuantizer", [entry(op_names=["fc"], target_names=BIAS, **weights([5, 9]))], {}),
    "ptq int16": ("PtqQuantizer", [entry(quant_dtype="int16")], {}),
    "ptq out_channel": ("PtqQuantizer", [entry(target_settings=PER_CHANNEL)], {}),
}


def copied(value):
    """The original's may change with the next forward."""
    return value.detach().clone() if torch.is_tensor(value) else value


def run(api, name, seed=0):
    """Calibration config, losses and logits of one case."""
    kind, config_list, options = CASES[name]
    torch.manual_seed(seed)
    model = Net()
    images, labels = torch.randn(BATCHES, 8, 1, 16, 16), torch.randint(0, 10, (BATCHES, 8))
    losses = []

    def training_step(batch, model):
        return F.nll_loss(model(batch[0]), batch[1])

    def training_func(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        model.train()
        for step in range(max_steps):
            optimizer.zero_grad()
            loss = training_step((images[step % BATCHES], labels[step % BATCHES]), model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    def evaluating_func(model):
        model.eval()
        with torch.no_grad():
            for batch in images:
                model(batch)

    optimizer = api.trace(SGD)(model.parameters(), lr=0.01, momentum=0.9)
    evaluator = api.TorchEvaluator(training_func, optimizer, training_step, evaluating_func=evaluating_func)
    quantizer = getattr(api, kind)(model, config_list, evaluator, **options)
    quantizer.track_forward(images[0])
    _, calibration = quantizer.compress(0 if kind == "PtqQuantizer" else STEPS, None)
    plain = {m: {t: {k: copied(v) for k, v in e.items()} for t, e in ts.items()} for m, ts in calibration.items()}
    with torch.no_grad():
        logits = model.eval()(images[1])
    return SimpleNamespace(calibration=plain, losses=losses, logits=logits, quantizer=quantizer, images=images)


def corrected():
    """Changes of the original that make up for where it differs (docs/frontends.md), by name."""
    from nni.compression.base import apply_method, compressor
    from nni.compression.quantization import dorefa_quantizer, lsqplus_quantizer

    def grid(space):
        scaler, shape = space._scaler, space.shape
        if scaler is None:
            return space.scale, space.zero_point
        return tuple(scaler.expand(t, shape, keepdim=True) for t in (space.scale, space.zero_point))

    def forward(ctx, x, space):
        # x * (1 / s), rounded before the zero point is added: ties go to the even code, not to the even sum
        scale, zero_point = grid(space)
        codes = torch.round(x * (1.0 / scale)) + zero_point
        ctx.inside = (codes >= space.qmin) & (codes <= space.qmax)
        return (codes.clamp(space.qmin, space.qmax) - zero_point) * scale

    def backward(ctx, gradient):
        # what is rounded to the last code is not clipped; and the gradient of others is not overwritten
        return torch.where(ctx.inside, gradient, 0.0), None

    class Learned(torch.autograd.Function):
        # the same again
        @staticmethod
        def forward(ctx, x, scale, space):
            ctx.save_for_backward(x * (1.0 / scale))
            ctx.space, ctx.shape = space, scale.shape
            return torch.round(torch.clamp(x * (1.0 / scale), space.qmin, space.qmax)) * scale

        @staticmethod
        def backward(ctx, gradient):
            (codes,) = ctx.saved_tensors
            qmin, qmax = ctx.space.qmin, ctx.space.qmax
            inside = (torch.round(codes) >= qmin) & (torch.round(codes) <= qmax)
            slope = torch.where(inside, torch.round(codes) - codes, codes.clamp(qmin, qmax))
            slope = slope / (qmax * codes.numel()) ** 0.5
            return gradient * inside, (gradient * slope).sum_to_size(ctx.shape), None

    class LearnedPlus(torch.autograd.Function):
        # the same again, and the zero point is a whole number of the grid
        @staticmethod
        def forward(ctx, x, scale, zero_point, space):
            zero_point = torch.round(zero_point).clamp(space.qmin, space.qmax)
            codes = x * (1.0 / scale)
            ctx.save_for_backward(codes, scale, zero_point)
            ctx.space = space
            return ((torch.round(codes) + zero_point).clamp(space.qmin, space.qmax) - zero_point) * scale

        @staticmethod
        def backward(ctx, gradient):
            codes, scale, zero_point = ctx.saved_tensors
            lowest, highest = ctx.space.qmin - zero_point, ctx.space.qmax - zero_point
            inside = (torch.round(codes) >= lowest) & (torch.round(codes) <= highest)
            slope = torch.where(inside, torch.round(codes) - codes, torch.round(codes).clamp(lowest, highest))
            slope = slope / (ctx.space.qmax * codes.numel()) ** 0.5
            by_scale, by_zero_point = gradient * slope, -scale * gradient * ~inside
            return gradient * inside, by_scale.sum_to_size(scale.shape), by_zero_point.sum_to_size(scale.shape), None

    def begin(self, wrapper, name, target):
        # the first zero point is the one that the first batch wants
        if self.is_init or not self.check_target(wrapper, name):
            return
        space = wrapper.quantization_target_spaces[name]
        low, high = target.detach().amin().clamp(max=0.0), target.detach().amax().clamp(min=0.0)
        scale = ((high - low) / float(space.qmax - space.qmin)).clamp(min=torch.finfo(torch.float32).eps)
        space.scale.data = torch.tensor([0.01])
        space.zero_point.data = (space.qmin - torch.round(low / scale)).clamp(space.qmin, space.qmax).reshape(1)

    lsqplus_quantizer.LsqPlusQuantizer.init_scale_zp = begin
    apply_method.quant_apply_methods["lsq_plus_clamp_round"] = lambda x, space: LearnedPlus.apply(
        x, space.scale, space.zero_point, space
    )
    apply_method.quant_apply_methods["lsq_clamp_round"] = lambda x, space: Learned.apply(x, grid(space)[0], space)
    apply_method.quant_apply_methods["dorefa_clamp_round_output"] = apply_method.QATClampRound.apply
    apply_method.QATClampRound.forward = staticmethod(forward)
    apply_method.QATClampRound.backward = staticmethod(backward)
    apply_method.ClampRound.forward = staticmethod(forward)
    # the bias of a layer with a folded norm is not put into the optimizer a second time
    compressor.Quantizer.patch_optimizer_param_group = lambda self: {}
    # gradients are not rounded: it is stochastic
    dorefa_quantizer.DoReFaQuantizer.register_output_backward_hook = lambda self: None


def main():
    import nni
    from nni.compression import TorchEvaluator, quantization

    classes = {kind: getattr(quantization, kind) for kind, _, _ in CASES.values()}
    api = SimpleNamespace(trace=nni.trace, TorchEvaluator=TorchEvaluator, **classes)

    def all_cases(seed):
        results = {name: run(api, name, seed) for name in CASES}
        return {n: {"calibration": r.calibration, "losses": r.losses, "logits": r.logits} for n, r in results.items()}

    found = {"as it is": all_cases(0)}
    corrected()
    torch.save(found | {"corrected": [all_cases(seed) for seed in SEEDS]}, sys.argv[1])


if __name__ == "__main__":
    main()
