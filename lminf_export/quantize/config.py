"""The settings of the quantisation of weights, and the checks of their combinations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lminf_export.errors import ConfigError
from lminf_export.operator.settings import require_one_of

WEIGHT_TYPES = ("int4", "int8", "fp8")
BLOCK_SIZES = (16, 32, 64, 128, 256)
# onnxruntime's numbers: activations are multiplied in float32, or rounded to int8 in blocks.
ACCURACY_LEVELS = (1, 4)
LM_HEADS = ("same", "int8", "full")
EMBEDDINGS = ("auto", "quantized", "full")
FORMS = ("matmul_nbits", "qdq")
# Field of `QuantizeConfig` → the values it may have, beside None where that is the default.
CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": WEIGHT_TYPES,
    "block_size": BLOCK_SIZES,
    "accuracy_level": ACCURACY_LEVELS,
    "lm_head": LM_HEADS,
    "embeddings": EMBEDDINGS,
    "form": FORMS,
}
BITS = {"int4": 4, "int8": 8, "fp8": 8}
# Element types of weights that have one scale for each row.
CHANNEL_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}
DEFAULT_BLOCK_SIZE = 32


@dataclass(frozen=True)
class QuantizeConfig:
    """How the weights of projections are stored; norms, biases and routers stay as they are.

    Attributes:
        weights: "int4", "int8", or "fp8" (E4M3), which engines alone take.
        block_size: input features that share one scale: 16, 32, 64, 128 or 256. In the Q/DQ
            form 8-bit weights have one scale for each output feature, as TensorRT wants it.
        symmetric: blocks are centred on zero; else each has a zero point as well.
        accuracy_level: 4 lets onnxruntime round activations to int8, block by block, which its
            fast kernels need; 1 keeps them in float32 (int8 weights are then very slow).
        lm_head: "same" as the other weights, "int8", or "full" for the element type.
        embeddings: "auto" quantises the table where it is the lm_head's too, so that it is
            stored once; "quantized" and "full" decide it.
        form: "matmul_nbits" is onnxruntime's own operator, "qdq" a DequantizeLinear in front of
            each product, which TensorRT takes; None means "qdq" with an engine.

    Raises:
        ConfigError: naming the field, its value and the rule it breaks.
    """

    weights: str
    block_size: int = DEFAULT_BLOCK_SIZE
    symmetric: bool = True
    accuracy_level: int = 4
    lm_head: str = "same"
    embeddings: str = "auto"
    form: str | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            allowed = (None, *choices) if name == "form" else choices
            # Users know the first by the name of the option.
            require_one_of("quantize" if name == "weights" else name, getattr(self, name), allowed)
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"symmetric={self.symmetric!r}: must be True or False")
        if self.form == "qdq" and not self.symmetric:
            raise ConfigError(
                "symmetric=False: the Q/DQ form for engines has no zero points; quantise "
                "symmetrically"
            )
        if self.form == "qdq" and self.embeddings == "quantized":
            raise ConfigError(
                "embeddings='quantized': the Q/DQ form for engines keeps the table in full; "
                "use 'auto' or 'full'"
            )

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return BITS[self.weights]

    @property
    def lm_head_kind(self) -> str | None:
        """Kind of quantisation of the lm_head; None where it keeps the element type."""
        return {"same": self.weights, "int8": "int8", "full": None}[self.lm_head]


def decide_form(
    asked: str | QuantizeConfig | None, dtype: str, *, with_engine: bool
) -> QuantizeConfig | None:
    """Return the configuration meant by "int4" or "int8" or given in full, its form decided.

    Args:
        asked: the user's setting; None for no quantisation.
        dtype: element type of activations.
        with_engine: whether an engine is built, which takes the Q/DQ form alone.

    Raises:
        ConfigError: for settings that do not go together.
    """
    if asked is None:
        return None
    config = asked if isinstance(asked, QuantizeConfig) else QuantizeConfig(asked)
    if with_engine and config.form == "matmul_nbits":
        raise ConfigError("form='matmul_nbits': an engine takes the Q/DQ form only; use 'qdq'")
    if config.weights == "fp8" and (config.form or ("qdq" if with_engine else "")) != "qdq":
        raise ConfigError(
            "quantize='fp8': only engines take fp8 weights; name an engine in --out, ask for the "
            "Q/DQ form, or use int8"
        )
    if config.form is None:
        config = replace(config, form="qdq" if with_engine else "matmul_nbits")
    if config.form == "matmul_nbits" and dtype == "bfloat16":
        raise ConfigError(
            "dtype='bfloat16': onnxruntime's quantised product is exported in float32 and "
            "float16 only; choose one of them, or the Q/DQ form for engines"
        )
    return config
