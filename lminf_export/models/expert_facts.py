"""Mixtures of experts: names that families and graphs use. Imports neither torch nor onnx.

A family that names its router, its number of chosen experts or its groups of experts in a new way
is added here; `tests/test_experts.py` then covers it through its case in
`benchmarks/support/families.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Prefix of the graph values that hold each token's chosen experts, (T · k,) int64.
CHOICE_PREFIX = "chosen_experts."

# Settings of a configuration that give k, the experts of each token, the common one first.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
)
# Settings that give the number of groups of experts, and how many of them a token may use.
GROUP_COUNT_NAME, TOP_GROUPS_NAME = "n_group", "topk_group"

_ROUTER_WEIGHT = re.compile(r"(^|[._])(gate|router)\.(\w+\.)?weight$")


@dataclass(frozen=True)
class Groups:
    """How a router chooses groups of experts before it chooses experts, within those groups only.

    A group's score is the sum of the scores of its two best experts.

    Attributes:
        number: groups that the experts are divided into.
        top_k: groups that a token may use.
    """

    number: int = 1
    top_k: int = 1


NO_GROUPS = Groups()


def is_router_weight(name: str) -> bool:
    """Return whether a weight of this name belongs to a router."""
    return _ROUTER_WEIGHT.search(name) is not None


def has_experts(config: Any) -> bool:
    """Return whether a configuration has a setting of experts, under whatever name."""
    settings = ((name, value) for name, value in vars(config).items() if not name.startswith("_"))
    return any("expert" in name and bool(value) for name, value in settings)


def experts_per_token(config: Any) -> int | None:
    """Return k, the experts of each token; None for a model that does not name one number."""
    values = (getattr(config, name, None) for name in TOP_K_NAMES)
    return next((value for value in values if isinstance(value, int)), None)


def expert_groups(config: Any) -> Groups:
    """Return the groups of experts of a model; one group that holds all where it has none."""
    number = getattr(config, GROUP_COUNT_NAME, None) or 1
    return Groups(number, getattr(config, TOP_GROUPS_NAME, None) or number)
