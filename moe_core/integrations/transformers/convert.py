"""convert_block and convert_model: transformers' MoE blocks, replaced by moe_core's."""

from __future__ import annotations

import logging

from torch import nn

from ...errors import ConfigError, ConversionError, WeightsError
from .adapters import ADAPTERS
from .block import convert_known
from .experts import READERS, is_decorated
from .own_router import OWN_ROUTER, BlockWithOwnRouter, convert_experts

logger = logging.getLogger("moe_core")


def convert_block(block: nn.Module) -> nn.Module:
    """Replace one MoE block of transformers.

    Args:
        block: a block (router, routed and shared experts), or a routed experts module on its own. It is not changed,
            but shares its parameters, and its router's module, with the result.
    Returns:
        a module with the same parameters (shared, not copied, where the layout allows), the same state_dict and the
        same results. Its ``report`` says what serves it.
    Raises:
        ConversionError: names the class, attribute or setting that was not recognised.
    """
    name = type(block).__name__
    try:
        if name in ADAPTERS:
            return convert_known(block, ADAPTERS[name])
        if name in OWN_ROUTER:
            return BlockWithOwnRouter(block, OWN_ROUTER[name])
        if is_experts(block) or name.endswith("Experts"):
            return convert_experts(block)
    except ConversionError:
        raise
    except (ConfigError, WeightsError) as error:
        raise ConversionError(f"{name} describes a layer that moe_core refuses: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise ConversionError(
            f"{name} has a known name and is not what it names: {type(error).__name__}: {error}; was it changed, "
            f"wrapped or quantised? Use moe_core.MoERunner with its weights"
        ) from error
    raise ConversionError(_not_recognised(block))


def convert_model(model: nn.Module) -> list[str]:
    """Replace every MoE block of ``model`` in place.

    Experts whose router lives in the decoder layer itself, or in a block that is not known, are replaced alone; what
    held them goes on calling its router.

    Returns:
        the names of what was replaced, in the order of the model's modules.
    Raises:
        ConversionError: there is nothing to replace, or something in a block was not recognised; the model is not
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model is a {type(model).__name__}, expected an nn.Module")
    converted: dict[int, nn.Module] = {}
    replacements: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{done}.") for done in replacements) or not _is_known(module):
            continue
        if not name:
            raise ConversionError(f"{type(model).__name__} is an MoE block itself; pass it to convert_block")
        if id(module) not in converted:
            converted[id(module)] = convert_block(module)
        replacements[name] = converted[id(module)]
    if not replacements:
        raise ConversionError(
            f"{type(model).__name__} holds no MoE block that is known here; convert_model replaces {_known()}"
        )
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement)
    logger.info("replaced %d MoE blocks of %s", len(replacements), type(model).__name__)
    return list(replacements)


def is_experts(module: nn.Module) -> bool:
    """Whether it is a routed experts module, of transformers or decorated as its are."""
    return type(module).__name__ in READERS or (isinstance(module, nn.Module) and is_decorated(module))


def _is_known(module: nn.Module) -> bool:
    name = type(module).__name__
    own = OWN_ROUTER.get(name)
    return name in ADAPTERS or (own is not None and not own.holds_blocks) or is_experts(module)


def _known() -> str:
    return f"{', '.join(ADAPTERS)}, {', '.join(OWN_ROUTER)}, {', '.join(READERS)} and decorated experts modules"


def _not_recognised(block: nn.Module) -> str:
    name = type(block).__name__
    if not isinstance(block, nn.Module):
        return f"block is a {name}, expected an nn.Module"
    children = ", ".join(child for child, _ in block.named_children()) or "none"
    held: list[str] = []
    for child, module in block.named_modules():
        if _is_known(module) and not any(child.startswith(f"{other}.") for other in held):
            held.append(child)
    if held:
        return (
            f"{name} is not recognised as an MoE block, but holds {', '.join(held)}: convert_model replaces these in "
            f"place, and convert_block takes one (submodules of {name}: {children})"
        )
    return (
        f"{name} is not recognised as an MoE block (its submodules: {children}); use moe_core.MoERunner with its "
        f"weights; known are {_known()}"
    )
