"""Choices of whoever loads a bundle; imports no runtime, so that help texts cost nothing."""

from __future__ import annotations

from typing import Literal, get_args

# onnxruntime's execution providers, by the names that options have for them.
Provider = Literal["cpu", "cuda"]
PROVIDERS: tuple[str, ...] = get_args(Provider)
