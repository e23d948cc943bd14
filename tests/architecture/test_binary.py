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


def test_wide_instructions_stay_in_functions_of_their_isa():
    """A wide instruction in a shared or weak function is an illegal instruction on an older machine."""
    leaks = []
    for name, body in binary.functions().items():
        wide = next((i for i in body if re.search(r"%[yz]mm", i.operands) or i.name.startswith("v")), None)
        if wide and (name in binary.weak_symbols() or not re.search(r"avx2|avxvnni|avx512|amx", name)):
            leaks.append(f"{name}: {wide.name} {wide.operands}")
    assert not leaks


def test_some_wide_instruction_was_seen():
    assert any(i.operands.count("%zmm") for body in binary.functions().values() for i in body)
