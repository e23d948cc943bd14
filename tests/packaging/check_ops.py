"""Run by wheel_check.py under each torch: does the installed package import, and do its ops give torch's bits?"""

import sys

import torch

import qkernels
from qkernels import _C, ops
from qkernels.ops.epilogue import Epilogue
from qkernels.testing import isa_cap, supported_isas

site = sys.argv[1]
assert qkernels.__file__.startswith(site), f"imported from {qkernels.__file__}, expected {site}"

x = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
scale, zero_point = torch.tensor([0.03]), torch.tensor([3], dtype=torch.int32)
expected = torch.fake_quantize_per_tensor_affine(x, 0.03, 3, -128, 127)

codes = torch.randint(0, 256, (5, 301), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
weight = torch.randint(-128, 128, (37, 301), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
sums = ((codes.long() - 7) @ weight.long().T).int()

isas = supported_isas()
for isa in isas:
    with isa_cap(isa):
        assert torch.equal(ops.fake_quant(x, scale, zero_point, None, -128, 127), expected), isa
        epilogue = Epilogue(dtype=torch.int32)
        packed = ops.linear_pack(weight, torch.ones(1), None, None, 1.0, 7, torch.uint8, epilogue)
        assert torch.equal(ops.linear(codes, packed, 37, torch.int32), sums), isa
if _C.with_cuda:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qkernels::fake_quant", "CUDA")
if _C.with_cuda and torch.cuda.is_available():
    on_gpu = ops.fake_quant(x.cuda(), scale.cuda(), zero_point.cuda(), None, -128, 127)
    assert torch.equal(on_gpu.cpu(), expected)
built = f"CUDA {_C.cuda_version} ({_C.cuda_archs})" if _C.with_cuda else "CPU only"
print(f"wheel built {built}: same bits as torch {torch.__version__} on {', '.join(isas)}")
