"""torch's tutorial on eager quantization (MobileNetV2) with its import lines changed, on real images from a package.

A float network is trained, quantized after training per tensor and per channel, and trained with quantization; every
result runs on the integer layers of qkernels. `torch` is torch, except that `torch.ao.quantization` is the front end.
With --efficientnet the same qconfigs go, by prepare_fx, to a network with ImageNet weights and photographs.
"""

import argparse
import io

import torch.nn.functional as F
from _common import add_data, add_json, data_set, milliseconds, random_views, write_results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qkernels
from qkernels.cli import positive
from qkernels.frontends import torch_ao
from qkernels.frontends.torch_ao import DeQuantStub, QuantStub, torch


def make_divisible(v, divisor=8):
    return max(divisor, int(v + divisor / 2) // divisor * divisor)


class ConvBNReLU(nn.Sequential):
    def __init__(self, in_planes, out_planes, kernel_size=3, stride=1, groups=1):
        padding = (kernel_size - 1) // 2
        super().__init__(
            nn.Conv2d(in_planes, out_planes, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_planes, momentum=0.1),
            nn.ReLU(inplace=False),
        )


class InvertedResidual(nn.Module):
    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers = [] if expand_ratio == 1 else [ConvBNReLU(inp, hidden_dim, kernel_size=1)]
        layers.extend(
            [
                ConvBNReLU(hidden_dim, hidden_dim, stride=stride, groups=hidden_dim),
                nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
                nn.BatchNorm2d(oup, momentum=0.1),
            ]
        )
        self.conv = nn.Sequential(*layers)
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.skip_add.add(x, self.conv(x)) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    SETTING = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes=10, width_mult=1.0, inputs=1, stride=1):
        super().__init__()
        channels = make_divisible(32 * width_mult)
        features = [ConvBNReLU(inputs, channels, stride=stride)]
        for t, c, n, s in self.SETTING:
            s = stride if c == 24 else s  # small images keep their size longer
            for i in range(n):
                outputs = make_divisible(c * width_mult)
                features.append(InvertedResidual(channels, outputs, s if i == 0 else 1, expand_ratio=t))
                channels = outputs
        last = make_divisible(1280 * max(1.0, width_mult)) if width_mult >= 1 else 4 * channels
        features.append(ConvBNReLU(channels, last, kernel_size=1))
        self.features = nn.Sequential(*features)
        self.quant = QuantStub()
        self.dequant = DeQuantStub()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, x):
        x = self.quant(x)
        x = self.features(x)
        x = x.mean([2, 3])
        x = self.classifier(x)
        return self.dequant(x)

    def fuse_model(self, is_qat=False):
        fuse_modules = torch.ao.quantization.fuse_modules_qat if is_qat else torch.ao.quantization.fuse_modules
        for m in self.modules():
            if type(m) is ConvBNReLU:
                fuse_modules(m, ["0", "1", "2"], inplace=True)
            if type(m) is InvertedResidual:
                for idx in range(len(m.conv)):
                    if type(m.conv[idx]) is nn.Conv2d:
                        fuse_modules(m.conv, [str(idx), str(idx + 1)], inplace=True)


def evaluate(model, data_loader, batches=None):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for i, (x, y) in enumerate(data_loader):
            if i == batches:
                break
            correct += (model(x).argmax(1) == y).sum().item()
            total += len(y)
    return 100.0 * correct / total


def train_one_epoch(model, optimizer, data_loader):
    model.train()
    for x, y in data_loader:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def size_in_mb(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


QCONFIGS = (
    ("min-max, per tensor", torch.ao.quantization.default_qconfig),
    ("histogram, per channel", torch.ao.quantization.get_default_qconfig("x86")),
)


def efficientnet(count):
    """How often int8 says what EfficientNet-Lite0 says in float, without training."""
    from efficientnet_lite0 import SIZE, load_model, normalized

    model = load_model()
    calibration, views = normalized(random_views(64, SIZE, seed=1)), normalized(random_views(count, SIZE, seed=2))
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in views.split(16)]).argmax(1)
        print(f"{'EfficientNet-Lite0':<28} {'top-1 agreement':>16} {'batch of 1':>12}")
        rows = {"float": {"batch_1_ms": milliseconds(model, views[:1])}}
        print(f"{'float':<28} {'':>16} {rows['float']['batch_1_ms']:9.2f} ms")
        for name, qconfig in QCONFIGS:
            mapping = torch.ao.quantization.QConfigMapping().set_global(qconfig)
            prepared = torch.ao.quantization.prepare_fx(model, mapping, (views[:1],))
            for batch in calibration.split(16):
                prepared(batch)
            quantized = torch.ao.quantization.convert_fx(prepared)
            assert qkernels.verify(prepared, quantized, [views[:4]]).total_mismatches == 0
            found = torch.cat([quantized(batch) for batch in views.split(16)]).argmax(1)
            agreement = (found == expected).double().mean().item()
            rows[name] = {"agreement": agreement, "batch_1_ms": milliseconds(quantized, views[:1])}
            print(f"{name:<28} {agreement:16.1%} {rows[name]['batch_1_ms']:9.2f} ms")
    return {"views": count, "rows": rows, "original_points_lost": {QCONFIGS[0][0]: 15.2, QCONFIGS[1][0]: 4.6}}


def time_scripted():
    """The network as it is for ImageNet, as TorchScript from a file, for one image."""

    def scripted(model):
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        return torch.jit.load(file).eval()

    x = torch.randn(1, 3, 224, 224)
    model = MobileNetV2(1000, inputs=3, stride=2).eval()
    model.fuse_model()
    found = {"float": scripted(model)}
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(model, inplace=True)
    model(x)
    quantized = torch.ao.quantization.convert(model)
    found |= {"int8": scripted(quantized), "int8, a plan": qkernels.compile(quantized, x)}
    times = {name: milliseconds(network, x, 50) for name, network in found.items()}
    for name, time in times.items():
        print(f"{name:<28} {time:9.2f} ms")
    return {"one_image_ms": times, "original": {"float": 61, "int8": 20}}


def trained(options):
    """The tutorial from beginning to end."""
    images = data_set(options.data)

    def loader(x, y, shuffle):
        return DataLoader(
            TensorDataset(F.interpolate(x[: options.images], (32, 32)), y[: options.images]),
            batch_size=64,
            shuffle=shuffle,
        )

    data_loader = loader(images.train_x, images.train_y, True)
    data_loader_test = loader(images.test_x, images.test_y, False)
    sample = next(iter(data_loader_test))[0][:32]
    rows = []

    def result(name, model):
        rows.append((name, evaluate(model, data_loader_test), size_in_mb(model), milliseconds(model, sample)))

    float_model = MobileNetV2(width_mult=options.width)
    optimizer = torch.optim.Adam(float_model.parameters(), lr=2e-3)
    for _ in range(options.epochs):
        train_one_epoch(float_model, optimizer, data_loader)
    state = float_model.state_dict()

    def load_model():
        model = MobileNetV2(width_mult=options.width)
        model.load_state_dict(state)
        return model

    fused = load_model().eval()
    fused.fuse_model()
    result("float, fused", fused)

    for name, qconfig in QCONFIGS:
        model = load_model().eval()
        model.fuse_model()
        model.qconfig = qconfig
        print(model.qconfig)
        torch.ao.quantization.prepare(model, inplace=True)
        evaluate(model, data_loader, batches=10)
        prepared = torch_ao.prepared(model)
        torch.ao.quantization.convert(model, inplace=True)
        assert qkernels.verify(prepared, model, [sample]).total_mismatches == 0
        result(name, model)
    print("Inverted residual block after quantization\n", model.features[1].conv)

    qat_model = load_model().train()
    qat_model.fuse_model(is_qat=True)
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=1e-3)
    qat_model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.prepare_qat(qat_model, inplace=True)
    for epoch in range(options.qat_epochs):
        train_one_epoch(qat_model, optimizer, data_loader)
        if epoch > 1:
            qat_model.apply(torch.ao.quantization.disable_observer)
        if epoch > 0:
            qat_model.apply(torch.nn.intrinsic.qat.freeze_bn_stats)
        quantized_model = torch.ao.quantization.convert(qat_model.eval(), inplace=False)
        print(f"epoch {epoch}: {evaluate(quantized_model, data_loader_test):.2f} %")
    report = qkernels.verify(torch_ao.prepared(qat_model), quantized_model, [sample])
    assert report.total_mismatches == 0
    result("trained with quantization", quantized_model)

    print(f"verify: {report.total_mismatches} codes differ")
    print(f"{'':<28} {'accuracy':>9} {'size':>9} {'batch of ' + str(len(sample)):>12}")
    for name, accuracy, size, latency in rows:
        print(f"{name:<28} {accuracy:7.2f} % {size:6.2f} MB {latency:9.2f} ms")
    columns = ("accuracy", "size_mb", "batch_of_32_ms")
    return {
        "data": images.name,
        "images": [len(loader.dataset) for loader in (data_loader, data_loader_test)],
        "mismatches": report.total_mismatches,
        "rows": {name: dict(zip(columns, values, strict=True)) for name, *values in rows},
        "original": {"float": 71.9, "min-max, per tensor": 56.7, "histogram, per channel": 67.3, "trained": 71.5},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=8, help="of float training (default: %(default)s)")
    parser.add_argument("--qat-epochs", type=positive, default=4, help="of quantized training (default: %(default)s)")
    parser.add_argument("--width", type=float, default=0.5, help="width of the network (default: %(default)s)")
    add_data(parser, default="digits")
    parser.add_argument("--images", type=positive, help="only so many for training and so many for testing")
    parser.add_argument(
        "--efficientnet", type=positive, metavar="VIEWS", help="only EfficientNet-Lite0, on so many views"
    )
    parser.add_argument("--latency", action="store_true", help="only the time of the network for ImageNet")
    parser.add_argument("--seed", type=int, default=191009)
    add_json(parser)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    if options.latency:
        results = time_scripted()
    elif options.efficientnet:
        results = efficientnet(options.efficientnet)
    else:
        results = trained(options)
    write_results(options.json, options.seed, **results)


if __name__ == "__main__":
    main()
