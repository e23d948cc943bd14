"""Builds qkernels._C from csrc/ (kernels, torch-free) and python/ (the binding), by glob.

CPU only:  csrc/**/*.cc + python/*.cpp                    (CMakeLists.txt uses the same glob for csrc/)
With CUDA: also csrc/**/*.cu + python/cuda/*.cpp

csrc/ is compiled from here, without torch's headers and flags: its objects serve every torch that a checkout is built
for, and `torch.utils.cpp_extension` refuses .cu files under a CPU build of torch. python/ is compiled by the latter.

The extension is linked to torch's stable ABI only and to a static CUDA runtime, so one wheel serves every torch from
2.11 on, CPU or CUDA build.

Environment: FORCE_CUDA=0|1 (default: CUDA if a toolkit is found and torch is a CUDA build), CUDA_HOME,
TORCH_CUDA_ARCH_LIST (default "8.0;9.0+PTX"), MAX_JOBS, DEBUG=1.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ModuleNotFoundError:
    sys.exit("qkernels: building needs torch in this environment; see README.md, section Install")

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
KINDS = ("h", "inc", "cc", "cu", "cuh", "cpp", "txt")  # of files that what is built depends on
ARCH_OF_FILE = re.compile(r"_sm(\d+[af])\.cu$")  # what is compiled for one architecture alone says so in its name
SPILL_FREE = {"75", "80", "86", "89", "90", "90a"}  # what .ci/run compiles; on newer ones some kernels spill a little
# In what a compiler says. `make build` looks for the same; ptxas only informs where it serializes wgmma.
COMPLAINT = r"warning *:|Potential Performance Loss"
STABLE_ABI_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def sources() -> list[str]:
    """Everything that the extension is made of."""
    return files(*(f"{room}/**/*.{kind}" for room in ("csrc", "python") for kind in KINDS))


def fingerprint() -> str:
    """Of the names and bytes of `sources`. The extension carries it: `make gpu-check` asks what it was built from."""
    digest = hashlib.sha256()
    for name in sources():
        content = (ROOT / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def cxx_flags() -> list[str]:
    shared = [line for line in (ROOT / "csrc/cxx_flags.txt").read_text().splitlines() if line.startswith("-")]
    optimization = ["-Og", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0", "-DNDEBUG"]
    # Messages name a source file as the repository does, not where it was built.
    return [*optimization, *shared, f"-ffile-prefix-map={ROOT}/="]


# ---- CUDA: is there a toolkit, and should it be used? ----------------------------------------------------------------


@dataclass(frozen=True)
class Cuda:
    home: Path
    version: str
    gencode: list[str]  # flags of nvcc
    names: str  # for people: "sm_80 sm_90 compute_90"

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin/nvcc")

    @property
    def library_dir(self) -> Path:
        return next(d for d in (self.home / "lib64", self.home / "lib") if (d / "libcudart_static.a").exists())


def is_toolkit(home: Path) -> bool:
    has_runtime = any((home / lib / "libcudart_static.a").exists() for lib in ("lib64", "lib"))
    return (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists() and has_runtime


def home_of_nvcc(nvcc: str) -> Path | None:
    """Asks nvcc where its toolkit is: the nvcc on PATH may be a script that starts the real one somewhere else."""
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else None


def find_toolkit() -> Path | None:
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates += [home for home in [home_of_nvcc(on_path)] if home]
    candidates.append(Path("/usr/local/cuda"))
    return next((home for home in candidates if is_toolkit(home)), None)


def parse_archs(text: str) -> tuple[list[str], str]:
    """ "8.0;9.0+PTX" -> the flags of nvcc and the names sm_80 sm_90 compute_90.

    No source asks for more than the lowest minor version of a major one has: one PTX of that gives all their code.
    """
    entries = list(filter(None, re.split(r"[;,\s]+", text)))
    matches = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry) for entry in entries]
    if None in matches:
        sys.exit(f"qkernels: TORCH_CUDA_ARCH_LIST must look like '{DEFAULT_CUDA_ARCHS}', got '{text}'")
    flags, names = [], []
    for major, minor, feature, ptx in map(re.Match.groups, matches):
        lowest = minor if feature else min(m[2] for m in matches if m[1] == major and not m[3])
        flags.append(f"-gencode=arch=compute_{major}{lowest}{feature},code=sm_{major}{minor}{feature}")
        names.append(f"sm_{major}{minor}{feature}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{major}{minor}{feature},code=compute_{major}{minor}{feature}")
            names.append(f"compute_{major}{minor}{feature}")
    return flags, " ".join(names)


def gencode_of(source: str, cuda: Cuda) -> list[str]:
    """The architectures that a file is compiled for: those of the build, or the one in its name."""
    own = ARCH_OF_FILE.search(source)
    return [f"-gencode=arch=compute_{own[1]},code=sm_{own[1]}"] if own else cuda.gencode


def decide_cuda() -> tuple[Cuda | None, str]:
    """The CUDA build to make, or None, and the reason in words."""
    force = os.environ.get("FORCE_CUDA", "")
    if force == "0":
        return None, "FORCE_CUDA=0"
    if force != "1" and torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build; FORCE_CUDA=1 builds the CUDA part nevertheless"
    home = find_toolkit()
    if home is None:
        missing = "no CUDA toolkit (nvcc, cuda_runtime.h, libcudart_static.a) in CUDA_HOME, PATH or /usr/local/cuda"
        if force == "1":
            sys.exit(f"qkernels: FORCE_CUDA=1, but {missing}")
        return None, missing
    version = subprocess.run([str(home / "bin/nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    gencode, names = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS)
    own = {f"sm_{match[1]}" for match in map(ARCH_OF_FILE.search, files("csrc/**/*.cu")) if match}
    names = " ".join([names, *sorted(own - set(names.split()))])
    cuda = Cuda(home, re.search(r"release ([\d.]+)", version).group(1), gencode, names)
    why = "FORCE_CUDA=1" if force == "1" else f"torch {torch.__version__}"
    return cuda, f"{why}; toolkit {cuda.version} in {home}; {names}"


def too_new_for_driver(cuda: Cuda) -> str:
    """What may go wrong with a toolkit of a later major version than torch's CUDA, or nothing."""
    ours, theirs = cuda.version, torch.version.cuda
    if theirs is None or int(ours.split(".")[0]) <= int(theirs.split(".")[0]):
        return ""
    return (
        f"the CUDA {ours} runtime is linked statically and needs a driver for it, which one that serves this torch "
        f"(CUDA {theirs}) may not be; CUDA_HOME chooses another toolkit"
    )


# ---- csrc/ -----------------------------------------------------------------------------------------------------------


def dependencies(makefile_rule: str) -> list[str]:
    """The files that a rule of the form `target: file file ...` names, as -MD writes it."""
    _, _, names = makefile_rule.replace("\\\n", " ").partition(": ")
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names.strip())]


def is_current(target: Path, command: str) -> bool:
    """Whether `target` was made by `command` from the files as they are now."""
    made_by, rule = target.with_suffix(".command"), target.with_suffix(".d")
    if not all(path.exists() for path in (target, made_by, rule)) or made_by.read_text() != command:
        return False
    read = [Path(name) for name in dependencies(rule.read_text())]
    made = target.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime < made for path in read)


def nvcc_flags() -> list[str]:
    return [
        *(["-O0", "-g", "-G"] if DEBUG else ["-O3"]),
        *("-std=c++20", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"),
    ]


def spill_flags(gencode: list[str]) -> list[str]:
    """A kernel that spills or uses local memory is an error, where every architecture is one that the kernels fit."""
    archs = {found[1] for flag in gencode if (found := re.search(r"code=sm_(\w+)", flag))}
    return [] if DEBUG or archs - SPILL_FREE else ["-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]


def host_compiler() -> list[str]:
    """For what has no part of torch in it."""
    return [*cxx_compiler(), "-fPIC", *cxx_flags()]


def cxx_compiler() -> list[str]:
    """The C++ compiler that torch's build takes too."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        sys.exit(f"qkernels: no C++ compiler: CXX is {os.environ.get('CXX')!r}, and there is no {command[0]} on PATH")
    return command


def compile_file(source: Path, target: Path, compiler: list[str]) -> str:
    """Compiles `source` unless `target` is current; returns `target`.

    What was made with a complaint is made again the next time, so that `make build`, which refuses complaints, does so
    every time.
    """
    depfile = ["-MD", "-MF", str(target.with_suffix(".d"))]
    command = [*compiler, f"-I{ROOT}", *depfile, "-c", str(source), "-o", str(target)]
    if is_current(target, " ".join(command)):
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    made_by = target.with_suffix(".command")
    made_by.unlink(missing_ok=True)  # not there while the object may be half written
    print(" ".join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(result.stdout, end="", flush=True)
    if result.returncode != 0:
        target.unlink(missing_ok=True)
        name = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
        raise RuntimeError(f"qkernels: {name} does not compile; the compiler's messages are above")
    if not re.search(COMPLAINT, result.stdout):
        made_by.write_text(" ".join(command))
    return str(target)


def compile_core(cuda: Cuda | None, build_dir: Path, jobs: int) -> list[str]:
    """Compiles the files of csrc/ whose objects are older than what they read; returns all objects."""
    compilers = {}  # the longest first
    if cuda is not None:
        for source in files("csrc/**/*.cu"):
            gencode = gencode_of(source, cuda)
            compilers[source] = [cuda.nvcc, *nvcc_flags(), *spill_flags(gencode), *gencode]
    compilers |= dict.fromkeys(files("csrc/**/*.cc"), host_compiler())

    with ThreadPoolExecutor(jobs) as pool:
        objects = [
            pool.submit(compile_file, ROOT / source, build_dir / f"{source}.o", compiler)
            for source, compiler in compilers.items()
        ]
        try:
            return [made.result() for made in objects]
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))


def write_fingerprint(build_dir: Path) -> Path:
    """A source file that defines it for python/module.cpp, written only where it changes."""
    path = build_dir / "fingerprint.cc"
    text = f'extern "C" const char qk_source_fingerprint[];\nconst char qk_source_fingerprint[] = "{fingerprint()}";\n'
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


# ---- the extension ---------------------------------------------------------------------------------------------------


class BuildQKernels(BuildExtension):
    """torch's ninja build of python/, with the objects of csrc/."""

    cuda: Cuda | None = None

    def build_extensions(self) -> None:
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        [extension] = self.extensions
        build_dir = Path(self.build_temp).resolve()
        source = write_fingerprint(build_dir)
        objects = compile_core(self.cuda, build_dir, jobs)
        extension.extra_objects = [*objects, compile_file(source, source.with_suffix(".cc.o"), host_compiler())]
        extension.depends.append(str(source))
        if not self.use_ninja:
            self.compiler.compile = parallel_compile(self.compiler, jobs)
        super().build_extensions()


def parallel_compile(compiler, jobs: int):
    """The `compile` of a setuptools compiler, several files at a time: without ninja it takes one after the other."""

    def compile_all(
        sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None, extra_postargs=None,
        depends=None,
    ):  # fmt: skip
        _, objects, postargs, pp_opts, sources_of = compiler._setup_compile(
            output_dir, macros, include_dirs, sources, depends, extra_postargs
        )
        cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)

        def compile_one(target: str) -> None:
            source, ending = sources_of[target]
            compiler._compile(target, source, ending, cc_args, postargs, pp_opts)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, [target for target in objects if target in sources_of]))
        return objects

    return compile_all


def make_extension(cuda: Cuda | None) -> Extension:
    own = files("python/*.cpp")
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI_TARGET), *([("QK_DEBUG_BUILD", "1")] if DEBUG else [])]
    system_includes, library_dirs = list(include_paths()), list(library_paths())
    libraries = ["torch", "torch_cpu", "c10"]
    if cuda is not None:
        own += files("python/cuda/*.cpp")
        macros += [("QK_CUDA_ARCHS", f'"{cuda.names}"'), ("QK_CUDA_VERSION", f'"{cuda.version}"')]
        system_includes.append(str(cuda.home / "include"))
        library_dirs.append(str(cuda.library_dir))
        libraries += ["cudart_static", "rt", "dl", "pthread"]
    return Extension(
        "qkernels._C",
        own,
        language="c++",
        include_dirs=[str(ROOT)],
        define_macros=macros,
        # What setuptools does not know to be read: it links again when one of these is newer than what is built.
        depends=[name for name in sources() if name not in own],
        # Warnings of other people's headers are not ours: -isystem.
        extra_compile_args=[*cxx_flags(), *(f"-isystem{path}" for path in system_includes)],
        library_dirs=library_dirs,
        # Not `libraries=`: the flag must come first, or a linker that defaults to --as-needed drops libtorch.so.
        extra_link_args=[
            "-Wl,--no-as-needed",
            *(f"-l{library}" for library in libraries),
            *([] if DEBUG else ["-Wl,--strip-debug"]),
        ],
    )


def main() -> None:
    cuda, reason = decide_cuda()
    print(f"qkernels: building {'with CUDA' if cuda else 'for the CPU only'} ({reason})", flush=True)
    if cuda and (caution := too_new_for_driver(cuda)):
        print(f"qkernels: {caution}", flush=True)
    BuildQKernels.cuda = cuda
    setup(ext_modules=[make_extension(cuda)], cmdclass={"build_ext": BuildQKernels})


if __name__ == "__main__":
    main()
