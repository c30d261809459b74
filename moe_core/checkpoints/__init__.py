"""Checkpoints in safetensors, straight into MoEWeights and back; docs/checkpoints.md says which layouts are known."""

from ..selfcheck import check_layout
from .detect import detect_layout, layer_prefixes
from .files import CheckpointFiles
from .layout import Entry, Layout
from .load import load_weights
from .save import checkpoint_tensors, save_weights

__all__ = [
    "CheckpointFiles",
    "Entry",
    "Layout",
    "check_layout",
    "checkpoint_tensors",
    "detect_layout",
    "layer_prefixes",
    "load_weights",
    "save_weights",
]
