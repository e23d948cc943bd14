"""Times whole networks: float torch, torch.ao's x86 int8 engine, ONNX Runtime and OpenVINO int8, and qkernels.

    python bench/python/bench_models.py --models mobilenet_v2,resnet18,resnet50 --json bench/results/models.json

The networks are torchvision's definitions with random weights (time does not depend on them); every engine quantizes
activations per tensor to uint8 and weights per channel to int8, calibrated on the same random batches.
"""

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Worker, measure, serve, write_json

ENGINES = ("qkernels", "torch_eager", "torch_channels_last", "torch_ao_x86", "ort_int8", "openvino_int8")
MODELS = ("mobilenet_v2", "resnet18", "resnet50")
IMAGE = 224


def float_model(name: str):
    import torch
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval()


def calibration_batches(batch: int):
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, IMAGE, IMAGE, generator=generator) for _ in range(2)]


def inference(model, x) -> Callable[[], object]:
    import torch

    def run():
        with torch.inference_mode():
            return model(x)

    return run


def build_torch(name: str, batch: int, channels_last: bool) -> Callable[[], object]:
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = calibration_batches(batch)[0].contiguous(memory_format=layout)
    return inference(float_model(name).to(memory_format=layout), x)


def build_torch_ao(name: str, batch: int) -> Callable[[], object]:
    import torch
    import torch.ao.quantization as tq
    import torchvision

    torch.backends.quantized.engine = "x86"
    torch.manual_seed(0)
    model = getattr(torchvision.models.quantization, name)(weights=None, quantize=False).eval()
    model.fuse_model()
    model.qconfig = tq.get_default_qconfig("x86")
    prepared = tq.prepare(model)
    for x in calibration_batches(1):
        prepared(x)
    converted = tq.convert(prepared)
    return inference(converted, calibration_batches(batch)[0].contiguous(memory_format=torch.channels_last))


def build_qkernels(name: str, batch: int) -> Callable[[], object]:
    import torch

    import qkernels

    batches = calibration_batches(1)
    prepared = qkernels.prepare(float_model(name), (batches[0],))
    with qkernels.calibrating(prepared), torch.no_grad():
        for x in batches:
            prepared(x)
    converted = qkernels.convert(prepared)
    return inference(converted, calibration_batches(batch)[0].contiguous(memory_format=torch.channels_last))


def quantized_onnx(name: str, batch: int, directory: str) -> str:
    """The network as ONNX with quantize/dequantize pairs, by ONNX Runtime's own static quantization."""
    import torch
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter({"x": x.numpy()} for x in calibration_batches(batch))

        def get_next(self):
            return next(self.batches, None)

    plain, quantized = f"{directory}/float.onnx", f"{directory}/int8.onnx"
    torch.onnx.export(
        float_model(name), (calibration_batches(batch)[0],), plain, input_names=["x"], opset_version=17, dynamo=False
    )
    quantize_static(
        plain,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


def build_ort(name: str, batch: int, threads: int) -> Callable[[], object]:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as directory:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        path = quantized_onnx(name, batch, directory)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(calibration_batches(batch)[0].numpy()))
    binding.bind_output(session.get_outputs()[0].name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def build_openvino(name: str, batch: int, threads: int) -> Callable[[], object]:
    import openvino as ov

    with tempfile.TemporaryDirectory() as directory:
        core = ov.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        compiled = core.compile_model(core.read_model(quantized_onnx(name, batch, directory)), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(copy.deepcopy(calibration_batches(batch)[0].numpy())))
    return request.infer


def build_case(engine: str, threads: int, message: dict) -> Callable[[], object]:
    name, batch = message["model"], message["batch"]
    if engine == "qkernels":
        return build_qkernels(name, batch)
    if engine == "ort_int8":
        return build_ort(name, batch, threads)
    if engine == "openvino_int8":
        return build_openvino(name, batch, threads)
    if engine == "torch_ao_x86":
        return build_torch_ao(name, batch)
    return build_torch(name, batch, channels_last=engine == "torch_channels_last")


def run_worker(engine: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    serve(lambda message: build_case(engine, threads, message))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--onednn-isa", default="", help="ONEDNN_MAX_CPU_ISA of torch and OpenVINO, e.g. AVX512_CORE_VNNI"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(args.worker, args.threads)
        return

    engines = args.engines.split(",")
    env = {"ONEDNN_MAX_CPU_ISA": args.onednn_isa} if args.onednn_isa else {}
    workers = [Worker(os.path.abspath(__file__), engine, args.threads, env) for engine in engines]
    results = {}
    print(f"{'ms an image':22s}" + "".join(f"{engine:>20s}" for engine in engines))
    for name in args.models.split(","):
        for batch in map(int, args.batches.split(",")):
            row = measure(workers, {"model": name, "batch": batch}, args.rounds)
            for cell in row.values():
                if "median_us" in cell:
                    cell["ms_per_image"] = cell["median_us"] / 1e3 / batch
            results[f"{name}_b{batch}"] = row
            cells = "".join(
                f"{row[e]['ms_per_image']:20.3f}" if "ms_per_image" in row[e] else f"{'-':>20s}" for e in engines
            )
            print(f"{name + ' batch ' + str(batch):22s}{cells}", flush=True)
            for engine, cell in row.items():
                if "error" in cell:
                    print(f"  {engine}: {cell['error']}")
    for worker in workers:
        worker.close()
    if args.json:
        payload = {"threads": args.threads, "rounds": args.rounds, "onednn_isa": args.onednn_isa, "results": results}
        write_json(args.json, payload)


if __name__ == "__main__":
    main()
