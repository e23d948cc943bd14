"""The command line does what it says, and its exit status tells the truth."""

import io
import json
import subprocess
import sys

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels
from qkernels import demo, selftest
from qkernels.cli import main
from qkernels.errors import InvalidArgument
from qkernels.testing import isa_cap, supported_isas


def test_info_json_is_one_object_with_the_facts(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == qkernels.__version__
    assert facts["isa_supported"] == supported_isas()[-1]
    assert facts["kernels"].keys() >= {"fake_quant", "quantize"}


def test_info_shows_the_kernels_that_the_cap_leaves(capsys):
    with isa_cap("scalar"):
        assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "isa_active      scalar" in lines
    kernels = [line.split()[1] for line in lines[lines.index("kernels") + 1 :]]
    assert kernels
    assert not any("avx" in kernel for kernel in kernels)


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "qkernels", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == qkernels.__version__


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"qkernels {qkernels.__version__}\n"


def run_command(command: str) -> subprocess.CompletedProcess:
    program = f"{sys.executable} -m qkernels"
    return subprocess.run(["bash", "-c", command.format(program)], capture_output=True, text=True)


def test_a_reader_that_leaves_is_no_error():
    done = run_command("{} info | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_cannot_be_written_is_one_line():
    done = run_command("{} info > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "python -m qkernels info: error: [Errno 28] No space left on device\n"


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "run", interrupted)
    assert main(["selftest"]) == 130
    assert capsys.readouterr().err == ""


def test_an_unknown_instruction_set_is_a_typed_error():
    with pytest.raises(InvalidArgument, match=r"isa_cap: name must be one of .*, got 'avx'"), isa_cap("avx"):
        pass


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["frobnicate"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--threads", "0"], "--threads: must be a whole number of at least 1, got '0'"),
        (["bench", "--batch", ""], "--batch: must be a whole number of at least 1, got ''"),
        (["bench", "--batch", "1,,2"], "--batch: must be a whole number of at least 1, got ''"),
        (["bench", "--batch", "4,0"], "--batch: must be a whole number of at least 1, got '0'"),
        (["demo", "--epochs", "x"], "--epochs: must be a whole number of at least 1, got 'x'"),
        (["bench", "--model", "resnet18,"], "--model: must be names separated by commas, got 'resnet18,'"),
        (["bench", "--peers", "torch,,ort"], "--peers: must be names separated by commas, got 'torch,,ort'"),
        (["bench", "--model", "resnet19"], "bench: error: bench: 'resnet19' is n"),
        (["bench", "--peers", "tf"], "bench: error: bench: unknown peers ['tf']"),
        (["demo", "--data", "cats"], "demo: error: data: unknown data set 'cats'"),
        (["demo", "--root", "/nowhere"], "demo: error: data: no fashion-mnist idx files in /nowhere"),
        (["demo", "--out", "/nowhere/x.png"], "--out: must lie in a folder that can be written to"),
        (["demo", "--json", "/dev/null"], "--json: must be a file"),
        (["bench", "--show", "/nowhere/x.json"], "--show: must be a file that exists, got '/nowhere/x.json'"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_selftest_checks_every_operation_under_every_isa(capsys):
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checked = {tuple(line.split()[:2]) for line in lines[:-1]}
    assert checked == {(name, isa) for name in selftest._CHECKS for isa in supported_isas()}
    assert "all agree" in lines[-1]


def test_selftest_calls_every_kernel_that_info_names(capsys):
    called = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.name().removeprefix("qkernels::").removesuffix("_out"))
            return function(*args, **(kwargs or {}))

    with Spy():
        assert main(["selftest"]) == 0
    capsys.readouterr()
    inside = {"conv_depthwise": "conv", "conv_winograd": "conv", "observe": "observe_minmax"}
    named = {inside.get(name, name) for name in qkernels.info()["kernels"]}
    assert named - called == {"quantize_image"}  # a step of plans, which are no ops of torch's


def test_selftest_fails_when_one_bit_differs(capsys, monkeypatch):
    right = qkernels.reference.lookup

    def wrong(q, table):
        out = right(q, table).clone()
        out[(0,) * out.dim()] ^= 1
        return out

    monkeypatch.setattr(qkernels.reference, "lookup", wrong)
    assert main(["selftest"]) == 1
    assert "8 DIFFER" in capsys.readouterr().out  # one in each of the eight lookups


def test_the_demo_runs_end_to_end_on_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    numbers, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    arguments = ["demo", "--data", "digits", "--epochs", "1", "--out", str(picture), "--json", str(numbers)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for word in ("accuracy", "float32", "torch.ao int8", "qkernels int8", "SQNR"):
        assert word in out
    facts = json.loads(numbers.read_text())
    assert facts["mismatches"] == 0
    ours, float32 = facts["rows"][2], facts["rows"][0]
    assert ours["bytes"] < float32["bytes"] / 3
    assert abs(ours["accuracy"] - float32["accuracy"]) < 0.03
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_leaves_a_peer_out_that_does_not_run(short_demo, monkeypatch, tmp_path, capsys):
    row = {"engine": "any", "accuracy": 0.9, "bytes": 1000, "latency_ms": {"1": 1.0, "64": 9.0}}
    broken = {"torch_ao"}

    def measure(engine, folder):
        if engine in broken:
            raise demo.EngineError(f"demo: the engine {engine} failed:\nTraceback\nModuleNotFoundError: no such module")
        return row

    monkeypatch.setattr(demo, "_measure", measure)
    arguments = ["demo", "--data", "digits", "--json", str(tmp_path / "demo.json"), "--out", str(tmp_path / "demo.png")]
    assert main(arguments) == 0
    assert "torch.ao int8 is left out: ModuleNotFoundError: no such module" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "demo.json").read_text())["rows"]) == 2
    broken.add("qkernels")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "the engine qkernels failed" in capsys.readouterr().err


@pytest.fixture
def short_demo(monkeypatch):
    """The demo without training and without the other engines."""
    pytest.importorskip("sklearn")
    row = {"engine": "float32", "accuracy": 0.9, "bytes": 1000, "latency_ms": {"1": 1.0, "64": 9.0}}
    monkeypatch.setattr(demo, "train", lambda model, images, epochs: model.eval())
    monkeypatch.setattr(demo, "_measure", lambda engine, folder: row)


def test_the_demo_without_matplotlib_leaves_the_picture_out_and_says_so(short_demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    numbers, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    assert main(["demo", "--data", "digits", "--out", str(picture), "--json", str(numbers)]) == 0
    assert "picture     left out: a picture needs matplotlib" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["mismatches"] == 0
    assert not picture.exists()


def test_a_picture_that_fails_leaves_the_demos_numbers(short_demo, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(demo, "plot_demo", full)
    numbers = tmp_path / "demo.json"
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--data", "digits", "--out", str(tmp_path / "demo.png"), "--json", str(numbers)])
    printed = capsys.readouterr()
    assert "float32" in printed.out
    assert "demo: error: no space" in printed.err
    assert json.loads(numbers.read_text())["mismatches"] == 0


def test_the_demo_refuses_an_ending_that_is_no_picture_before_it_trains(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--data", "digits", "--out", str(tmp_path / "demo.foo")])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "demo.foo must be one of" in printed.err


def test_the_demo_speaks_at_once_in_a_pipe(short_demo, monkeypatch, tmp_path):
    class Pipe(io.StringIO):
        waiting = ""

        def write(self, text):
            Pipe.waiting += text
            return super().write(text)

        def flush(self):
            Pipe.waiting = ""

    def training(model, images, epochs):
        assert Pipe.waiting == ""
        model.eval()

    monkeypatch.setattr(demo, "train", training)
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert main(["demo", "--data", "digits", "--out", str(tmp_path / "demo.png")]) == 0
    assert "training and" in sys.stdout.getvalue()
