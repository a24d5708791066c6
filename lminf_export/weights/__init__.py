"""Weights, tensor by tensor, from the files of a checkpoint to one safetensors file.

Nothing is held but a block of a few megabytes: the destination is written as it is converted,
and what need not be converted is copied by the system. The bundle keeps the layouts of
transformers and its names (the checkpoint's own, but for what `conversion` renames and merges), so
any safetensors reader can open it, and the ONNX initializers point into it.
"""

from lminf_export.weights.graph import attach, link_weights
from lminf_export.weights.pieces import Converted, Entry, Piece, all_finite, read_chunks
from lminf_export.weights.reading import (
    FILE_NAME,
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    find_weights,
    read_checkpoint,
    read_checkpoint_file,
    read_header,
)
from lminf_export.weights.tensors import (
    BLOCK_BYTES,
    InFiles,
    PickledTensor,
    RawTensor,
    SourceTensor,
    StoredTensor,
)
from lminf_export.weights.types import STORED_TYPES, TORCH_TYPES, TYPE_NAMES, item_size
from lminf_export.weights.writing import Stopped, write_pieces

__all__ = [
    "BLOCK_BYTES",
    "FILE_NAME",
    "INDEX_NAME",
    "PICKLE_INDEX_NAME",
    "PICKLE_NAME",
    "STORED_TYPES",
    "TORCH_TYPES",
    "TYPE_NAMES",
    "Converted",
    "Entry",
    "InFiles",
    "PickledTensor",
    "Piece",
    "RawTensor",
    "SourceTensor",
    "Stopped",
    "StoredTensor",
    "all_finite",
    "attach",
    "find_weights",
    "item_size",
    "link_weights",
    "read_checkpoint",
    "read_checkpoint_file",
    "read_chunks",
    "read_header",
    "write_pieces",
]
