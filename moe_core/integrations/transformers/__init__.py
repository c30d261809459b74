"""moe_core inside transformers: its experts implementation, and its MoE blocks replaced.

    from moe_core.integrations.transformers import convert_model, register

    register()                                       # then: from_pretrained(..., experts_implementation="moe_core")
    replaced = convert_model(model)                  # or: whole blocks, router and shared experts included

Needs transformers 5.17 or later. docs/transformers.md says what converts how, and what raises.
"""

from .block import ConvertedBlock
from .convert import convert_block, convert_model
from .modules import ConvertedExperts
from .register import register

__all__ = ["ConvertedBlock", "ConvertedExperts", "convert_block", "convert_model", "register"]
