"""`import qkernels` works everywhere, lightly, and a wrong QKERNELS_ISA is a clear error."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest

HEAVY = ["matplotlib", "sklearn", "skimage", "torchvision", "onnx", "onnxruntime", "scipy", "pandas", "tqdm.notebook"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avxvnni", "avx512vnni", "amx"])
def test_environment_caps_the_isa_and_never_raises_it(isa):
    code = (
        "import qkernels; from qkernels import _C; from qkernels.testing import ISAS; "
        f"assert ISAS.index(_C.isa_active()) <= ISAS.index('{isa}'), _C.isa_active(); print(_C.isa_active())"
    )
    result = run_python(code, QKERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr
    if isa == "scalar":
        assert result.stdout.strip() == "scalar"


@pytest.mark.parametrize("isa", ["avx999", "avx 2", "scalar,avx2"])
def test_unknown_isa_in_the_environment_is_refused_with_the_choices(isa):
    result = run_python("import qkernels", QKERNELS_ISA=isa)
    assert result.returncode != 0
    assert f"QKERNELS_ISA must be one of scalar, avx2, avxvnni, avx512vnni, amx, got '{isa}'" in result.stderr


@pytest.mark.parametrize("isa", ["SCALAR", " scalar\t", "Scalar "])
def test_the_isa_in_the_environment_may_be_in_any_case_and_have_blanks_around(isa):
    result = run_python("from qkernels import _C; print(_C.isa_active())", QKERNELS_ISA=isa)
    assert (result.stdout.strip(), result.stderr) == ("scalar", "")


@pytest.mark.parametrize("installed", [False, True])
def test_the_command_line_refuses_an_unknown_isa_in_one_line(installed, tmp_path):
    script = tmp_path / "qkernels"  # as pip writes it
    script.write_text("import sys\nfrom qkernels.cli import program\nsys.exit(program())\n")
    command = [sys.executable, *([script] if installed else ["-m", "qkernels"]), "info"]
    env = {**os.environ, "QKERNELS_ISA": "sse2", "PYTHONPATH": os.getcwd()}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 1
    wanted = "qkernels: QKERNELS_ISA must be one of scalar, avx2, avxvnni, avx512vnni, amx, got 'sse2'\n"
    assert (result.stdout, result.stderr) == ("", wanted)


def test_helpers_and_errors_are_there_after_one_import():
    result = run_python("import qkernels; qkernels.testing.isa_cap; qkernels.errors.QKernelsError")
    assert (result.returncode, result.stderr) == (0, "")


def test_import_needs_no_gpu():
    result = run_python("import torch, qkernels; assert not torch.cuda.is_available()", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_import_brings_in_nothing_heavy_beyond_torch():
    code = "import sys, torch; before = set(sys.modules); import qkernels; print(*(set(sys.modules) - before))"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    roots = {name.split(".")[0] for name in result.stdout.split()} | set(result.stdout.split())
    assert not roots & set(HEAVY)


def test_import_prints_nothing():
    result = run_python("import qkernels")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("package", ["qkernels", "qkernels.report"])
def test_no_function_shares_its_name_with_a_submodule(package):
    """Type checkers would take it for the module."""
    exported = importlib.import_module(package)
    functions = [name for name in exported.__all__ if not inspect.ismodule(getattr(exported, name))]
    submodules = {info.name for info in pkgutil.iter_modules(exported.__path__)}
    assert not submodules.intersection(functions)
