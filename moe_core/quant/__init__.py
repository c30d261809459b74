"""Quantised experts: schemes, layouts, what stored weights mean, quantisation at load; docs/quantisation.md."""

from .config import QUANT_SCHEMES, SCHEMES, QuantConfig, Scheme
from .dequantise import dequantise
from .layout import Matrix, Part, matrices, quantised_parts
from .quantise import quantise

__all__ = [
    "QUANT_SCHEMES",
    "SCHEMES",
    "Matrix",
    "Part",
    "QuantConfig",
    "Scheme",
    "dequantise",
    "matrices",
    "quantise",
    "quantised_parts",
]
