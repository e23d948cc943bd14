"""What setup.py does with a CUDA toolkit: it says where the static runtime may ask more of the driver than torch does,
and no kernel that spills gets into a build. The build knows its sources.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("qkernels_setup", Path(__file__).parents[2] / "setup.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Values for every one of which a thread would need a register, in blocks so large that there are too few of them.
SPILLS = """
__global__ void __launch_bounds__(1024, 2) planted(float* x, int n) {
  float v[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 48; ++i) v[i] = v[i] * v[(i + 1) % 48] + v[(i + 7) % 48];
  }
#pragma unroll
  for (int i = 0; i < 48; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
"""
INDEXES_MEMORY = """
__global__ void planted(float* x, const int* which, int n) {
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = x[i];
  for (int k = 0; k < n; ++k) v[which[k] & 15] += 1.0f;
  for (int i = 0; i < 16; ++i) x[i] = v[i];
}
"""
FINE = "__global__ void fine(float* x) { x[threadIdx.x] += 1.0f; }\n"


@pytest.fixture
def toolkit(build):
    home = build.find_toolkit()
    if home is None:
        pytest.skip("there is no nvcc")
    return build.Cuda(home, "", ["-gencode=arch=compute_80,code=sm_80"], "sm_80")


@pytest.fixture
def tree(build, monkeypatch, tmp_path):
    """A source tree of its own."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/cxx_flags.txt").write_text("-std=c++20\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("planted", "words"), [(SPILLS, "Registers are spilled"), (INDEXES_MEMORY, "Local memory used")]
)
def test_a_kernel_that_spills_fails_every_build(build, toolkit, tree, capfd, planted, words):
    (tree / "csrc/kernel.cu").write_text(planted)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"csrc/kernel\.cu does not compile"):
            build.compile_core(toolkit, tree / "build", 1)
        assert words in capfd.readouterr().out
    (tree / "csrc/kernel.cu").write_text(FINE)
    [made] = build.compile_core(toolkit, tree / "build", 1)
    assert Path(made).exists()


@pytest.mark.parametrize(
    ("archs", "is_checked"),
    [("7.5;8.0;8.6;8.9;9.0+PTX", True), ("9.0a", True), ("8.0;12.0", False), ("10.0", False)],
)
def test_spills_are_errors_where_every_kernel_is_known_to_fit(build, archs, is_checked):
    """On a newer GPU a little spilling is better than no build."""
    assert bool(build.spill_flags(build.parse_archs(archs)[0])) == is_checked


def test_what_was_made_with_a_complaint_is_made_again(build, tree, capfd):
    """`make build` refuses complaints: at every build, not at the first alone."""
    (tree / "csrc/a.cc").write_text('#warning "look"\nint a() { return 1; }\n')
    for _ in range(2):
        build.compile_core(None, tree / "build", 1)
        assert "warning:" in capfd.readouterr().out
    (tree / "csrc/a.cc").write_text("int a() { return 1; }\n")
    build.compile_core(None, tree / "build", 1)
    assert "csrc/a.cc" in capfd.readouterr().out
    build.compile_core(None, tree / "build", 1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("said", "is_complaint"),
    [
        ("ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized", True),
        ("nvcc warning : something", True),
        ("a.cc:1:2: warning: unused", True),
        ("ptxas info    : Used 168 registers", False),
    ],
)
def test_serialized_wgmma_counts_as_a_complaint(build, tree, tmp_path, said, is_complaint):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho '{said}'\n")
    compiler.chmod(0o755)
    target = tree / "build/a.o"
    build.compile_file(tree / "csrc/a.cu", target, [str(compiler)])
    assert target.with_suffix(".command").exists() != is_complaint


def test_a_fingerprint_is_of_names_and_bytes(build, tree):
    (tree / "python").mkdir()
    kernel, binding = tree / "csrc/kernel.cu", tree / "python/kernel.cpp"
    kernel.write_text("one")
    binding.write_text("two")
    seen = [build.fingerprint()]
    (tree / "csrc/kernel.cu.swp").write_text("an editor's")
    (tree / "README.md").write_text("words")
    assert build.fingerprint() == seen[0]
    kernel.write_text("onet")
    binding.write_text("wo")
    seen.append(build.fingerprint())
    binding.rename(tree / "python/other.cpp")
    seen.append(build.fingerprint())
    kernel.unlink()
    seen.append(build.fingerprint())
    assert len(set(seen)) == 4


def test_only_the_fingerprint_is_compiled_for_its_sake(build, tree):
    (tree / "csrc/a.cc").write_text("int a() { return 1; }\n")
    source = build.write_fingerprint(tree / "build")
    made = source.stat().st_mtime_ns
    assert build.fingerprint() in source.read_text()
    assert build.write_fingerprint(tree / "build").stat().st_mtime_ns == made
    (tree / "csrc/a.cc").write_text("int a() { return 2; }\n")
    assert build.fingerprint() in build.write_fingerprint(tree / "build").read_text()


def test_the_extension_carries_its_fingerprint(build, tmp_path):
    """In a library of another file, as python/module.cpp reads it."""
    source = build.write_fingerprint(tmp_path)
    main = tmp_path / "main.cc"
    declared = 'extern "C" const char qk_source_fingerprint[];'
    main.write_text(f"#include <cstdio>\n{declared}\nint main() {{ puts(qk_source_fingerprint); }}\n")
    command = [*build.host_compiler(), str(source), str(main), "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True).stdout
    assert said.strip() == build.fingerprint()


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "is_told"),
    [
        ("13.0", "12.8", True),
        ("13.0", "13.1", False),
        ("12.9", "12.4", False),
        ("12.9", "13.0", False),
        ("13.0", None, False),
    ],
)
def test_a_toolkit_of_a_later_major_version_is_told(build, monkeypatch, toolkit, torch_cuda, is_told):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    caution = build.too_new_for_driver(build.Cuda(Path("/cuda"), toolkit, [], ""))
    assert ("needs a driver for it" in caution) == is_told
    assert "warning:" not in caution  # which would fail `make build`
