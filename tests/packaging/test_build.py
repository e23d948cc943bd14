"""setup.py decides about CUDA as documented, and the build backend answers a missing tool with one line."""

import importlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, path: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch):
    for name in ("FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return load("qkernels_setup", "setup.py")


@pytest.fixture
def toolkit(tmp_path):
    """What the build looks for in a CUDA toolkit, with an nvcc that answers as the real one does."""
    home = tmp_path / "toolkit"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin/nvcc").write_text(
        "#!/bin/sh\n"
        'case "$1" in --dryrun) echo "#$ TOP=$(dirname "$0")/.." >&2;; *) echo "release 13.0, V13.0.88";; esac\n'
    )
    (home / "bin/nvcc").chmod(0o755)
    return home


def test_toolkit_is_found_behind_a_wrapper_script(build, toolkit, tmp_path, monkeypatch):
    wrapper = tmp_path / "path/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert build.find_toolkit() == toolkit.resolve()


def test_cuda_home_without_headers_is_not_a_toolkit(build, toolkit, monkeypatch):
    (toolkit / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.find_toolkit() != toolkit


@pytest.mark.parametrize(
    ("force", "torch_cuda", "has_toolkit", "builds_cuda"),
    [
        ("", "13.0", True, True),
        ("", "13.0", False, False),
        ("", None, True, False),
        ("0", "13.0", True, False),
        ("1", None, True, True),
    ],
)
def test_decision(build, toolkit, monkeypatch, force, torch_cuda, has_toolkit, builds_cuda):
    monkeypatch.setenv("FORCE_CUDA", force)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(build, "find_toolkit", lambda: toolkit if has_toolkit else None)
    cuda, reason = build.decide_cuda()
    assert (cuda is not None) == builds_cuda
    assert reason


def test_forced_cuda_without_a_toolkit_is_an_error(build, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "find_toolkit", lambda: None)
    with pytest.raises(SystemExit, match="FORCE_CUDA=1, but no CUDA toolkit"):
        build.decide_cuda()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0;9.0+PTX", "sm_80 sm_90 compute_90"),
        ("8.6 9.0a", "sm_86 sm_90a"),
        ("12.0,", "sm_120"),
        ("8.9+PTX 8.0", "sm_89 compute_89 sm_80"),
    ],
)
def test_architecture_list(build, text, names):
    flags, found = build.parse_archs(text)
    assert found == names
    assert [flag.partition(",code=")[2] for flag in flags] == names.split()


def test_code_of_one_major_version_comes_from_its_lowest_ptx(build):
    flags, _ = build.parse_archs("8.6;8.0;8.9+PTX;9.0;9.0a")
    made_from = [flag.removeprefix("-gencode=arch=").split(",code=") for flag in flags]
    assert made_from == [
        ["compute_80", "sm_86"],
        ["compute_80", "sm_80"],
        ["compute_80", "sm_89"],
        ["compute_89", "compute_89"],
        ["compute_90", "sm_90"],
        ["compute_90a", "sm_90a"],
    ]


@pytest.mark.parametrize("text", ["8", "sm_80", "8.0+ptx", "Hopper"])
def test_bad_architecture_list_is_an_error(build, text):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must look like"):
        build.parse_archs(text)


def test_backend_without_torch_says_what_to_run(monkeypatch):
    backend = load("qkernels_backend", "build_backend/qkernels_build.py")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"no torch in the build environment.*pip install --no-build-isolation \."):
        backend.get_requires_for_build_wheel()


def test_backend_with_an_old_setuptools_says_what_to_run(monkeypatch):
    backend = load("qkernels_backend", "build_backend/qkernels_build.py")
    monkeypatch.setattr(backend.metadata, "version", lambda name: "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools >= 77, found 65\.5\.0"):
        backend.build_wheel("dist")


def test_both_builds_read_the_same_flags_and_sources(build):
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "file(STRINGS csrc/cxx_flags.txt cxx_flags" in cmake
    assert "file(GLOB_RECURSE sources CONFIGURE_DEPENDS csrc/*.cc)" in cmake
    assert "-ffp-contract=off" in build.cxx_flags()
    assert "-ffp-contract=off" in build.nvcc_flags()[-1]


def test_the_kernels_are_compiled_without_torch_and_only_when_they_change(build, tmp_path, monkeypatch):
    for name in ("a.cc", "b.cc"):
        (tmp_path / "csrc" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "csrc" / name).write_text(f"int {name[0]}() {{ return 1; }}\n")
    log = tmp_path / "log"
    compiler = tmp_path / "my c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    (tmp_path / "csrc/cxx_flags.txt").write_text("-std=c++20\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", f"'{compiler}'")
    objects = build.compile_core(None, tmp_path / "build", 2)
    assert objects == [str(tmp_path / "build/csrc" / name) for name in ("a.cc.o", "b.cc.o")]
    assert all(Path(made).exists() for made in objects)
    assert "torch" not in log.read_text().replace(str(tmp_path), "")
    log.unlink()
    assert build.compile_core(None, tmp_path / "build", 2) == objects
    assert not log.exists()
    (tmp_path / "csrc/b.cc").write_text("int b( {\n")
    with pytest.raises(SystemExit, match=r"csrc/b\.cc does not compile"):
        build.compile_core(None, tmp_path / "build", 2)
    assert len(log.read_text().splitlines()) == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler: CXX is 'no-such-compiler'"):
        build.compile_core(None, tmp_path / "build", 2)


def test_an_object_is_made_again_when_a_file_that_it_read_changes(build, tmp_path):
    source, header, other = tmp_path / "a b.cu", tmp_path / "a.cuh", tmp_path / "other.cuh"
    target = tmp_path / "a.cu.o"
    for path in (source, header, other):
        path.write_text("")
        os.utime(path, (1000, 1000))
    target.write_text("")
    rule = f"{target} : {str(source).replace(' ', chr(92) + ' ')} \\\n    {header}\n"
    assert build.dependencies(rule) == [str(source), str(header)]
    target.with_suffix(".d").write_text(rule)
    target.with_suffix(".command").write_text("nvcc -O3")
    assert build.is_current(target, "nvcc -O3")
    assert not build.is_current(target, "nvcc -O2")
    later = target.stat().st_mtime + 10
    os.utime(other, (later, later))
    assert build.is_current(target, "nvcc -O3")
    os.utime(header, (later, later))
    assert not build.is_current(target, "nvcc -O3")
    header.unlink()
    assert not build.is_current(target, "nvcc -O3")


def test_without_ninja_files_are_compiled_side_by_side(build, tmp_path, monkeypatch):
    from setuptools._distutils import ccompiler, sysconfig

    monkeypatch.chdir(tmp_path)
    sources = [f"file{i}.c" for i in range(5)]
    for source in sources:
        Path(source).write_text(f"int {source[:-2]}(void) {{ return VALUE; }}\n")
    compiler = ccompiler.new_compiler()
    sysconfig.customize_compiler(compiler)
    one, threads = compiler._compile, set()

    def compile_one(*arguments):
        threads.add(threading.get_ident())
        time.sleep(0.1)
        one(*arguments)

    compiler._compile = compile_one
    compile_all = build.parallel_compile(compiler, 3)
    objects = compile_all(sources, output_dir="out", macros=[("VALUE", "7")], extra_postargs=["-O0"])
    assert sorted(objects) == [f"out/{source[:-2]}.o" for source in sources]
    assert all(Path(name).exists() for name in objects)
    assert len(threads) > 1
    Path(sources[2]).write_text("int broken(")
    with pytest.raises(Exception, match="exit"):
        compile_all(sources, output_dir="out", macros=[("VALUE", "7")])


def test_the_source_distribution_holds_every_tracked_file(monkeypatch):
    from setuptools.command.egg_info import FileList

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    monkeypatch.chdir(ROOT)
    files = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    by_itself = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", ".gitignore"}
    left_out = tracked - set(files.files) - by_itself
    assert not [name for name in left_out if not name.startswith("qkernels/")]


def test_the_installed_command_is_a_function():
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    [(name, target)] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    module, _, function = target.partition(":")
    assert name == "qkernels"
    assert callable(getattr(importlib.import_module(module), function))
