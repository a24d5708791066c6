"""The metadata of a GGUF model, read key by key with the types that are expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.gguf_blocks import GgufTensor

_MOST_LAYERS = 2**10


@dataclass(frozen=True)
class Gguf:
    """A model as its GGUF files describe it.

    Attributes:
        name: of the first file, without its folder.
        values: metadata by key, as `tensors.gguf_header.GgufFile` has it.
        tensors: of all files, by the names of GGUF.
    """

    name: str
    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture, the prefix of its keys."""
        found = self.text("general.architecture")
        if found is None:
            raise self.lacks("general.architecture")
        return found

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of a name; "{}" in it stands for the number of any layer."""
        if "{}" not in tensor:
            return tensor in self.tensors
        return any(tensor.format(layer) in self.tensors for layer in range(self.num_layers))

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the dimensions of a tensor that every such model has."""
        if tensor not in self.tensors:
            raise ModelError(f"GGUF file {shortened(self.name)} lacks tensor {tensor}")
        return self.tensors[tensor].shape

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.required("block_count", 1, _MOST_LAYERS)

    def own(self, key: str) -> str:
        """Return the whole name of a key of the architecture."""
        return key if key.split(".")[0] in ("general", "tokenizer") else self._prefix + key

    def text(self, key: str) -> str | None:
        """Return a string; None where there is none."""
        found = self.values.get(self.own(key) if key != "general.architecture" else key)
        if found is not None and not isinstance(found, str):
            raise self._wrong(key, found, "text")
        return found

    def number(self, key: str) -> float | None:
        """Return a finite number; None where there is none."""
        found = self.values.get(self.own(key))
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self._wrong(key, found, "a number")
        if not math.isfinite(found):
            raise self._wrong(key, found, "a finite number")
        # Stored in 32 bits: the shortest decimal that is this number there, as it was written.
        return float(str(np.float32(found))) if isinstance(found, float) else float(found)

    def integer(self, key: str) -> int | None:
        """Return an integer; of an array with an entry for each layer the one that all have.

        Raises:
            ModelError: it is none, or differs from layer to layer.
        """
        found = self.values.get(self.own(key))
        if isinstance(found, np.ndarray) and found.size:
            if len(set(found.tolist())) > 1:
                raise ModelError(
                    f"GGUF file {shortened(self.name)}: {self.own(key)} differs from layer to "
                    f"layer, which is not read for architecture {self.architecture!r}"
                )
            found = found.tolist()[0]
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int):
            raise self._wrong(key, found, "an integer")
        return found

    def flag(self, key: str) -> bool | None:
        """Return a boolean; None where there is none."""
        found = self.values.get(self.own(key))
        if found is not None and not isinstance(found, bool):
            raise self._wrong(key, found, "true or false")
        return found

    def flags(self, key: str) -> list[bool] | None:
        """Return an array of booleans, one for each layer; None where there is none."""
        found = self.values.get(self.own(key))
        if not isinstance(found, np.ndarray):
            return None
        if found.size != self.num_layers:
            raise self._wrong(key, f"{found.size} items", f"{self.num_layers}")
        return [bool(item) for item in found]

    def texts(self, key: str) -> list[str]:
        """Return a list of strings; empty where there is none."""
        found = self.values.get(self.own(key), [])
        if not isinstance(found, list):
            if isinstance(found, np.ndarray) and not found.size:
                return []
            raise self._wrong(key, found, "a list of texts")
        return found

    def numbers(self, key: str) -> list[Any]:
        """Return an array of numbers as a list; empty where there is none."""
        found = self.values.get(self.own(key))
        if found is None or (isinstance(found, list) and not found):
            return []
        if not isinstance(found, np.ndarray):
            raise self._wrong(key, found, "a list of numbers")
        return found.tolist()

    def required(self, key: str, least: int, most: int) -> int:
        """Return an integer that every model has.

        Raises:
            ModelError: it is not there, or outside of its bounds.
        """
        found = self.integer(key)
        if found is None:
            raise self.lacks(self.own(key))
        if not least <= found <= most:
            raise self._wrong(key, found, f"an integer from {least} to {most}")
        return found

    def lacks(self, key: str) -> ModelError:
        """Return the error for a key that is not there."""
        return ModelError(
            f"GGUF file {shortened(self.name)} lacks {key}: it holds no language model, or is "
            f"damaged"
        )

    @property
    def _prefix(self) -> str:
        return f"{self.architecture}."

    def _wrong(self, key: str, found: object, expected: str) -> ModelError:
        return ModelError(
            f"GGUF file {shortened(self.name)}: {shortened(self.own(key))} is "
            f"{shortened(repr(found), 40)}, and {expected} is expected; the file is damaged"
        )
