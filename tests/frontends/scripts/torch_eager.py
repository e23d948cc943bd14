# ruff: noqa
# A script of a user of torch.ao.quantization: after training, in training, saved as TorchScript. A test reads `results`.
import os
import tempfile

import torch
import torch.nn as nn
from torch.ao.quantization import DeQuantStub, QuantStub

torch.manual_seed(191009)
folder = tempfile.mkdtemp()
results = {}


class ConvBNReLU(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=3, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        super(ConvBNReLU, self).__init__(conv, nn.BatchNorm2d(outputs, momentum=0.1), nn.ReLU(inplace=False))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, ratio):
        super(InvertedResidual, self).__init__()
        hidden = inputs * ratio
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            ConvBNReLU(inputs, hidden, kernel=1),
            ConvBNReLU(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, 1, 0, bias=False),
            nn.BatchNorm2d(outputs, momentum=0.1),
        )
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, x):
        if self.adds:
            return self.skip_add.add(x, self.conv(x))
        else:
            return self.conv(x)


class Net(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
        blocks = [InvertedResidual(*block) for block in [(16, 16, 1, 2), (16, 24, 2, 4), (24, 24, 1, 4)]]
        self.features = nn.Sequential(ConvBNReLU(1, 16, stride=2), *blocks, ConvBNReLU(24, 96, kernel=1))
        self.quant = QuantStub()
        self.dequant = DeQuantStub()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(96, 10))

    def forward(self, x):
        x = self.quant(x)
        x = self.features(x)
        x = x.mean([2, 3])
        x = self.classifier(x)
        x = self.dequant(x)
        return x

    def fuse_model(self, is_qat=False):
        fuse_modules = torch.ao.quantization.fuse_modules_qat if is_qat else torch.ao.quantization.fuse_modules
        for m in self.modules():
            if type(m) == ConvBNReLU:
                fuse_modules(m, ["0", "1", "2"], inplace=True)
            if type(m) == InvertedResidual:
                for idx in range(len(m.conv)):
                    if type(m.conv[idx]) == nn.Conv2d:
                        fuse_modules(m.conv, [str(idx), str(idx + 1)], inplace=True)


def evaluate(name, model):
    model.eval()
    with torch.no_grad():
        results[name] = torch.cat([model(x) for x in test_x.split(50)])


def train_one_epoch(model, optimizer, lr=None):
    model.train()
    for x, y in zip(train_x.split(50), train_y.split(50)):
        loss = nn.CrossEntropyLoss()(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def load_model():
    model = Net()
    model.load_state_dict(torch.load(os.path.join(folder, "float.pth")))
    return model.to("cpu")


def size_of_model(model):
    torch.save(model.state_dict(), os.path.join(folder, "temp.p"))
    return os.path.getsize(os.path.join(folder, "temp.p"))


float_model = Net()
optimizer = torch.optim.Adam(float_model.parameters(), lr=3e-3)
for _ in range(4):
    train_one_epoch(float_model, optimizer)
torch.save(float_model.state_dict(), os.path.join(folder, "float.pth"))
float_model.eval()
float_model.fuse_model()
print("fused", float_model.features[1].conv)
evaluate("float", float_model)
torch.jit.save(torch.jit.script(float_model), os.path.join(folder, "float_scripted.pth"))
evaluate("float scripted", torch.jit.load(os.path.join(folder, "float_scripted.pth")))

for name, qconfig in (
    ("per tensor", torch.ao.quantization.default_qconfig),
    ("per channel", torch.ao.quantization.get_default_qconfig("x86")),
):
    my_model = load_model()
    my_model.eval()
    my_model.fuse_model()
    my_model.qconfig = qconfig
    print(my_model.qconfig)
    torch.ao.quantization.prepare(my_model, inplace=True)
    print("prepared", my_model.features[1].conv)
    with torch.no_grad():
        my_model(train_x[:200])
    torch.ao.quantization.convert(my_model, inplace=True)
    print("converted", my_model.features[1].conv)
    evaluate(name, my_model)
    print("Size", size_of_model(my_model))
torch.jit.save(torch.jit.script(my_model), os.path.join(folder, "quantized_scripted.pth"))
evaluate("per channel scripted", torch.jit.load(os.path.join(folder, "quantized_scripted.pth")))

qat_model = load_model()
qat_model.fuse_model(is_qat=True)
optimizer = torch.optim.SGD(qat_model.parameters(), lr=0.001)
qat_model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
torch.ao.quantization.prepare_qat(qat_model, inplace=True)
print("prepared for training", qat_model.features[1].conv)
for nepoch in range(3):
    train_one_epoch(qat_model, optimizer)
    if nepoch > 1:
        qat_model.apply(torch.ao.quantization.disable_observer)
    if nepoch > 0:
        qat_model.apply(torch.nn.intrinsic.qat.freeze_bn_stats)
    quantized_model = torch.ao.quantization.convert(qat_model.eval(), inplace=False)
    quantized_model.eval()
    evaluate("trained " + str(nepoch), quantized_model)
