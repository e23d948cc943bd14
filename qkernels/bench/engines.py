"""What runs a network: float torch, the int8 engines of others, and qkernels as modules and as a plan.

Every int8 engine quantizes activations per tensor to uint8 and weights per channel to int8, calibrated on the same
random batches. Each builder returns a call without arguments; it runs in a worker process of its own.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import qkernels
from qkernels.bench.networks import float_network, images

CALIBRATION_BATCHES = 2
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One network at one size, as a worker is asked for it."""

    model: str
    batch: int
    size: int
    threads: int

    def input(self) -> Tensor:
        return images(self.batch, self.size)

    def calibration(self, batch: int = 1) -> list[Tensor]:
        return [images(batch, self.size, seed) for seed in range(1, 1 + CALIBRATION_BATCHES)]


@dataclass(frozen=True)
class Engine:
    """A row of the table. `packages` must be installed; `peer` is its name on the command line, "" for ourselves."""

    label: str
    peer: str
    int8: bool
    packages: tuple[str, ...]
    build: Callable[[Case], Call]

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def _inference(model: nn.Module, x: Tensor) -> Call:
    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def _float_torch(layout: torch.memory_format) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        model = float_network(case.model).to(memory_format=layout)
        return _inference(model, case.input().contiguous(memory_format=layout))

    return build


def _torch_ao(case: Case) -> Call:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    batches = case.calibration()
    prepared = prepare_fx(float_network(case.model), get_default_qconfig_mapping("x86"), (batches[0],))
    with torch.no_grad():
        for x in batches:
            prepared(x)
    return _inference(convert_fx(prepared), case.input().contiguous(memory_format=torch.channels_last))


def _float_onnx(case: Case, directory: str) -> str:
    path = os.path.join(directory, "float.onnx")
    torch.onnx.export(
        float_network(case.model), (case.input(),), path, input_names=["x"], opset_version=17, dynamo=False
    )
    return path


def int8_onnx(case: Case, directory: str) -> str:
    """The network with quantize/dequantize pairs, by ONNX Runtime's own static quantization.

    Its pre-processing comes first: without it the exporter's shared biases keep convolutions in float.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter({"x": x.numpy()} for x in case.calibration(case.batch))

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared, path = os.path.join(directory, "prepared.onnx"), os.path.join(directory, "int8.onnx")
    quant_pre_process(_float_onnx(case, directory), prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def _onnxruntime(case: Case) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    with tempfile.TemporaryDirectory() as directory:
        path = int8_onnx(case, directory)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(case.input().numpy()))
    binding.bind_output(session.get_outputs()[0].name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def _openvino(onnx_file: Callable[[Case, str], str]) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if onnx_file is _float_onnx:
            settings["INFERENCE_PRECISION_HINT"] = "f32"  # it would choose bfloat16 by itself
        with tempfile.TemporaryDirectory() as directory:
            compiled = core.compile_model(core.read_model(onnx_file(case, directory)), "CPU", settings)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(case.input().numpy().copy()))
        return request.infer

    return build


def _converted(case: Case) -> nn.Module:
    batches = case.calibration()
    prepared = qkernels.prepare(float_network(case.model), (batches[0],))
    with qkernels.calibrating(prepared), torch.no_grad():
        for x in batches:
            prepared(x)
    return qkernels.convert(prepared)


def _modules(case: Case) -> Call:
    return _inference(_converted(case), case.input().contiguous(memory_format=torch.channels_last))


def _plan(case: Case) -> Call:
    return _inference(qkernels.compile(_converted(case), case.input()), case.input())


_ONNX = ("onnx", "onnxruntime")
ENGINES = {
    "torch_float": Engine("torch float, eager", "torch", False, (), _float_torch(torch.contiguous_format)),
    "torch_channels_last": Engine("torch float, channels_last", "torch", False, (), _float_torch(torch.channels_last)),
    "openvino_float": Engine("OpenVINO float32", "openvino", False, ("openvino", "onnx"), _openvino(_float_onnx)),
    "torch_ao": Engine("torch.ao x86 int8", "torch", True, (), _torch_ao),
    "ort_int8": Engine("ONNX Runtime int8", "ort", True, _ONNX, _onnxruntime),
    "openvino_int8": Engine("OpenVINO int8", "openvino", True, ("openvino", *_ONNX), _openvino(int8_onnx)),
    "qkernels_modules": Engine("qkernels modules", "", True, (), _modules),
    "qkernels_plan": Engine("qkernels plan", "", True, (), _plan),
}
PEERS = ("torch", "ort", "openvino")
