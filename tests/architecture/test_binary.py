"""The compiled part: the stable ABI only, wide instructions in kernels of their ISA only, no leaking names."""

import re

import binary

# C functions of torch's stable ABI, Python's C API, the C and C++ runtimes.
STABLE = r"aoti_torch_\w+|torch_\w+"
PYTHON = r"_?Py\w+"
RUNTIME = r"\S+@\S+|__gmon_start__|_ITM_\w+|__tls_get_addr"


def test_binary_links_only_stable_symbols_of_torch():
    strange = [
        symbol
        for symbol in binary.undefined_symbols()
        if not re.fullmatch(f"{STABLE}|{PYTHON}|{RUNTIME}", symbol)
        and not re.match(r"_ZN?K?O?R?(St|NSt)|_ZNKRSt|_ZNOSt|_ZNSt|_ZNKSt|_ZSt", symbol)  # libstdc++
    ]
    assert not strange


def test_binary_needs_no_cuda_and_no_python_binding_library():
    strange = [name for name in binary.needed_libraries() if re.search(r"cuda|cudart|torch_python|pthread_|gomp", name)]
    assert not strange


def test_binary_exports_its_module_and_nothing_of_qkernels():
    exported = binary.exported_symbols()
    assert "PyInit__C" in exported
    assert not [symbol for symbol in exported if "2qk" in symbol]


WIDE_FILE = re.compile(r"(\w+_)?x86_\w+\.cc")
WIDE_NAME = re.compile(r"avx2|avxvnni|avx512|amx")


def first_wide_instruction(function: binary.Function) -> binary.Instruction | None:
    return next((i for i in function.body if i.name.startswith("v") or re.search(r"%[yz]mm", i.operands)), None)


def test_wide_instructions_stay_in_kernels_of_their_isa():
    """A wide instruction in a shared or weak function is an illegal instruction on an older machine.

    A function of an x86_*.cc file is local to it, or carries its instruction set in its name.
    """
    leaks = []
    for function in binary.functions():
        wide = first_wide_instruction(function)
        if wide is None:
            continue
        symbol = binary.symbols()[function.body[0].address]
        is_kernel = WIDE_NAME.search(function.name) or WIDE_FILE.fullmatch(symbol.source)
        if not is_kernel or symbol.binding == "WEAK":
            leaks.append(f"{symbol.binding} {symbol.source} {function.name}: {wide.name} {wide.operands}")
    assert not leaks, "\n" + "\n".join(leaks)


def test_wide_kernels_were_seen():
    assert any(first_wide_instruction(function) for function in binary.functions())
