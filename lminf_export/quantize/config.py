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
LM_HEADS = ("auto", "same", "int8", "full")
EMBEDDINGS = ("auto", "quantized", "full")
FORMS = ("matmul_nbits", "qdq")
SCALES = ("search", "range")
SOURCE_BLOCKS = ("keep", "requantize")
MIXED = ("auto", "off")
# Field of `QuantizeConfig` → the values it may have, beside None where that is the default.
CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": WEIGHT_TYPES,
    "block_size": BLOCK_SIZES,
    "accuracy_level": ACCURACY_LEVELS,
    "lm_head": LM_HEADS,
    "embeddings": EMBEDDINGS,
    "form": FORMS,
    "scales": SCALES,
    "source_blocks": SOURCE_BLOCKS,
    "mixed": MIXED,
}
BITS = {"int4": 4, "int8": 8, "fp8": 8}
# Element types of weights that have one scale for each row.
CHANNEL_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}
DEFAULT_BLOCK_SIZE = 32
# Models of fewer features than this have little room for errors to average out, and most of their
# bytes in the table.
NARROW, NARROW_BLOCK_SIZE = 2048, 16
# Projections whose errors cost most for their bytes, by the ends of their modules' names; the first
# where keys and values are shared by groups of heads, the second in narrow models.
_SHARED, _SENSITIVE = ("k_proj", "v_proj"), ("up_proj",)


@dataclass(frozen=True)
class QuantizeConfig:
    """How the weights of projections are stored; norms, biases and routers stay as they are.

    Attributes:
        weights: "int4", "int8", or "fp8" (E4M3), which engines alone take.
        block_size: input features that share one scale: 16, 32, 64, 128 or 256; None is 16 for
            int4 of models narrower than 2,048 in blocks of onnxruntime, else 32. In the Q/DQ form
            8-bit weights have one scale for each output feature, as TensorRT wants it.
        symmetric: blocks are centred on zero; else each has a zero point as well. None is
            False for int4 in blocks of onnxruntime, True for all others.
        accuracy_level: 4 lets onnxruntime round activations to int8, block by block, which its
            fast kernels need; 1 keeps them in float32 (int8 weights are then very slow).
        lm_head: "same" as the other weights, "int8", or "full" for the element type; "auto" is
            "int8" for int4 and "same" for others.
        embeddings: "auto" quantises the table where it is the lm_head's too, so that it is
            stored once, and for int4 in every case, to 8 bits unless lm_head is "same";
            "quantized" and "full" decide it.
        form: "matmul_nbits" is onnxruntime's own operator, "qdq" a DequantizeLinear in front of
            each product, which TensorRT takes; None means "qdq" with an engine.
        scales: "search" chooses those of 4-bit blocks for the least squared error, "range" takes
            a block's largest weight or its extremes. Blocks of 8 bits have the latter.
        source_blocks: "keep" takes over the blocks of a GGUF file with their own values where a
            format here has them; "requantize" quantises what they stand for.
        mixed: "auto" stores as int8, beside int4 in blocks of onnxruntime, the projections of
            keys and values that groups of heads share and, of models narrower than 2,048, the
            up-projections; "off" does not.

    Raises:
        ConfigError: naming the field, its value and the rule it breaks.
    """

    weights: str
    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int = 4
    lm_head: str = "auto"
    embeddings: str = "auto"
    form: str | None = None
    scales: str = "search"
    source_blocks: str = "keep"
    mixed: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            allowed = (None, *choices) if name in ("form", "block_size") else choices
            # Users know the first by the name of the option.
            require_one_of("quantize" if name == "weights" else name, getattr(self, name), allowed)
        if self.symmetric is not None and not isinstance(self.symmetric, bool):
            raise ConfigError(f"symmetric={self.symmetric!r}: must be True, False or None")
        if self.form == "qdq" and self.symmetric is False:
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

    def is_symmetric(self, kind: str) -> bool:
        """Say whether blocks of a kind of weights are centred on zero, by default those of int8."""
        if self.symmetric is None:
            return kind != "int4" or self.form == "qdq"
        return self.symmetric

    def block_size_of(self, kind: str) -> int:
        """Return the block size of a kind of weights; int8 beside int4 needs no finer ones."""
        size = self.block_size or DEFAULT_BLOCK_SIZE
        return size if kind == self.weights else max(size, DEFAULT_BLOCK_SIZE)

    def projection_kind(self, module: str, rows: int, columns: int, width: int) -> str:
        """Return the kind of quantisation of a projection.

        Args:
            module: its name.
            rows: its output features.
            columns: its input features.
            width: of the model: features of a token.
        """
        if self.weights != "int4" or self.mixed == "off" or self.form == "qdq":
            return self.weights
        shared = module.endswith(_SHARED) and 2 * rows <= columns
        return "int8" if shared or (module.endswith(_SENSITIVE) and width < NARROW) else "int4"

    def for_width(self, width: int | None) -> QuantizeConfig:
        """Return the configuration with the block size that a model of a width has by default."""
        if self.block_size is not None:
            return self
        narrow = width is not None and width < NARROW
        fine = narrow and self.weights == "int4" and self.form != "qdq" and self.mixed == "auto"
        return replace(self, block_size=NARROW_BLOCK_SIZE if fine else DEFAULT_BLOCK_SIZE)

    @property
    def lm_head_kind(self) -> str | None:
        """Kind of quantisation of the lm_head; None where it keeps the element type."""
        of_auto = "int8" if self.weights == "int4" else self.weights
        kinds = {"auto": of_auto, "same": self.weights, "int8": "int8", "full": None}
        return kinds[self.lm_head]

    def table_kind(self, *, tied: bool) -> str | None:
        """Return the kind of quantisation of an embedding table; None where it stays in full.

        Args:
            tied: the lm_head reads it, too.
        """
        if self.form == "qdq" or self.embeddings == "full":
            return None
        if self.embeddings == "quantized" or tied:
            return self.lm_head_kind if tied else self.lm_head_kind or self.weights
        # Rows of 8 bits lose nothing beside weights of 4, and a table can be half of a model.
        return "int8" if (self.weights, self.lm_head_kind) == ("int4", "int8") else None


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
    if config.lm_head == "auto":
        config = replace(config, lm_head="int8" if config.weights == "int4" else "same")
    if config.form == "matmul_nbits" and dtype == "bfloat16":
        raise ConfigError(
            "dtype='bfloat16': onnxruntime's quantised product is exported in float32 and "
            "float16 only; choose one of them, or the Q/DQ form for engines"
        )
    return config
