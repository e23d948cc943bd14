"""Converted layers: ordinary modules on int8 and uint8 tensors. Importing this package fills core's lowering table."""

from qkernels.nn.base import QLayer
from qkernels.nn.conv import QConv
from qkernels.nn.dynamic import QDynamicLinear
from qkernels.nn.elementwise import QAdd, QCat, QLookup, QMul
from qkernels.nn.embedding import QEmbedding
from qkernels.nn.io import Dequantize, FakeQuantize, Quantize
from qkernels.nn.linear import QLinear
from qkernels.nn.pool import QAdaptiveAvgPool, QAvgPool, QInterpolate, QMaxPool

__all__ = [
    "Dequantize",
    "FakeQuantize",
    "QAdaptiveAvgPool",
    "QAdd",
    "QAvgPool",
    "QCat",
    "QConv",
    "QDynamicLinear",
    "QEmbedding",
    "QInterpolate",
    "QLayer",
    "QLinear",
    "QLookup",
    "QMaxPool",
    "QMul",
    "Quantize",
]
