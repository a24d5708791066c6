"""The largest error of a bundle's logits that passes, and the computation it is measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lminf_export.bundle.folder import Bundle
from lminf_export.tensors.torch_dtypes import torch_dtype
from lminf_export.verify.recorded_rings import RecordedRings
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

    def yardstick_dtypes(self) -> list[torch.dtype]:
        """Return the element type of the yardstick; none where there is no yardstick."""
        return [] if self.low_dtype is None else [self.low_dtype]

    def yardstick(
        self, reference: Reference, routed: Routed | None = None
    ) -> ReferenceLogits | None:
        """Return logits of a correct computation with the bundle's rounding errors.

        In a lower precision, the reference in that precision; otherwise None.

        Args:
            reference: whose logits the bundle's are compared with.
            routed: the experts that tokens meet.
        """
        if self.low_dtype is None:
            return None
        if isinstance(reference.rounded, RecordedRings):
            reference = replace(reference, rounded=replace(reference.rounded, is_checked=False))
        return reference.logits(self.low_dtype, routed, rounding=self.rounding)

    def tolerance(self, error: float | None) -> float:
        """Return the largest error that passes.

        Args:
            error: the largest one of the yardstick, relative to the reference's range; None where
                there is no yardstick.
        """
        return FLOAT32_TOLERANCE if error is None else LOW_PRECISION_FACTOR * error
