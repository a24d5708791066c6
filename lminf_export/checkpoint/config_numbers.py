"""The numbers of a config.json, checked before any class of a model sees them.

A configuration of 2³¹ layers would be built until memory ends, even without weights. The bounds
are far beyond every model in use; within them a model is built in seconds on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lminf_export.errors import ModelError, shortened


@dataclass(frozen=True)
class _Bound:
    """Integers from least to most; null and lists of such integers are let through."""

    least: int
    most: int
    names: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.names, name) is not None


_BOUNDS = (
    _Bound(1, 2**10, r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers"),
    _Bound(1, 2**28, r"vocab_size"),
    _Bound(1, 2**22, r"hidden_size|intermediate_size|d_model|n_embd|d_ff|n_inner"),
    _Bound(1, 2**22, r"ffn_(dim|hidden_size)"),
    _Bound(0, 2**22, r"(moe|shared_expert|shared|dense)_intermediate_size|embedding_size"),
    _Bound(1, 2**14, r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads"),
    _Bound(1, 2**14, r"num_key_value_heads|num_kv_heads|n_kv_heads"),
    _Bound(1, 2**14, r"(global_|v_|swa_)?head_dim|qk_(nope|rope)_head_dim|kv_channels"),
    _Bound(0, 2**14, r"rotary_dim|kv_lora_rank|q_lora_rank"),
    _Bound(1, 2**40, r"(original_)?max_position_embeddings|n_positions|n_ctx"),
    _Bound(1, 2**40, r"max_seq(uence)?_len(gth)?|seq_length"),
    _Bound(0, 2**40, r"sliding_window(_size)?|attention_chunk_size"),
    _Bound(0, 2**15, r"(moe_)?num_(local_|shared_|routed_)?experts"),
    _Bound(0, 2**15, r"n_(routed|shared)_experts"),
    _Bound(0, 2**15, r"num_experts_per_tok|moe_(k|topk)|top_?k_?group|n_group"),
)  # fmt: skip
# Name → least (left out itself) and most of a real number.
_REALS: Mapping[str, tuple[float, float]] = {
    r"(rms_|layer_)?norm_eps(ilon)?|(rms|layer)_norm_eps(ilon)?": (-1e-30, 1.0),
    r"rope_theta|rotary_emb_base|rope_local_base_freq": (0.0, 1e15),
    r"partial_rotary_factor|rotary_pct": (0.0, 1.0),
}
# Under rope_parameters or rope_scaling.
_ROPE_REALS: Mapping[str, tuple[float, float]] = {
    r"factor": (0.0, 2.0**20),
    r"(low|high)_freq_factor|beta_(fast|slow)|(long|short)_factor": (0.0, 2.0**20),
    r"attention_factor": (0.0, 2.0**20),
}
_ALL_REALS = {**_REALS, **_ROPE_REALS}
_ROPE_LISTS = ("long_factor", "short_factor")
_MAY_BE_NONE = ("head_dim", "qk_rope_head_dim")
# Limits of time steps; the models that have them say "no limit" in this way.
_MAY_BE_INFINITE = re.compile(r"time_step_\w+")
_ROPE_TABLES = ("rope_parameters", "rope_scaling")
_DTYPES = ("dtype", "torch_dtype")
# Modules of experts that a model may have in all layers together.
_MOST_EXPERTS = 2**20


def check_config_numbers(content: Mapping[str, Any], model: str) -> None:
    """Check the sizes, counts and factors of a configuration.

    Args:
        content: of config.json, nested at most 32 levels.
        model: as the user named it, for messages.

    Raises:
        ModelError: a number is outside its bounds, not finite, or of another type.
    """
    for path, name, value in _entries(content):
        problem = _problem(path, name, value)
        if problem is not None:
            place = shortened(".".join(map(str, (*path, name))), 60)
            raise ModelError(
                f"config.json of model {shortened(repr(model))}: "
                f"{place}={shortened(repr(value), 40)}: {problem}"
            )
    for part in (content, *(x for x in content.values() if isinstance(x, dict))):
        _check_together(part, model)


def _check_together(part: Mapping[str, Any], model: str) -> None:
    heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ModelError(
            f"config.json of model {shortened(repr(model))}: num_attention_heads={heads} is not a "
            f"multiple of num_key_value_heads={groups}"
        )
    experts = max((_count(part, name) for name in part if "experts" in name), default=0)
    layers = max((_count(part, name) for name in part if _BOUNDS[0].matches(name)), default=0)
    if experts * layers > _MOST_EXPERTS:
        raise ModelError(
            f"config.json of model {shortened(repr(model))}: {layers} layers of {experts} experts "
            f"are more than the {_MOST_EXPERTS} experts that a model may have"
        )


def _count(part: Mapping[str, Any], name: str) -> int:
    value = part[name]
    return value if isinstance(value, int) else 0


def _entries(
    content: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield the path, name and value of every entry, the elements of lists under its name."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _entries(value, (*path, name))
            yield path, name, {}  # stands for a table: no number may be one
        elif isinstance(value, list):
            yield from _elements(value, path, name)
        else:
            yield path, name, value


def _elements(
    values: list[Any], path: tuple[str, ...], name: str
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    if (not path and name in _DTYPES) or name in _ROPE_TABLES or _is_single(path, name):
        yield path, name, values  # as it is: no rule lets a list pass
    for value in values:
        if isinstance(value, dict):
            yield from _entries(value, (*path, name))
        elif isinstance(value, list):
            yield from _elements(value, path, name)
        else:
            yield path, name, value


def _is_single(path: tuple[str, ...], name: str) -> bool:
    """Whether a name stands for one real number and never for a list of them."""
    return name not in _ROPE_LISTS and any(re.fullmatch(x, name) for x in _reals(path))


def _reals(path: tuple[str, ...]) -> Mapping[str, tuple[float, float]]:
    return _ALL_REALS if any(part in _ROPE_TABLES for part in path) else _REALS


def _is_count(name: str, value: Any) -> bool:
    """Whether a value is a whole number; musicflamingo has a maximum of 1200.0 positions."""
    if isinstance(value, float):
        return name == "max_position_embeddings" and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


@lru_cache(maxsize=4096)
def _bound_of(name: str) -> _Bound | None:
    return next((bound for bound in _BOUNDS if bound.matches(name)), None)


def _problem(path: tuple[str, ...], name: str, value: Any) -> str | None:
    """Return the rule that a value breaks."""
    if value is None:
        return None
    if name in _ROPE_TABLES:
        return None if isinstance(value, dict) else "must be a table"
    if not path and name in _DTYPES:
        return None if isinstance(value, str) else "must be the name of one element type"
    bound = _bound_of(name)
    if bound is not None:
        # A latent attention without rotation has heads of 0, in a text model of a larger whole.
        fewest = 0 if path and name in _MAY_BE_NONE else bound.least
        if _is_count(name, value) and fewest <= value <= bound.most:
            return None
        return f"must be an integer from {fewest} to {bound.most}"
    for pattern, (least, most) in _reals(path).items():
        if re.fullmatch(pattern, name):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and least < value <= most:
                return None
            return f"must be a number above {max(least, 0.0):g}, at most {most:g}"
    if isinstance(value, float) and not math.isfinite(value):
        return None if _MAY_BE_INFINITE.fullmatch(name) else "must be a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must be an integer of 64 bits"
    return None
