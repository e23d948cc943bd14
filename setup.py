"""Builds qkernels._C from csrc/ (kernels, torch-free) and python/ (the binding) by glob."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


CXX_FLAGS = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"] + [
    line for line in (ROOT / "csrc/cxx_flags.txt").read_text().splitlines() if line.startswith("-")
]

extension = CppExtension(
    "qkernels._C",
    sources("csrc/**/*.cc", "python/*.cpp"),
    include_dirs=[str(ROOT)],
    extra_compile_args={"cxx": CXX_FLAGS},
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
