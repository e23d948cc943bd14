"""The command line does what it says, and its exit status tells the truth."""

import json
import subprocess
import sys

import pytest

import qkernels
from qkernels import selftest
from qkernels.cli import main
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


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["frobnicate"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--threads", "0"], "--threads: must be at least 1"),
        (["bench", "--batch", "1,x"], "--batch: invalid"),
        (["bench", "--batch", "4,0"], "--batch: must be at least 1"),
        (["bench", "--model", "resnet19"], "bench: error: bench: 'resnet19' is n"),
        (["bench", "--peers", "tf"], "bench: error: bench: unknown peers ['tf']"),
        (["demo", "--data", "cats"], "demo: error: data: unknown data set 'cats'"),
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
