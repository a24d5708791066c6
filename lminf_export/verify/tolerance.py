"""The largest error of a bundle's logits that passes, and the computation it is measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lminf_export.bundle.folder import Bundle
from lminf_export.models.rounded_rings import Int8Rings
from lminf_export.operator.reference_int8 import INT8_LIMIT
from lminf_export.tensors.torch_dtypes import torch_dtype
from lminf_export.verify.reference_model import Reference, ReferenceLogits
from lminf_export.verify.routing_check import Routed

# In float32: rounding of a few thousand terms, relative to the logits' range.
FLOAT32_TOLERANCE = 2e-5
# In lower precisions: twice the error of torch in that precision with the same mathematics.
LOW_PRECISION_FACTOR = 2.0


@dataclass(frozen=True)
class Precision:
    """How exactly a bundle computes.

    Attributes:
        bundle: the bundle.
    """

    bundle: Bundle

    @property
    def rounding(self) -> Bundle | None:
        """The bundle, if it lets onnxruntime round activations."""
        quantization = self.bundle.manifest.quantization
        return self.bundle if quantization is not None and quantization.rounds_activations else None

    @property
    def low_dtype(self) -> torch.dtype | None:
        """The dtype of the yardstick for a bundle that computes in less than float32."""
        dtype = self.bundle.manifest.dtype
        return None if dtype == "float32" and self.rounding is None else torch_dtype(dtype)

    def yardstick_dtypes(self, dtype: torch.dtype) -> list[torch.dtype]:
        """Return the element type of the yardstick; none where there is no yardstick.

        Args:
            dtype: in which the reference computes.
        """
        if self.low_dtype is not None:
            return [self.low_dtype]
        return [dtype] if self.bundle.manifest.contract.int8_cache else []

    def yardstick(
        self, reference: Reference, dtype: torch.dtype, routed: Routed | None = None
    ) -> ReferenceLogits | None:
        """Return logits of a correct computation with the bundle's rounding errors.

        In a lower precision, the reference in that precision. With rings of int8 alone, the
        reference with every value that float32 errors could push over a rounding tie rounded the
        other way. Otherwise None.

        Args:
            reference: whose logits the bundle's are compared with.
            dtype: in which the reference computes.
            routed: the experts that tokens meet.
        """
        if self.low_dtype is not None:
            return reference.logits(self.low_dtype, routed, rounding=self.rounding)
        if not self.bundle.manifest.contract.int8_cache:
            return None
        assert isinstance(reference.rounded, Int8Rings)
        other_side = replace(reference.rounded, tie_margin=INT8_LIMIT * FLOAT32_TOLERANCE)
        return replace(reference, rounded=other_side).logits(dtype, routed)

    def tolerance(self, error: float | None) -> float:
        """Return the largest error that passes.

        Args:
            error: the largest one of the yardstick, relative to the reference's range; None where
                there is no yardstick.
        """
        if error is None:
            return FLOAT32_TOLERANCE
        exact = self.low_dtype is None
        return FLOAT32_TOLERANCE + error if exact else LOW_PRECISION_FACTOR * error
