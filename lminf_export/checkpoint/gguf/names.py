"""From the tensors of a GGUF model to those of transformers' model, without reading them.

The package `gguf` knows under which names models of transformers have a tensor. They are looked up
in that direction: for every tensor that the model of the configuration has, GGUF's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from lminf_export.checkpoint.conversion import Joined, Transposed
from lminf_export.checkpoint.gguf import layout, rope
from lminf_export.checkpoint.gguf.config import find_architecture
from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.checkpoint.gguf.settings import Architecture
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.gguf_blocks import GgufTensor
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import SourceTensor

_EXPERTS = re.compile(r"(?P<layer>.*\.(?P<number>\d+)\.)\w+\.experts\.(?P<part>\w+)")
_NORMS_OF_HEADS = re.compile(
    r".*\.(?P<number>\d+)\.\w+\.(?P<part>[qk])_layernorm\.norms\.(?P<head>\d+)"
)
_CORRECTION = re.compile(r".*\.(?P<number>\d+)\.mlp\.(gate\.)?e_score_correction_bias")
_QUERIES_KEYS = re.compile(r"blk\.\d+\.attn_(?P<part>[qk])\.(weight|bias)")
_NORM = re.compile(r"(.*_)?norm(_\d)?\.weight")
# Not weights: factors of rotations, read with the configuration.
_READ_ELSEWHERE = (rope.FREQS, rope.LONG, rope.SHORT)


def model_tensors(gguf: Gguf, skeleton: Skeleton) -> dict[str, SourceTensor]:
    """Describe the tensors of a model under the names of transformers' model.

    Args:
        gguf: the model.
        skeleton: of its configuration.

    Raises:
        ModelError: the file holds tensors that the model does not have, or of a type that is not
            read; the package gguf does not know the architecture.
    """
    return _Mapping(gguf, skeleton).tensors()


class _Mapping:
    def __init__(self, gguf: Gguf, skeleton: Skeleton) -> None:
        self._gguf, self._skeleton = gguf, skeleton
        self._architecture: Architecture = find_architecture(gguf)
        self._find = _name_finder(gguf)
        self._used: set[str] = set(_READ_ELSEWHERE)
        self._shapes = skeleton.shapes

    def tensors(self) -> dict[str, SourceTensor]:
        found = {}
        for name in self._shapes:
            tensor = self._tensor(name)
            if tensor is not None:
                found[name] = tensor
        left = [name for name in self._gguf.tensors if name not in self._used]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(
                f"GGUF file {shortened(self._gguf.name)} has tensor {shortened(left[0])}{more}, "
                f"which a {self._skeleton.config.model_type} model has not; it cannot be read"
            )
        return found

    def _tensor(self, name: str) -> SourceTensor | None:
        """Describe the tensor of a name of transformers' model; None where the file has none."""
        if match := _EXPERTS.fullmatch(name):
            return self._of_experts(name, match)
        if match := _NORMS_OF_HEADS.fullmatch(name.removesuffix(".weight")):
            number, part, head = match["number"], match["part"], int(match["head"])
            whole = self._take(f"blk.{number}.attn_{part}_norm.weight")
            if whole is None or len(whole.shape) != 2 or head >= whole.shape[0]:
                return None
            return whole.at(head)
        if match := _CORRECTION.fullmatch(name):
            return self._take(f"blk.{match['number']}.exp_probs_b.bias")
        base, _, suffix = name.rpartition(".")
        is_named = suffix in ("weight", "bias")
        own = self._find(base if is_named else name) or _unlisted(base)
        if own is None:
            return None
        source = self._take(f"{own}.{suffix}" if is_named else f"{own}.weight")
        if source is None:
            return None
        return self._arranged(f"{own}.{suffix}", name, source)

    def _arranged(self, own: str, name: str, source: GgufTensor) -> SourceTensor:
        """Undo what the conversion did to one tensor."""
        config = self._skeleton.config
        architecture = self._architecture
        heads, groups = _heads(config)
        rows, parts = source.shape[0], heads + 2 * groups
        if architecture.rotary and (match := _QUERIES_KEYS.fullmatch(own)):
            count = heads if match["part"] == "q" else groups
            if rows % (2 * count) == 0:
                source = layout.halves_from_pairs(source, count)
        elif "attn_qkv" in own and architecture.fused == "heads" and not rows % (3 * heads):
            source = layout.heads_from_parts(source, heads)
        elif "attn_qkv" in own and architecture.fused == "groups" and not rows % parts:
            source = layout.groups_from_parts(source, heads, groups)
        source = _fitted(source, self._shapes[name])
        if architecture.shifted_norms and _NORM.fullmatch(own.rpartition("blk.")[2]):
            return layout.Shifted(source, -1.0)
        return source.as_stored() or source

    def _of_experts(self, name: str, match: re.Match[str]) -> SourceTensor | None:
        """Describe a stack of experts: in one piece, or the gate and what it multiplies."""
        layer, part = f"blk.{match['number']}.", match["part"]
        kind = "bias" if part.endswith("bias") else "weight"
        part = part.removesuffix("_bias")
        if part == "down_proj":
            down = self._take(f"{layer}ffn_down_exps.{kind}")
            if down is None or kind == "bias":
                return down
            return self._turned(name, down)
        if part != "gate_up_proj":
            return None
        both = self._take(f"{layer}ffn_gate_up_exps.{kind}")
        if both is not None:
            return self._turned(name, both) if kind == "weight" else both
        gate = self._take(f"{layer}ffn_gate_exps.{kind}")
        up = self._take(f"{layer}ffn_up_exps.{kind}")
        if gate is None or up is None:
            return None
        if gate.shape != up.shape:
            raise ModelError(
                f"tensors ffn_gate_exps {list(gate.shape)} and ffn_up_exps {list(up.shape)} of "
                f"layer {match['number']} of GGUF file {shortened(self._gguf.name)} differ"
            )
        if self._skeleton.config.model_type == "gpt_oss":
            pair = layout.Interleaved(gate, up, 1)
            return pair if kind == "bias" else self._turned(name, pair)
        return Joined((gate, up), 1)

    def _turned(self, name: str, tensor: LazyTensor) -> SourceTensor:
        """Exchange the last dimensions where the model has them the other way round."""
        shape = tensor.shape
        if self._skeleton.config.model_type == "gpt_oss" and len(shape) == 3:
            return Transposed(tensor, 1, 2)
        return tensor

    def _take(self, own: str) -> GgufTensor | None:
        tensor = self._gguf.tensors.get(own)
        if tensor is not None:
            self._used.add(own)
            tensor.check_readable(own)
        return tensor


def _unlisted(name: str) -> str | None:
    """Return GGUF's name of a tensor that the package gguf lists under older names only."""
    match = re.fullmatch(r".*\.(\d+)\.block_sparse_moe\.router", name)
    return f"blk.{match[1]}.ffn_gate_inp" if match else None


def _fitted(tensor: GgufTensor, shape: tuple[int, ...]) -> GgufTensor:
    """Give a tensor the dimensions of 1 that the model has and the file has not."""
    if tensor.shape == shape or math.prod(tensor.shape) != math.prod(shape):
        return tensor
    is_same = [n for n in tensor.shape if n > 1] == [n for n in shape if n > 1]
    return tensor.reshaped(*shape) if is_same and shape[-1] == tensor.shape[-1] else tensor


def _heads(config: object) -> tuple[int, int]:
    """Return the heads of queries, and those of keys."""
    heads = next(
        int(getattr(config, name))
        for name in ("num_attention_heads", "n_head", "n_heads")
        if getattr(config, name, None)
    )
    names = ("num_kv_heads", "num_key_value_heads")
    groups = next((getattr(config, name) for name in names if getattr(config, name, None)), heads)
    return heads, int(groups)


def _name_finder(gguf: Gguf) -> Callable[[str], str | None]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from lminf_export.bundle.versions import package_version

    name = gguf.architecture
    architecture = next((key for key, value in MODEL_ARCH_NAMES.items() if value == name), None)
    if architecture is None:
        raise ModelError(
            f"GGUF file {shortened(gguf.name)} is of architecture {name!r}, which gguf "
            f"{package_version('gguf')} does not know; install a newer one"
        )
    known = get_tensor_name_map(architecture, gguf.num_layers)

    def find(name: str) -> str | None:
        # Some are listed as the model without its head has them.
        found: str | None = known.get_name(name) or known.get_name(name.partition(".")[2])
        return found

    return find
