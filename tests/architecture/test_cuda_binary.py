"""The compiled CUDA kernels, without a GPU: architectures, instructions, no local memory.

`make build` already fails on a spill or a stack frame: ptxas warns. What is left is in the machine code, read with
cuobjdump and nvdisasm, which come with triton or as the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from qkernels import _C

pytestmark = pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA kernels (no nvcc, or FORCE_CUDA=0)")


def tool_folders() -> list[Path]:
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for site in sys.path:
        folders += sorted(Path(site).glob("nvidia/*/bin"))
    return [*folders, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]


@cache
def cuobjdump(*arguments: str) -> str:
    search = os.pathsep.join(map(str, tool_folders()))
    tool, helper = (shutil.which(name, path=search) for name in ("cuobjdump", "nvdisasm"))
    if tool is None or helper is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(helper).parent), os.environ.get("PATH", "")])}
    return subprocess.run(
        [tool, *arguments, _C.__file__], capture_output=True, text=True, check=True, env=environment
    ).stdout


def real_archs() -> list[str]:
    """Those of all kernels but wgmma's, which is for sm_90a alone."""
    return [arch for arch in re.findall(r"sm_\w+", _C.cuda_archs) if arch != "sm_90a"]


@cache
def kernels(arch: str) -> dict[str, list[str]]:
    """The instructions of each kernel, by mangled name."""
    found: dict[str, list[str]] = {}
    for line in cuobjdump("-sass", "-arch", arch).splitlines():
        head = re.match(r"\s*Function : (\S+)", line)
        if head:
            found[head.group(1)] = []
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line)
        if instruction and found:
            found[next(reversed(found))].append(instruction.group(1))
    return found


def named(arch: str, part: str) -> dict[str, list[str]]:
    chosen = {name: body for name, body in kernels(arch).items() if part in name}
    assert chosen, f"no kernel of {part} for {arch}"
    return chosen


def count(body: list[str], pattern: str) -> int:
    return sum(re.match(pattern, name) is not None for name in body)


def test_the_binary_has_the_architectures_that_it_names():
    assert set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf"))) == {*real_archs(), "sm_90a"}
    if "compute_" in _C.cuda_archs:
        assert cuobjdump("--list-ptx").strip()


@pytest.mark.parametrize("arch", [*real_archs(), "sm_90a"])
def test_no_kernel_touches_local_memory(arch):
    spills = [name for name, body in kernels(arch).items() if count(body, r"LDL|STL")]
    assert kernels(arch)
    assert not spills


def tile_shapes() -> list[tuple[int, ...]]:
    """(rows, columns, depth, stages, warp rows, warp columns) of kCudaTiles."""
    text = (Path(__file__).resolve().parents[2] / "csrc/gemm/cuda_plan.h").read_text()
    table = re.search(r"kCudaTiles\[\] = \{(.*?)\n?\};", text, re.DOTALL).group(1)
    return [tuple(map(int, entry.split(","))) for entry in re.findall(r"\{([\d, ]+)\}", table)]


@pytest.mark.parametrize("arch", real_archs())
def test_tiles_are_tensor_core_loops_with_asynchronous_copies(arch):
    for name, body in named(arch, "igemm_kernel").items():
        _, _, depth, _, warp_rows, warp_columns = tile_shapes()[int(re.search(r"TileILi(\d)E", name).group(1))]
        slices = depth // 32
        products = warp_rows // 16 * (warp_columns // 8) * slices
        if arch == "sm_75":  # smaller products, copies at once; the largest tiles are left out
            expected = 0 if warp_rows * warp_columns >= 64 * 64 else 4 * products
            assert count(body, r"IMMA\.8816\.[SU]8\.S8") == count(body, r"IMMA") == expected, name
            continue
        assert count(body, r"IMMA\.16832\.[SU]8\.S8$") == products, name
        assert count(body, r"IMMA") == count(body, r"IMMA\.16832\."), name
        assert count(body, r"LDSM\.16\.M88\.4") == (warp_rows // 16 + warp_columns // 16) * slices, name
        assert count(body, r"LDGSTS\..*128") == count(body, r"LDGSTS") > 0, name
        assert count(body, r"STG\.E\.128") > 0, f"{name}: results leave in small pieces"


def test_the_kernel_of_sm_90a_multiplies_by_wgmma_and_copies_by_tma():
    for name, body in named("sm_90a", "wgmma_kernel").items():
        assert count(body, r"IGMMA\.64x128x32\.[SU]8\.S8") == 4, name
        assert count(body, r"IGMMA") == 4, name
        assert count(body, r"UTMALDG\.2D") == 2, name
        assert count(body, r"IMMA|LDGSTS|LDSM") == 0, name
        assert count(body, r"STG\.E\.128") > 0, f"{name}: results leave in small pieces"


@pytest.mark.parametrize("arch", real_archs())
def test_gemv_reads_16_bytes_at_a_time(arch):
    for name, body in named(arch, "gemv_kernel").items():
        assert count(body, r"LDG\.E\.128") >= 3, f"{name}: activations and weights"
        assert count(body, r"IDP\.4A") >= 16, name


@pytest.mark.parametrize("arch", real_archs())
def test_products_of_packed_signs_count_bits_of_64_bit_words(arch):
    for name, body in named(arch, "sign_product_kernel").items():
        assert count(body, r"POPC") >= 8, name
        assert count(body, r"LDG\.E\.64") >= 5, f"{name}: a word of the weight and of each pixel"
    for name, body in named(arch, "pack_rows_kernel").items():
        assert count(body, r"VOTE") >= 2, name


@pytest.mark.parametrize("arch", real_archs())
def test_groups_of_a_few_channels_are_dot_products_of_words(arch):
    kinds = [body for name, body in named(arch, "elementwise_kernel").items() if "12NarrowGroups" in name]
    assert len(kinds) == 2
    for body in kinds:
        assert count(body, r"IDP\.4A") >= 4


# What a thread loads and stores at once: (operation, 16-byte loads, 16-byte stores), at least.
ELEMENTWISE = [
    ("9FakeQuantI", 1, 1),
    ("17FakeQuantBackwardI", 2, 1),
    ("8QuantizeI", 1, 0),
    ("10DequantizeIh", 0, 1),
    ("6Lookup", 1, 1),
    ("6BinaryI", 2, 1),
    ("6CatOne", 1, 1),
    ("7MaxPool", 1, 1),
    ("13DorefaForwardI", 1, 1),
    ("4SignI", 1, 1),
    ("12SignBackwardI", 2, 1),
    ("11NormForward", 1, 1),
    ("7NormOutI", 2, 1),
    ("4MaskI", 1, 1),
    ("12MaskBackwardI", 1, 1),
]


@pytest.mark.parametrize("arch", real_archs())
@pytest.mark.parametrize(("operation", "loads", "stores"), ELEMENTWISE)
def test_elementwise_kernels_move_16_bytes_at_a_time(arch, operation, loads, stores):
    kinds = [body for name, body in named(arch, "elementwise_kernel").items() if operation in name]
    assert kinds
    for body in kinds:
        assert count(body, r"LDG\.E\.(\w+\.)*128") >= loads
        assert count(body, r"STG\.E\.128") >= stores


# Kernels of training by name, and what they load and store at once, at least.
TRAINING = [
    ("lsq_run_kernel", 2, 1),
    ("lsq_column_kernelIfLi4", 2, 1),
    ("extremes_run_kernel", 1, 1),
    ("extremes_column_kernelIfLi4", 1, 1),
    ("histogram_count_kernel", 1, 0),
    ("foreach_extremes_kernel", 1, 1),
    ("foreach_quant_kernel", 2, 1),
    ("foreach_backward_kernel", 2, 1),
    ("dorefa_run_kernel", 2, 1),
    ("dorefa_gradient_kernel", 2, 1),
    ("quantize_rows_kernel", 2, 0),
]


@pytest.mark.parametrize("arch", real_archs())
@pytest.mark.parametrize(("kernel", "loads", "stores"), TRAINING)
def test_training_kernels_move_16_bytes_at_a_time(arch, kernel, loads, stores):
    for name, body in named(arch, kernel).items():
        assert count(body, r"LDG\.E\.(\w+\.)*128") >= loads, name
        assert count(body, r"STG\.E\.128") >= stores, name
