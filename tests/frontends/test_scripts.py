"""Scripts written for other packages run here with other import lines, and lead where they led there."""

import json
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels.data import load_images
from qkernels.frontends import nni_v2

FOLDER = Path(__file__).parent / "scripts"
pytestmark = pytest.mark.filterwarnings("ignore")

# The only lines that change.
TORCH = {
    "import torch\n": "from qkernels.frontends.torch_ao import torch\n",
    "from torch.ao.quantization import": "from qkernels.frontends.torch_ao import",
}
AIMET = {
    "import aimet_torch.v2 as aimet": "import qkernels.frontends.aimet as aimet",
    "from aimet_torch import": "from qkernels.frontends.aimet import",
    "from aimet_torch.v2 import": "from qkernels.frontends.aimet import",
}
NNI = {
    "import nni\n": "import qkernels.frontends.nni as nni\n",
    "from nni.common.types import": "from qkernels.frontends.nni import",
    "from nni.contrib.compression.quantization import": "from qkernels.frontends.nni import",
    "from nni.contrib.compression.utils import": "from qkernels.frontends.nni import",
    "from torchvision import": "from local_mnist import",  # where the data comes from
    "from torchvision.datasets import": "from local_mnist import",
}
NNI_2 = {
    "from nni.algorithms.compression.pytorch.quantization import B": "from qkernels.frontends.nni_v2 import B",
    "from nni.algorithms.compression.pytorch.quantization import O": "from qkernels.frontends.nni_v2 import O",
    "from nni.compression.pytorch.quantization.settings import": "from qkernels.frontends.nni_v2 import",
}


def run(script, imports, tmp_path):
    """The names of the script after it ran with these import lines replaced, on real digits."""
    lines = (FOLDER / script).read_text().splitlines(keepends=True)
    for old, new in imports.items():
        [i] = [i for i, line in enumerate(lines) if line.startswith(old)]
        lines[i] = lines[i].replace(old, new)
    path = tmp_path / script  # TorchScript reads source files
    path.write_text("".join(lines))
    images = load_images("digits")
    names = {"__name__": "script", "train_x": images.train_x, "train_y": images.train_y, "test_x": images.test_x}
    exec(compile("".join(lines), str(path), "exec"), names)
    return names["results"], images.test_y


@pytest.fixture(autouse=True)
def one_thread():
    engine, threads = torch.backends.quantized.engine, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = engine


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def agreement(mine, theirs):
    return (mine.argmax(1) == theirs.argmax(1)).double().mean().item()


def test_torch_eager_script(tmp_path, capsys):
    theirs, labels = run("torch_eager.py", {}, tmp_path)
    mine, _ = run("torch_eager.py", TORCH, tmp_path)
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine["float"], theirs["float"], rtol=0, atol=1e-4)  # we fold in float64
    assert torch.equal(mine["float scripted"], mine["float"])
    assert torch.equal(mine["per channel scripted"], mine["per channel"])
    for name in ("per tensor", "per channel"):
        assert agreement(mine[name], theirs[name]) > 0.99
    for name in [name for name in mine if name.startswith("trained")]:
        assert accuracy(mine[name], labels) > accuracy(theirs[name], labels) - 0.01
    assert accuracy(mine["trained 2"], labels) > 0.9
    assert "QConv" in capsys.readouterr().out


def test_aimet_script(tmp_path, capsys):
    mine, labels = run("aimet_quickstart.py", AIMET, tmp_path)
    assert torch.equal(mine["prepared"], mine["float"])
    assert "(weight): QuantizeDequantize(shape=[16, 1, 1, 1], bitwidth=4, symmetric=True)" in capsys.readouterr().out
    assert accuracy(mine["trained"], labels) > 0.9
    converted = mine["sim"].convert()
    x = load_images("digits").test_x
    assert qkernels.verify(mine["sim"].prepared(), converted, [x]).total_mismatches == 0
    with torch.no_grad():
        assert agreement(converted(x), mine["trained"]) > 0.99
    assert json.loads((Path(mine["folder"]) / "model.encodings").read_text())["param_encodings"]


def test_aimet_script_leads_where_the_original_led(tmp_path):
    pytest.importorskip("aimet_torch", reason="needs aimet-torch and torchvision", exc_type=ImportError)
    theirs, _ = run("aimet_quickstart.py", {}, tmp_path)
    mine, _ = run("aimet_quickstart.py", AIMET, tmp_path)
    assert torch.equal(mine["float"], theirs["float"])
    for name, bound in (("simulated", 1e-4), ("trained", 2e-2)):
        assert (mine[name] - theirs[name].as_subclass(torch.Tensor)).abs().max() < bound


def test_nni_quickstart_script(tmp_path, capsys):
    mine, _ = run("nni_quickstart.py", NNI, tmp_path)
    shown = capsys.readouterr().out
    assert "defaultdict(<class 'dict'>, {'conv1': {'weight': {'scale': tensor(" in shown
    assert "'zero_point': tensor(-127.), 'quant_dtype': 'int8', 'quant_scheme': 'affine', 'quant_bits': 8, " in shown
    assert set(mine["calibration"]) == {"conv1", "conv2", "fc1", "fc2", "relu1", "relu2", "relu3"}
    assert mine["accuracy"] > 0.9
    quantizer, x = mine["quantizer"], torch.randn(16, 1, 28, 28)
    converted = quantizer.convert()
    assert qkernels.verify(quantizer.prepared(), converted, [x]).total_mismatches == 0
    assert agreement(converted(x), mine["model"](x)) == 1


def test_nni_quantizers_script(tmp_path, monkeypatch):
    monkeypatch.setattr(nni_v2, "_defaults", dict(nni_v2._defaults))
    mine, labels = run("nni_quantizers.py", NNI_2, tmp_path)
    x = load_images("digits").test_x
    reached = {name: accuracy(result["logits"], labels) for name, result in mine.items()}
    # Two epochs are nothing for signs, with no batch norm behind the second convolution.
    assert min(share for name, share in reached.items() if name != "bnn") > 0.93, reached
    for name, result in [(name, result) for name, result in mine.items() if name != "float"]:
        quantizer, model = result["quantizer"], result["model"]
        prepared = quantizer.prepared(x[:1])
        converted = quantizer.convert(x[:1])
        assert qkernels.verify(prepared, converted, [x[:32]]).total_mismatches == 0
        # Sums simulated in float32 may round to the neighbouring code (which do depends on the CPU: 0.987 were equal on
        # the worst one seen); waiting for 7000 steps, nothing was rounded yet.
        difference = (converted(x) - result["logits"]).abs()
        assert name == "qat schemes one by one" or (difference < 1e-3).float().mean() > 0.98
        assert agreement(converted(x), result["logits"]) > 0.99
        quantizer.export_model(str(tmp_path / "model.pth"), str(tmp_path / "calibration.pth"))
        assert torch.load(tmp_path / "model.pth").keys() == mine["float"]["model"].state_dict().keys()
        assert type(model.bn1) is torch.nn.BatchNorm2d
