"""The bias that an attention module's projection adds to every key, by the names in the module.

A ring of int8 keeps it out of what it rounds. Any (G, D) numbers give the same attention in exact
arithmetic, so a bias that is not found, or that the model scales afterwards, costs precision of the
ring and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# Projections to keys alone, and to query, key and value of each head in turn.
_OF_KEYS = ("k_proj", "key")
_OF_ALL = ("query_key_value",)
# A norm between projection and attention: keys do not hold the bias as it is.
_NORMS = ("k_norm", "key_norm", "k_layernorm", "key_layernorm", "k_layer_norm")


def bias_of_keys(module: nn.Module, num_kv_heads: int, head_dim: int) -> Tensor | None:
    """Return the bias (G, D) of a module's keys, None where it has none or it is not recognised.

    Args:
        module: an attention module of transformers.
        num_kv_heads: G.
        head_dim: D.
    """
    found = _parameter(module)
    if found is None:
        return None
    is_of_all, bias = found
    size = num_kv_heads * head_dim
    if bias.numel() != (3 * size if is_of_all else size):
        return None
    if is_of_all:
        return bias.reshape(num_kv_heads, 3, head_dim)[:, 1]
    return bias.reshape(num_kv_heads, head_dim)


def named_key_biases(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Yield the names of the parameters that hold biases of keys.

    With each comes whether it holds those of queries and values too, head by head in threes.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        found = _parameter(module) if hasattr(module, "layer_idx") else None
        if found is not None and id(found[1]) in names:
            yield names[id(found[1])], found[0]


def _parameter(module: nn.Module) -> tuple[bool, Tensor] | None:
    if any(getattr(module, name, None) is not None for name in _NORMS):
        return None
    for names, is_of_all in ((_OF_KEYS, False), (_OF_ALL, True)):
        for name in names:
            bias = getattr(getattr(module, name, None), "bias", None)
            if isinstance(bias, Tensor):
                return is_of_all, bias
    return None
