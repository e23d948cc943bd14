"""`python -m qkernels bench`: the table, the JSON and the picture of what is installed; and its own networks."""

import errno
import io
import json
import os
import sys

import pytest
import torch

from qkernels.bench import command
from qkernels.bench.engines import ENGINES, Case, int8_onnx
from qkernels.bench.harness import ISA_CAPS
from qkernels.bench.networks import NETWORKS, float_network
from qkernels.bench.table import against_best_int8_peer, table
from qkernels.cli import main
from qkernels.testing import ISAS

OURS = [name for name, engine in ENGINES.items() if not engine.peer]


def test_command_times_our_engines_and_writes_what_it_found(tmp_path, capfd):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--model", "mobilenet_v2", "--size", "32", "--rounds", "1", "--peers", "", "--json", str(out)]
    assert main(["bench", *arguments, "--plot", str(picture)]) == 0
    printed = capfd.readouterr().out
    written = json.loads(out.read_text())
    assert list(written["results"]["mobilenet_v2_b1"]) == OURS
    assert written["machine"]["cpu"]
    assert written["packages"]["torch"]
    assert written["threads"] == 1
    for name in OURS:
        assert written["results"]["mobilenet_v2_b1"][name]["ms_per_image"] > 0
        assert ENGINES[name].label in printed
    assert picture.stat().st_size > 5000
    again = tmp_path / "again.png"
    assert main(["bench", "--show", str(out), "--plot", str(again)]) == 0
    assert capfd.readouterr().out == printed
    assert again.read_bytes() == picture.read_bytes()


def test_a_file_that_is_no_run_is_refused(tmp_path, capsys):
    facts = '"machine": {"cpu": "a CPU"}, "threads": 1, "packages": {}'
    (tmp_path / "run.json").write_text('{"results": {}}')
    (tmp_path / "empty.json").write_text('{"results": {}, ' + facts + "}")
    (tmp_path / "stranger.json").write_text('{"results": {"net_b1": {"tflite": {"error": ""}}}, ' + facts + "}")
    for name in ("run.json", "empty.json", "stranger.json"):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "--show", str(tmp_path / name)])
        assert f"{name} is not what `bench --json` writes" in capsys.readouterr().err


ONE_RUN = {
    "results": {"net_b1": {"qkernels_plan": {"ms_per_image": 1.0}}},
    "machine": {"cpu": "a CPU"},
    "threads": 1,
    "packages": {},
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "{folder}"], "--json: must be a file"),
        (["--json", "{folder}/none/x.json"], "--json: must lie in a folder that can be written to"),
        (["--plot", "{folder}/none/x.png"], "--plot: must lie in a folder that can be written to"),
        (["--plot", "{folder}/x.foo"], "x.foo must be one of ['"),
        (["--plot", "{folder}/x"], "x must be one of ['"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    arguments, message, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "Worker", None)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *(word.format(folder=tmp_path) for word in arguments)])
    assert message in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(command, "Worker", None)
    run = tmp_path / "run.json"
    run.write_text(json.dumps(ONE_RUN))
    for arguments in ([], ["--show", str(run)]):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", *arguments, "--plot", str(tmp_path / "x.png")])
        assert "bench: error: a picture needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_a_file_that_fails_after_the_measurement_leaves_the_printed_table(tmp_path, capfd, monkeypatch):
    def full(path, payload):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(command, "write_json", full)
    monkeypatch.setattr(command, "measure", lambda *_: {name: {"median_us": 1000.0, "min_us": 1.0} for name in OURS})
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--model", "mobilenet_v2", "--peers", "", "--json", str(tmp_path / "x.json")])
    printed = capfd.readouterr()
    assert "qkernels plan" in printed.out
    assert "bench: error: [Errno 28]" in printed.err
    assert "Traceback" not in printed.err


def test_a_reader_that_left_does_not_take_the_numbers_away(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(command, "measure", lambda *_: {name: {"median_us": 1000.0, "min_us": 1.0} for name in OURS})
    out = tmp_path / "bench.json"
    assert main(["bench", "--model", "mobilenet_v2", "--peers", "", "--json", str(out)]) == 141
    assert list(json.loads(out.read_text())["results"]) == ["mobilenet_v2_b1"]


def test_ctrl_c_keeps_what_was_measured_and_leaves_no_worker(tmp_path, capfd, monkeypatch):
    started = []

    def measure(workers, setup, rounds):
        started[:] = workers
        if setup["batch"] == 2:
            raise KeyboardInterrupt
        return {name: {"median_us": 1000.0, "min_us": 1.0} for name in OURS}

    monkeypatch.setattr(command, "measure", measure)
    out = tmp_path / "bench.json"
    arguments = ["--model", "mobilenet_v2", "--batch", "1,2,4", "--peers", "", "--json", str(out)]
    assert main(["bench", *arguments]) == 130
    assert list(json.loads(out.read_text())["results"]) == ["mobilenet_v2_b1"]
    assert "1.000" in capfd.readouterr().out
    assert [worker.engine for worker in started] == OURS
    assert all(worker.process.poll() is not None for worker in started)


def test_every_instruction_set_but_scalar_can_be_asked_for():
    assert set(ISA_CAPS) == set(ISAS) - {"scalar"}


def test_an_instruction_set_that_the_machine_lacks_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(command, "supported_isas", lambda: ["scalar", "avx2"])
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--isa", "amx"])
    assert "isa must be one that this machine has, ['avx2'], got 'amx'" in capsys.readouterr().err


def test_engine_that_fails_is_reported_and_the_command_fails(capfd, monkeypatch):
    monkeypatch.setenv("QKERNELS_ISA", "sse2")  # the engines are processes of their own, which read it
    arguments = ["bench", "--model", "mobilenet_v2", "--size", "32", "--rounds", "1", "--peers", ""]
    assert main(arguments) == 1
    assert "qkernels_plan: the worker ended with code 1: qkernels: QKERNELS_ISA must be" in capfd.readouterr().out


def test_instruction_set_limits_every_engine_and_is_written_down(tmp_path, capfd):
    out = tmp_path / "bench.json"
    arguments = ["--model", "mobilenet_v2", "--size", "32", "--rounds", "1", "--peers", "ort", "--isa", "avx2"]
    assert main(["bench", *arguments, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["isa"] == "avx2"
    assert written["environment"]["QKERNELS_ISA"] == "avx2"
    assert written["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert list(written["results"]["mobilenet_v2_b1"]) == OURS
    assert "nothing limits it to avx2" in capfd.readouterr().err


def test_ratio_is_against_the_fastest_int8_peer():
    row = {
        "openvino_float": {"ms_per_image": 1.0},
        "openvino_int8": {"ms_per_image": 4.0},
        "torch_ao": {"ms_per_image": 5.0},
        "ort_int8": {"error": "too slow"},
        OURS[0]: {"ms_per_image": 3.0},
    }
    assert against_best_int8_peer(row, OURS[0]) == 0.75
    assert against_best_int8_peer({OURS[0]: {"ms_per_image": 3.0}}, OURS[0]) is None
    printed = table({"net_b1": row}, {"machine": {"cpu": "a CPU"}, "threads": 1, "packages": {}})
    assert "0.75" in printed
    assert "too slow" in printed


@pytest.mark.parametrize(("name", "parameters"), [("mobilenet_v2", 3504872), ("resnet18", 11689512),
                                                  ("resnet50", 25557032), ("efficientnet_lite0", 4652008)])  # fmt: skip
def test_networks_are_the_published_ones(name, parameters):
    model = float_network(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_every_network_of_the_list_is_tested():
    assert set(NETWORKS) == {"mobilenet_v2", "resnet18", "resnet50", "efficientnet_lite0"}


def test_peers_get_a_network_whose_convolutions_are_all_quantized(tmp_path):
    """The exporter shares biases between convolutions, and ONNX Runtime's quantization skips those."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(int8_onnx(Case("mobilenet_v2", 1, 32, 1), str(tmp_path)))
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 52
    for node in convolutions:
        assert [made_by.get(name) for name in node.input] == ["DequantizeLinear"] * 3, node.name
