"""The user's settings for an engine's builder, checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from lminf_export.errors import EngineError
from lminf_export.operator.settings import as_integer, require_one_of
from lminf_export.runtime.cache_use import CACHE_ALIASING, DECLARED

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
BUILDERS = (TENSORRT, TENSORRT_RTX)
# In the place of a builder's name: write the files that a build on another machine needs.
ELSEWHERE = "none"
NO_PLUGIN = "none"
MAX_OPTIMIZATION_LEVEL = 5
# For each setting with a few values, those.
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType({"cache_aliasing": CACHE_ALIASING})

_SIZE = re.compile(r"(\d+)\s*([KMG]?)(?:I?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine's build; None leaves a choice to the builder.

    Attributes:
        plugin: the library of the plugin, "none" for an engine of standard operators, or None
            for the library that was built or installed with this package.
        embed_plugin: put the library into the plan instead of beside it.
        timing_cache: file in which the builder keeps its timings, made if missing.
        workspace: bytes of GPU memory one layer may use while it works, or "512M", "2G".
        builder_optimization_level: 0 … 5, how long the builder looks for a fast engine.
        cache_aliasing: how TensorRT learns that the plugin updates caches in place: "declared"
            by the plugin, or "bound" without a word, past and present being given one address.

    Raises:
        EngineError: naming the setting, its value and the rule it breaks.
    """

    plugin: str | Path | None = None
    embed_plugin: bool = False
    timing_cache: str | Path | None = None
    workspace: int | str | None = None
    builder_optimization_level: int | None = None
    cache_aliasing: str = DECLARED

    def __post_init__(self) -> None:
        if self.workspace is not None:
            object.__setattr__(self, "workspace", _bytes(self.workspace))
        level = self.builder_optimization_level
        if level is not None:
            level = as_integer("builder_optimization_level", level, 0, EngineError)
            if level > MAX_OPTIMIZATION_LEVEL:
                raise EngineError(
                    f"builder_optimization_level={level}: must be 0 … {MAX_OPTIMIZATION_LEVEL}"
                )
            object.__setattr__(self, "builder_optimization_level", level)
        require_one_of("cache_aliasing", self.cache_aliasing, CACHE_ALIASING, EngineError)
        if self.without_plugin and self.embed_plugin:
            raise EngineError("embed_plugin: there is no plugin to embed with plugin='none'")
        if self.without_plugin and not self.declares_aliases:
            raise EngineError(
                f"cache_aliasing={self.cache_aliasing!r}: is a setting of the plugin, and "
                "plugin='none'"
            )

    @property
    def without_plugin(self) -> bool:
        """Whether the engine is to be made of standard operators alone."""
        return self.plugin is not None and str(self.plugin) == NO_PLUGIN

    @property
    def declares_aliases(self) -> bool:
        """Whether TensorRT is told that the plugin updates caches in place."""
        return self.cache_aliasing == DECLARED

    @property
    def asked_for(self) -> tuple[str, ...]:
        """Names of the settings that are not at their default."""
        return tuple(x.name for x in fields(self) if getattr(self, x.name) != x.default)

    def described(self) -> dict[str, str]:
        """Return the settings that the manifest records; paths are not among them."""
        record = {}
        if self.workspace is not None:
            record["workspace"] = str(self.workspace)
        if self.builder_optimization_level is not None:
            record["builder_optimization_level"] = str(self.builder_optimization_level)
        if not self.declares_aliases:
            record["cache_aliasing"] = self.cache_aliasing
        return record


def _bytes(value: int | str) -> int:
    """Read a size in bytes, such as 1048576 or "2G"; units are powers of 1024."""
    number, unit = value, ""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise EngineError(
                f"workspace={value!r}: must be a size in bytes, or one such as 512M or 2G"
            )
        number, unit = int(match[1]), match[2].upper()
    return as_integer("workspace", number, 1, EngineError) * _UNITS[unit]
