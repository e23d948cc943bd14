# ruff: noqa
# The script of a user of NNI 2.x, with every form that its documentation shows. A test reads `results`.
import torch
import torch.nn.functional as F
from nni.algorithms.compression.pytorch.quantization import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer
from nni.algorithms.compression.pytorch.quantization import ObserverQuantizer, QAT_Quantizer
from nni.compression.pytorch.quantization.settings import set_quant_scheme_dtype

results = {}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.relu1 = torch.nn.ReLU6()
        self.conv2 = torch.nn.Conv2d(16, 32, 3)
        self.relu2 = torch.nn.ReLU6()
        self.pool = torch.nn.MaxPool2d(2, 2)
        self.fc = torch.nn.Linear(32 * 3 * 3, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x)))
        return self.fc(x.flatten(1))


def train(model, optimizer, epochs=2):
    model.train()
    for _ in range(epochs):
        for x, y in zip(train_x.split(64), train_y.split(64)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def fresh(lr=0.02):
    torch.manual_seed(0)
    model = Model()
    model.load_state_dict(trained)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def keep(name, model, quantizer):
    model.eval()
    with torch.no_grad():
        logits = model(test_x)
    results[name] = {"logits": logits, "quantizer": quantizer, "model": model}


torch.manual_seed(0)
model = Model()
train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 6)
trained = model.state_dict()
keep("float", model, None)

# Naive
model, _ = fresh()
quantizer = NaiveQuantizer(model)
quantizer.compress()
keep("naive", model, quantizer)

# QAT, batch norms not folded, then folded
config_list = [{"quant_types": ["weight", "input"], "quant_bits": {"weight": 8, "input": 8}, "op_types": ["Conv2d"]}]
dummy_input = torch.rand(1, 1, 8, 8)
for name, options in (("qat", {}), ("qat folded", {"dummy_input": dummy_input})):
    model, optimizer = fresh()
    quantizer = QAT_Quantizer(model, config_list, optimizer, **options)
    quantizer.compress()
    train(model, optimizer)
    keep(name, model, quantizer)

# dtype and scheme, for all and one by one
set_quant_scheme_dtype("input", "per_tensor_affine", "uint")
set_quant_scheme_dtype("output", "per_tensor_symmetric", "int")
set_quant_scheme_dtype("weight", "per_channel_symmetric", "int")
model, optimizer = fresh()
everything = [
    {"quant_types": ["weight", "input", "output"], "quant_bits": 8, "op_types": ["default"]},
    {"op_names": ["conv2"], "exclude": True},
]
quantizer = QAT_Quantizer(model, everything, optimizer, dummy_input=dummy_input)
quantizer.compress()
train(model, optimizer)
keep("qat schemes for all", model, quantizer)

model, optimizer = fresh()
one_by_one = [
    {
        "quant_types": ["weight"],
        "quant_bits": 8,
        "op_types": ["Conv2d", "Linear"],
        "quant_dtype": "int",
        "quant_scheme": "per_channel_symmetric",
    },
    {
        "quant_types": ["output"],
        "quant_bits": 8,
        "quant_start_step": 7000,
        "op_types": ["ReLU6"],
        "quant_dtype": "uint",
        "quant_scheme": "per_tensor_affine",
    },
]
quantizer = QAT_Quantizer(model, one_by_one, optimizer, dummy_input=dummy_input)
quantizer.compress()
train(model, optimizer)
keep("qat schemes one by one", model, quantizer)

# DoReFa and BNN, inputs included; LSQ
for name, quantizer_class in (("dorefa", DoReFaQuantizer), ("bnn", BNNQuantizer)):
    model, optimizer = fresh()
    quantizer = quantizer_class(model, config_list, optimizer)
    quantizer.compress()
    train(model, optimizer)
    keep(name, model, quantizer)

model, optimizer = fresh()
quantizer = LsqQuantizer(model, config_list, optimizer, dummy_input=dummy_input)
quantizer.compress()
train(model, optimizer)
keep("lsq", model, quantizer)


# Observer
def calibration(model, calib_loader):
    model.eval()
    with torch.no_grad():
        for data in calib_loader:
            model(data)


model, _ = fresh()
model.eval()
quantizer = ObserverQuantizer(model, config_list)
calibration(model, train_x[:128].split(64))
quantizer.compress()
keep("observer", model, quantizer)
