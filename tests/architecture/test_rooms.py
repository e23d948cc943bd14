"""The three rooms: who may include, import and name what. docs/architecture.md gives the reasons.

Each rule is a function from (path, text) to complaints; it is run over the repository and over small offences that it
must find.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# ---- C++ -------------------------------------------------------------------------------------------------------------

# An operation's folder includes csrc/base, its own files, and the folders named here.
FRIENDS = {
    "batch_norm": {"fake_quant", "quantize"},
    "conv": {"gemm", "image", "pointwise"},
    "fake_quant": {"quantize"},
    "fake_quant_backward": {"quantize"},
    "gemm": {"pointwise", "quantize"},
    "linear_rows": {"gemm"},
    "quantize_rows": {"observe", "quantize"},
    "image": {"quantize"},
    "plan": {"conv", "gemm", "image", "pointwise", "pool", "quantize"},
    "dorefa": {"fake_quant", "fake_quant_backward", "observe", "quantize"},
    "fake_quant_mask": {"fake_quant", "quantize"},
    "foreach": {"fake_quant", "fake_quant_backward", "observe", "quantize"},
    "observe": {"fake_quant", "quantize"},
}

# Threads, streams and exceptions belong to the caller.
CSRC_FORBIDDEN_HEADERS = {
    "iostream", "ostream", "sstream", "fstream", "cstdio", "stdio.h", "thread", "mutex", "condition_variable", "future",
    "stdexcept", "exception", "random", "iomanip",
}  # fmt: skip
CSRC_FORBIDDEN_WORDS = r"\b(throw|try|catch|printf|fprintf|puts|abort|exit|cudaMalloc|cudaDeviceSynchronize|omp)\b"
CUDA_HEADERS = {"cuda.h", "cuda_runtime.h", "cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h"}
CSRC_SYSTEM_HEADERS = {"immintrin.h", "cpuid.h", *CUDA_HEADERS}
MACHINE_FACTS = {"csrc/base/cpu.cc": {"unistd.h", "sys/syscall.h"}}  # the only file that asks the operating system
SEAM_TORCH_HEADERS = r"torch/(csrc/stable|headeronly)/.*|torch/csrc/inductor/aoti_torch/c/shim\.h"
PYBIND11_FILES = {"python/pybind.h", "python/module.cpp", "python/plan.h"}
ISA_KNOWLEDGE = r"immintrin|__AVX|has_features|cpu_features|\bkCpu\w+|\bIsa::|target\(|_mm\d*_"


def strip_comments(text: str) -> str:
    """Without comments and string contents (includes keep theirs); line numbers stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|(?P<include>#include[^\n]*)|"(?:\\.|[^"\\\n])*"'

    def replace(match: re.Match) -> str:
        if match.group("include"):
            return match.group().split("//")[0]
        return '""' if match.group().startswith('"') else "\n" * match.group().count("\n")

    return re.sub(pattern, replace, text, flags=re.DOTALL)


def includes(text: str) -> list[tuple[str, str]]:
    """(bracket, path) of each include."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', strip_comments(text), re.MULTILINE)


def csrc_complaints(path: str, text: str) -> list[str]:
    complaints = []
    folder = Path(path).parts[1]
    allowed = {folder, "base"} | (FRIENDS.get(folder, set()) if folder != "base" else set())
    for bracket, header in includes(text):
        if bracket == '"':
            parts = Path(header).parts
            if parts[0] != "csrc" or len(parts) < 3 or parts[1] not in allowed:
                complaints.append(f"{path} includes {header}; it may include csrc/{{{', '.join(sorted(allowed))}}}")
        elif header in CSRC_FORBIDDEN_HEADERS:
            complaints.append(f"{path} includes <{header}>: threads, streams and exceptions are the caller's")
        elif not re.fullmatch(r"[a-z_0-9]+", header) and header not in CSRC_SYSTEM_HEADERS | MACHINE_FACTS.get(
            path, set()
        ):
            complaints.append(f"{path} includes <{header}>: csrc sees the standard library and intrinsics only")
    for word in re.findall(CSRC_FORBIDDEN_WORDS, strip_comments(text)):
        complaints.append(f"{path} uses {word}")
    return complaints


def isa_file_complaints(path: str, text: str) -> list[str]:
    """Wide instructions live in x86_*.cc, in one target region that starts after the last include."""
    code = strip_comments(text)
    begins, ends = code.count("QK_TARGET_BEGIN("), code.count("QK_TARGET_END")
    if path == "csrc/base/target.h":
        return []
    if not re.search(r"/(\w+_)?x86_[a-z0-9_]+\.(cc|h|inc)$", path):
        return [f"{path} opens a target region or includes immintrin.h; its name must say x86_<isa>"] * (
            begins > 0 or "immintrin.h" in code
        )
    if not path.endswith(".cc"):
        return []
    complaints = []
    if begins != 1 or ends != 1:
        complaints.append(f"{path} must open and close exactly one target region, found {begins} and {ends}")
    else:
        for _, header in includes(code[code.index("QK_TARGET_BEGIN(") :]):
            # A fragment of a kernel may follow the opening; a header that brings others must not.
            if not header.startswith("csrc/") or includes((ROOT / header).read_text()):
                complaints.append(f"{path} includes {header} inside the target region")
    return complaints


def seam_complaints(path: str, text: str) -> list[str]:
    complaints = []
    code = strip_comments(text)
    in_cuda = path.startswith("python/cuda/")
    for _, header in includes(text):
        fine = (
            (header.startswith(("csrc/", "python/")) and header != "python/pybind.h")
            or re.fullmatch(r"[a-z_0-9]+", header)
            or re.fullmatch(SEAM_TORCH_HEADERS, header)
            or (header.startswith(("pybind11/", "python/pybind.h")) and path in PYBIND11_FILES)
            or (header == "cuda_runtime_api.h" and in_cuda)
            or (header == "pthread.h" and path == "python/fork.cpp")
        )
        if not fine:
            complaints.append(f"{path} includes {header}: the seam sees csrc and torch's stable ABI only")
    if "STABLE_TORCH_LIBRARY(" in code and path != "python/schema.cpp":
        complaints.append(f"{path} defines schemas; they all live in python/schema.cpp")
    if "PYBIND11_MODULE" in code and path != "python/module.cpp":
        complaints.append(f"{path} defines a pybind11 module; python/module.cpp is the only one")
    if path != "python/module.cpp":
        complaints += [f"{path} knows about instruction sets: {word}" for word in re.findall(ISA_KNOWLEDGE, code)]
    return complaints


def file_ending_complaints(path: str, text: str) -> list[str]:
    endings = {"csrc": {".h", ".cc", ".cu", ".cuh", ".inc", ".md", ".txt"}, "python": {".h", ".cpp", ".md"}}
    room = Path(path).parts[0]
    if room in endings and Path(path).suffix not in endings[room]:
        return [f"{path}: a file of {room}/ ends in one of {sorted(endings[room])}"]
    cplusplus = room in ("csrc", "python", "tests", "bench") or path.startswith("examples/cpp/")
    if not cplusplus and Path(path).suffix in {".cc", ".cpp", ".cu", ".cuh"}:
        return [f"{path}: C++ lives in csrc/ and python/"]
    return []


# ---- Python ----------------------------------------------------------------------------------------------------------

# Which modules of qkernels a part may import, by longest matching prefix; None: any.
MAY_IMPORT = {
    "qkernels.ops": {"qkernels.ops", "qkernels.errors"},
    "qkernels.reference": {"qkernels.ops.epilogue", "qkernels.errors"},
    "qkernels.errors": set(),
    "qkernels.core": {"qkernels.core", "qkernels.ops", "qkernels.reference", "qkernels.errors", "qkernels.report"},
    "qkernels.nn": {"qkernels.nn", "qkernels.core", "qkernels.ops", "qkernels.reference", "qkernels.errors"},
    # A front end parses and offers verbs: no kernels, no oracles, and no other front end.
    "qkernels.frontends": {"qkernels.core", "qkernels.errors", "qkernels.report", "qkernels.frontends.common"},
    "qkernels.frontends.torch_ao": {
        "qkernels.core",
        "qkernels.errors",
        "qkernels.frontends.common",
        "qkernels.frontends.torch_ao",
    },
    "qkernels.frontends.nni": {
        "qkernels.core",
        "qkernels.errors",
        "qkernels.frontends.common",
        "qkernels.frontends.nni",
    },
    "qkernels.frontends.aimet": {
        "qkernels.core",
        "qkernels.errors",
        "qkernels.frontends.common",
        "qkernels.frontends.aimet",
    },
}
FRONT_ENDS_SHARE = 0.20  # of the lines of the package: they are parsers over one core
MAY_TOUCH_THE_BINARY = {"qkernels", "qkernels.testing", "qkernels.cli", "qkernels.info", "qkernels.ops"}


def module_name(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imported_modules(path: str, text: str) -> list[str]:
    """Modules of qkernels that the file imports, wherever in the file; `from qkernels import ops` is qkernels.ops."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")
            if not path.endswith("__init__.py"):
                package = package[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return [name for name in names if within(name, "qkernels") and name != "qkernels.__version__"]


def import_complaints(path: str, text: str) -> list[str]:
    me = module_name(path)
    room = max((prefix for prefix in MAY_IMPORT if within(me, prefix)), key=len, default=None)
    complaints = []
    for name in imported_modules(path, text):
        if within(name, "qkernels._C"):
            if not any(
                me == friend or (friend != "qkernels" and within(me, friend)) for friend in MAY_TOUCH_THE_BINARY
            ):
                complaints.append(f"{path} imports qkernels._C")
        elif room is not None and not any(within(name, allowed) for allowed in MAY_IMPORT[room]):
            complaints.append(f"{path} imports {name}; {room} may import {sorted(MAY_IMPORT[room])}")
    return complaints


def torch_ops_complaints(path: str, text: str) -> list[str]:
    """Only qkernels.ops reaches torch.ops.qkernels."""
    if within(module_name(path), "qkernels.ops"):
        return []
    complaints = []
    for node in ast.walk(ast.parse(text)):
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if dotted.endswith("ops.qkernels") or (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("qkernels::")
        ):
            complaints.append(f"{path}:{node.lineno} reaches torch.ops.qkernels; use qkernels.ops")
    return complaints


# ---- the repository obeys --------------------------------------------------------------------------------------------


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


RULES = [
    (csrc_complaints, ["csrc/*.h", "csrc/*.cc", "csrc/*.cu", "csrc/*.cuh", "csrc/*.inc"]),
    (isa_file_complaints, ["csrc/*.h", "csrc/*.cc", "csrc/*.inc"]),
    (seam_complaints, ["python/*.h", "python/*.cpp"]),
    (file_ending_complaints, ["*"]),
    (import_complaints, ["qkernels/*.py"]),
    (torch_ops_complaints, ["qkernels/*.py"]),
]


@pytest.mark.parametrize(("rule", "patterns"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_repository_obeys(rule, patterns):
    paths = tracked(*patterns)
    assert paths
    complaints = [
        complaint
        for path in paths
        if Path(path).suffix in {".h", ".cc", ".cu", ".cuh", ".inc", ".cpp", ".py"}
        for complaint in rule(path, (ROOT / path).read_text())
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_front_ends_are_a_small_part():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in tracked("qkernels/*.py")}
    ours = sum(count for path, count in lines.items() if path.startswith("qkernels/frontends/"))
    assert ours <= FRONT_ENDS_SHARE * sum(lines.values())


# ---- and each rule finds its offence ---------------------------------------------------------------------------------

OFFENCES = [
    (csrc_complaints, "csrc/gemm/gemm.cc", "#include <torch/all.h>"),
    (csrc_complaints, "csrc/gemm/gemm.cc", '#include "python/adapt.h"'),
    (csrc_complaints, "csrc/gemm/gemm.cc", '#include "csrc/conv/conv.h"'),
    (csrc_complaints, "csrc/base/cpu.cc", '#include "csrc/gemm/gemm.h"'),
    (csrc_complaints, "csrc/gemm/gemm.cc", "#include <thread>"),
    (csrc_complaints, "csrc/gemm/gemm.cc", "void f() { throw 1; }"),
    (isa_file_complaints, "csrc/gemm/gemm.cc", "#include <immintrin.h>"),
    (isa_file_complaints, "csrc/gemm/x86_avx2.cc", "#include <immintrin.h>\nvoid f();"),
    (isa_file_complaints, "csrc/gemm/x86_avx2.cc", "QK_TARGET_BEGIN(X)\n#include <vector>\nQK_TARGET_END"),
    (seam_complaints, "python/linear.cpp", "#include <ATen/ATen.h>"),
    (seam_complaints, "python/linear.cpp", "#include <torch/extension.h>"),
    (seam_complaints, "python/linear.cpp", "#include <pybind11/pybind11.h>"),
    (seam_complaints, "python/linear.cpp", '#include "python/pybind.h"'),
    (seam_complaints, "python/linear.cpp", "#include <cuda_runtime_api.h>"),
    (seam_complaints, "python/linear.cpp", "STABLE_TORCH_LIBRARY(qkernels, m) {}"),
    (seam_complaints, "python/linear.cpp", "if (has_features(a, kCpuAvx2)) {}"),
    (file_ending_complaints, "csrc/gemm/gemm.cpp", ""),
    (file_ending_complaints, "qkernels/fast.cc", ""),
    (import_complaints, "qkernels/core/convert.py", "from qkernels.nn import QLinear"),
    (import_complaints, "qkernels/core/convert.py", "def f():\n    from ..nn import QLinear"),
    (import_complaints, "qkernels/core/convert.py", "from qkernels import nn"),
    (import_complaints, "qkernels/ops/linear.py", "import qkernels.core.qspec"),
    (import_complaints, "qkernels/nn/linear.py", "from qkernels import _C"),
    (import_complaints, "qkernels/frontends/torch_ao/fx.py", "from qkernels import ops"),
    (import_complaints, "qkernels/frontends/torch_ao/fx.py", "from qkernels.frontends.aimet import nn"),
    (torch_ops_complaints, "qkernels/nn/linear.py", "import torch\ny = torch.ops.qkernels.add(1, 2)"),
    (torch_ops_complaints, "qkernels/nn/linear.py", "name = 'qkernels::add'"),
]

INNOCENT = [
    (csrc_complaints, "csrc/conv/conv.cc", '#include "csrc/gemm/igemm.h"\n#include <cstdint>'),
    (csrc_complaints, "csrc/gemm/gemm.cc", '// throw, printf\n/* #include <thread> */ const char* s = "throw";'),
    (isa_file_complaints, "csrc/gemm/x86_avx2.cc", "#include <immintrin.h>\nQK_TARGET_BEGIN(X)\nQK_TARGET_END"),
    (seam_complaints, "python/cuda/linear.cpp", "#include <cuda_runtime_api.h>"),
    (import_complaints, "qkernels/nn/linear.py", "from qkernels.core.qspec import QParams\nfrom qkernels import ops"),
    (torch_ops_complaints, "qkernels/ops/linear.py", "import torch\ny = torch.ops.qkernels.add(1, 2)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), OFFENCES)
def test_offence_is_found(rule, path, text):
    assert rule(path, text)


@pytest.mark.parametrize(("rule", "path", "text"), INNOCENT)
def test_innocent_code_passes(rule, path, text):
    assert rule(path, text) == []
