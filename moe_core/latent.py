"""The width in which the routed experts work: transforms, padding and truncation.

Gate and shared experts always see the layer's own input. A latent layer's routed experts see the input transform's
rows; where the experts were padded (``moe_latent_size`` above what the transform returns) zeros are appended, and the
same columns are cut off before the output transform. A kernel that needs a wider row than the config says pads inside
its own stage and may leave its padding in ``ExpertsOut.value``: it is cut off before the reduce stage sees it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .config import MoEConfig
from .errors import ConfigError, InputError, StageError


def check_transforms(config: MoEConfig, has_input: bool, has_output: bool) -> None:
    """Compare the transforms that the caller passed with ``moe_latent_size``.

    Raises:
        ConfigError: a latent layer without one of them.
    """
    if config.expert_hidden_size == config.hidden_size:
        return
    for name, present, way in (
        ("routed_input_transform", has_input, (config.hidden_size, config.expert_hidden_size)),
        ("routed_output_transform", has_output, (config.expert_hidden_size, config.hidden_size)),
    ):
        if not present:
            raise ConfigError(
                f"moe_latent_size={config.moe_latent_size}, but {name}=None: expected a function from [T, {way[0]}] to "
                f"[T, {way[1]}]; pass it to MoERunner, or leave moe_latent_size=None"
            )


def fit_input(config: MoEConfig, transformed: object, tokens: int) -> Tensor:
    """What the input transform returned, as [T, expert_hidden_size].

    Raises:
        InputError: it is no tensor of T rows, or its rows do not fit the experts.
    """
    width = config.expert_hidden_size
    if not isinstance(transformed, Tensor) or transformed.ndim != 2 or transformed.shape[0] != tokens:
        found = tuple(transformed.shape) if isinstance(transformed, Tensor) else type(transformed).__name__
        raise InputError(f"routed_input_transform returned {found}, expected a tensor [{tokens}, {width}]")
    missing = width - transformed.shape[1]
    if missing < 0 or (missing > 0 and config.moe_latent_size is None):
        raise InputError(
            f"routed_input_transform returned rows of {transformed.shape[1]}, expected "
            f"{width if config.moe_latent_size is None else f'at most {width}'}, the width of the routed experts; mend "
            f"the transform, or set moe_latent_size to the width of its experts"
        )
    return F.pad(transformed, (0, missing)) if missing else transformed.contiguous()


def truncate(value: Tensor, width: int, backend: str) -> Tensor:
    """The first ``width`` columns of the routed experts' output; what lies behind is a kernel's padding.

    Raises:
        StageError: there are fewer.
    """
    if value.shape[-1] < width:
        raise StageError(
            f"stage experts of backend {backend} returned rows of {value.shape[-1]}, expected {width} (or more, the "
            f"padding of its kernel behind them)"
        )
    return value[..., :width]
