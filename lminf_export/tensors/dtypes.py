"""The element types of tensors, and what each library calls them. Imports no library.

Everything in the package that maps one name of an element type to another reads this table.
`tensors.torch_dtypes` and `export.onnx_dtypes` turn its rows into the objects of torch and ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementType:
    """One element type under the names that libraries have for it.

    Attributes:
        name: ours and torch's, which is ONNX's in a manifest.
        itemsize: bytes of an element.
        safetensors: name in the header of a safetensors file.
        onnx: member of `onnx_ir.DataType`, and of `onnx.TensorProto`.
        numpy: numpy's name of the type; where numpy has none, of the integer type of its width.
        tensorrt: member of `tensorrt.DataType`; None for a type that no input of an engine has.
    """

    name: str
    itemsize: int
    safetensors: str
    onnx: str
    numpy: str
    tensorrt: str | None = None

    @property
    def onnxruntime(self) -> str:
        """Type of a tensor as onnxruntime and ONNX operator schemas write it."""
        return f"tensor({self.onnx.lower()})"

    @property
    def triton(self) -> str:
        """Type as Triton's configurations write it, behind TYPE_."""
        if "INT" in self.onnx:
            return self.onnx
        return "BF16" if self.name == "bfloat16" else f"FP{8 * self.itemsize}"


_TABLE = (
    ElementType("float64", 8, "F64", "DOUBLE", "float64"),
    ElementType("float32", 4, "F32", "FLOAT", "float32", "FLOAT"),
    ElementType("float16", 2, "F16", "FLOAT16", "float16", "HALF"),
    ElementType("bfloat16", 2, "BF16", "BFLOAT16", "uint16", "BF16"),
    ElementType("float8_e4m3fn", 1, "F8_E4M3", "FLOAT8E4M3FN", "uint8"),
    ElementType("float8_e5m2", 1, "F8_E5M2", "FLOAT8E5M2", "uint8"),
    ElementType("float8_e8m0fnu", 1, "F8_E8M0", "FLOAT8E8M0", "uint8"),
    ElementType("uint8", 1, "U8", "UINT8", "uint8"),
    ElementType("int8", 1, "I8", "INT8", "int8", "INT8"),
    ElementType("int16", 2, "I16", "INT16", "int16"),
    ElementType("int32", 4, "I32", "INT32", "int32"),
    ElementType("int64", 8, "I64", "INT64", "int64", "INT64"),
)
ELEMENT_TYPES = {row.name: row for row in _TABLE}
BY_SAFETENSORS = {row.safetensors: row for row in _TABLE}

# Types of the weights, activations and caches of a bundle.
MODEL_DTYPES = ("float32", "float16", "bfloat16")
# Short names that a user may write for them.
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Types of a checkpoint's weights: each can be converted to any of MODEL_DTYPES.
WEIGHT_DTYPES = ("float64", *MODEL_DTYPES)


def item_size(dtype: str) -> int:
    """Return the bytes of one element of a type, by our name."""
    return ELEMENT_TYPES[dtype].itemsize


def safetensors_name(dtype: str) -> str:
    """Return the name of an element type in a safetensors file, by our name."""
    return ELEMENT_TYPES[dtype].safetensors
