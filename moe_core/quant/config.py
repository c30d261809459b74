"""How expert weights are quantised, as data: the schemes and :class:`QuantConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ..config_checks import is_int, require


@dataclass(frozen=True)
class Scheme:
    """What one scheme stores and what it does to activations; docs/quantisation.md has every layout.

    Args:
        code: what one stored weight is: ``e4m3``, ``int8``, ``int4`` or ``e2m1``.
        scales: which weights share a scale: a ``tensor``, a ``channel`` (row), a ``block`` of rows and columns, or a
            ``group`` of columns of one row.
        activations: what the input of each product is rounded to, ``e4m3`` or ``int8``; None leaves it alone.
        group: the only group size there is, where the format fixes it.
    """

    code: str
    scales: str
    activations: str | None = None
    group: int | None = None

    @property
    def packed(self) -> bool:
        """Whether two weights share a byte."""
        return self.code in ("int4", "e2m1")


SCHEMES: Final[Mapping[str, Scheme]] = MappingProxyType(
    {
        "fp8_tensor": Scheme("e4m3", "tensor", "e4m3"),
        "fp8_channel": Scheme("e4m3", "channel", "e4m3"),
        "fp8_block": Scheme("e4m3", "block", "e4m3"),
        "int8_w8a8": Scheme("int8", "channel", "int8"),
        "int8_weight_only": Scheme("int8", "group"),
        "int4_weight_only": Scheme("int4", "group"),
        "mxfp4": Scheme("e2m1", "group", group=32),
        "nvfp4": Scheme("e2m1", "group", group=16),
    }
)
QUANT_SCHEMES: Final = tuple(SCHEMES)
GROUP_SIZES: Final = (-1, 32, 64, 128)


@dataclass(frozen=True)
class QuantConfig:
    """How expert weights are quantised.

    Args:
        scheme: one of :data:`QUANT_SCHEMES` for the routed experts.
        shared_scheme: the same for the shared experts; None keeps them unquantised.
        group_size: weights of a row that share a scale in the ``int8_weight_only`` and ``int4_weight_only`` schemes; -1
            is one scale a row. The other schemes have no choice: leave it, or name the one that the format has.
        block_shape: (rows, columns) that share a scale in ``fp8_block``; activations share one over as many columns.
        symmetric: False where weights have zero points; weight-only integers alone have them.
        dtype: of hidden states and results, ``bfloat16``, ``float16`` or ``float32``: stored weights do not say.

    Raises:
        ConfigError: an unknown scheme, group size, block shape or dtype, or one that the schemes do not read.
    """

    scheme: str
    shared_scheme: str | None = None
    group_size: int = -1
    block_shape: tuple[int, int] | None = None
    symmetric: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("scheme", "shared_scheme"):
            value = getattr(self, field)
            if field == "scheme" or value is not None:
                require(value in SCHEMES, field, value, f"one of {', '.join(QUANT_SCHEMES)}", "choose one")
        self._check_groups()
        blocks = self.block_shape
        if self._any("scales", "block"):
            require(
                isinstance(blocks, tuple) and len(blocks) == 2 and all(is_int(b) and b > 0 for b in blocks),
                "block_shape",
                blocks,
                "two positive sizes with fp8_block",
                "pass (128, 128) as DeepSeek-V3 has it",
            )
        else:
            require(blocks is None, "block_shape", blocks, "None", "only fp8_block has a block shape")
        require(
            self.symmetric is True or (self.symmetric is False and self._integer_groups()),
            "symmetric",
            self.symmetric,
            "True, or False with int8_weight_only or int4_weight_only",
            "only they have zero points",
        )
        known = ("bfloat16", "float16", "float32")
        require(self.dtype in known, "dtype", self.dtype, f"one of {', '.join(known)}", "it is that of hidden_states")

    def group_of(self, scheme: str) -> int:
        """Columns of a row that share a scale in a scheme whose scales are groups'; -1 is all of them."""
        fixed = SCHEMES[scheme].group
        return self.group_size if fixed is None else fixed

    def scheme_of(self, field: str) -> str | None:
        """The scheme of a matrix by its field of MoEWeights, such as ``w13_weight``; None where it has none."""
        return self.shared_scheme if field.startswith("shared_") else self.scheme

    def _check_groups(self) -> None:
        size = self.group_size
        if self._integer_groups():
            allowed: tuple[int, ...] = GROUP_SIZES
        else:
            fixed = {group for name in self._names() if (group := SCHEMES[name].group) is not None}
            allowed = (-1, *fixed) if len(fixed) == 1 else (-1,)
        text = ", ".join(map(str, allowed))
        require(is_int(size) and size in allowed, "group_size", size, f"one of {text} with {self.scheme}", "choose one")

    def _names(self) -> list[str]:
        return [name for name in (self.scheme, self.shared_scheme) if name is not None]

    def _any(self, attribute: str, value: str) -> bool:
        return any(getattr(SCHEMES[name], attribute) == value for name in self._names())

    def _integer_groups(self) -> bool:
        return any(SCHEMES[n].scales == "group" and SCHEMES[n].group is None for n in self._names())
