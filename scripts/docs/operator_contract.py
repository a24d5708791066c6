"""Files generated from the operator's contract: a C++ header and the tables of docs/operator.md.

The contract is lminf_export/operator/contract.py; `scripts/docs/write_all.py` writes both files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from lminf_export.operator import contract
from lminf_export.operator.contract import Operand
from lminf_export.operator.rope import BASE, NUM_DIGITS
from scripts.docs.tables import table

POINTEES = {"model": "void", "ring": "void", "int64": "std::int64_t", "float32": "float"}
FIELDS = {"int": ("std::int64_t", "0"), "float": ("float", "0.0f")}
LETTERS = {"R/2": "kRotaryPairs", "1": "kOne", "T": "kTableRows"}
ELEMENTS = {"model": "T", "ring": "T or int8"}
MOST_DIMENSIONS = max(
    operand.rank
    for operand in (*contract.inputs(key_bias=True), *contract.outputs(int8_cache=True))
)


def header() -> str:
    """Return the text of plugins/operator/contract.h."""
    inputs, outputs = contract.inputs(key_bias=True), contract.outputs(int8_cache=True)
    with_scales = len(contract.inputs(int8_cache=True))
    return _HEADER.format(
        domain=contract.DOMAIN,
        version=contract.VERSION,
        name=contract.OP_TYPE,
        int8_name=contract.INT8_CACHE_OP_TYPE,
        key_bias_name=contract.KEY_BIAS_OP_TYPE,
        table_rows=NUM_DIGITS * BASE,
        base=BASE,
        most_dimensions=MOST_DIMENSIONS,
        letters=", ".join(_letter(letter) for letter in _letters((*inputs, *outputs))),
        inputs=_enumerators(
            inputs,
            {
                "kNumInputs": len(contract.INPUTS),
                "kNumInt8CacheInputs": with_scales,
                "kNumKeyBiasInputs": len(inputs),
            },
        ),
        outputs=_enumerators(
            outputs,
            {"kNumOutputs": len(contract.OUTPUTS), "kNumInt8CacheOutputs": len(outputs)},
        ),
        input_table=_table(inputs),
        output_table=_table(outputs),
        sources="\n".join(f"    {_source(operand)}," for operand in outputs),
        attributes="\n".join(_attributes()),
        attribute_table="\n".join(_attribute_table()),
        fields="\n".join((*_fields(inputs, "const "), *_fields(outputs, ""))),
        assignments="\n".join(
            (
                *_assignments(contract.INPUTS, "inputs", "const "),
                *_assignments(contract.OUTPUTS, "outputs", ""),
                "  if (!int8Cache) return;",
                *_assignments(contract.SCALE_INPUTS, "inputs", "const "),
                *_assignments(contract.SCALE_OUTPUTS, "outputs", ""),
                "  if (!hasKeyBias) return;",
                *_assignments(contract.KEY_BIAS_INPUTS, "inputs", "const "),
            )
        ),
    )


def operands(kind: str) -> str:
    """The table of the operator's inputs or outputs, by `kind`: "input" or "output"."""
    groups = {
        "input": (
            (contract.INPUTS, ""),
            (contract.SCALE_INPUTS, "; only with an int8 cache"),
            (contract.KEY_BIAS_INPUTS, f"; only in {contract.KEY_BIAS_OP_TYPE}"),
        ),
        "output": ((contract.OUTPUTS, ""), (contract.SCALE_OUTPUTS, "; only with an int8 cache")),
    }[kind]
    rows = []
    for listed, note in groups:
        for operand in listed:
            element = ELEMENTS.get(operand.element, operand.element)
            shape = ", ".join(operand.shape)
            rows.append([f"`{operand.name}`", f"{element} ({shape})", operand.meaning + note])
    return table([kind, "type, shape", ""], rows, numbers=False)


def attributes() -> str:
    """The table of the operator's attributes."""
    rows = [[f"`{x.name}`", x.kind, x.meaning] for x in contract.ATTRIBUTES]
    return table(["attribute", "type", ""], rows, numbers=False)


TABLES: dict[str, Callable[..., str]] = {"operands": operands, "attributes": attributes}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _constant(name: str) -> str:
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def _letter(letter: str) -> str:
    return LETTERS.get(letter, f"k{letter}")


def _letters(operands: Iterable[Operand]) -> list[str]:
    return list(dict.fromkeys(letter for operand in operands for letter in operand.shape))


def _enumerators(operands: tuple[Operand, ...], counts: dict[str, int]) -> str:
    """Enumerate operands in order; a count has the value of the operand that follows it."""
    lines = []
    for index, operand in enumerate(operands):
        ended = [name for name, count in counts.items() if count == index]
        lines += [f"  {name}," for name in ended]
        lines.append(f"  {_constant(operand.name)}{' = ' + ended[-1] if ended else ''},")
    return "\n".join([*lines, *(f"  {name}," for name, n in counts.items() if n == len(operands))])


def _table(operands: Iterable[Operand]) -> str:
    return "\n".join(
        f'    {{"{x.name}", ElementKind::{_constant(x.element)}, {x.rank},\n'
        f"     {{{', '.join(f'Letter::{_letter(letter)}' for letter in x.shape)}}}}},"
        for x in operands
    )


def _source(output: Operand) -> str:
    past = output.name.replace("present_", "past_")
    return _constant(past) if past != output.name else "kNone"


def _attributes() -> Iterator[str]:
    for attribute in contract.ATTRIBUTES:
        kind, zero = FIELDS[attribute.kind]
        yield f"  // {attribute.meaning}\n  {kind} {_camel(attribute.name)} = {zero};"


def _attribute_table() -> Iterator[str]:
    for attribute in contract.ATTRIBUTES:
        member = f"&Attributes::{_camel(attribute.name)}"
        members = f"{member}, nullptr" if attribute.kind == "int" else f"nullptr, {member}"
        yield f'    {{"{attribute.name}", {members}}},'


def _fields(operands: Iterable[Operand], constant: str) -> Iterator[str]:
    for operand in operands:
        kind = ELEMENTS.get(operand.element, operand.element)
        yield f"  // {kind} ({', '.join(operand.shape)}): {operand.meaning}"
        yield f"  {constant}{POINTEES[operand.element]}* {_camel(operand.name)} = nullptr;"


def _assignments(operands: Iterable[Operand], array: str, constant: str) -> Iterator[str]:
    for operand in operands:
        address = f"{array}[{_constant(operand.name)}]"
        pointee = POINTEES[operand.element]
        if pointee != "void":
            address = f"static_cast<{constant}{pointee}*>({address})"
        yield f"  tensors.{_camel(operand.name)} = {address};"


_HEADER = """\
// The operator's inputs, outputs and attributes, in order.
//
// Written by scripts/docs/write_all.py from lminf_export/operator/contract.py, which says
// what the letters of shapes mean; do not edit.
#pragma once

#include <cstdint>

// clang-format off

namespace lminf {{

inline constexpr const char* kDomain = "{domain}";
inline constexpr int kVersion = {version};
inline constexpr const char* kName = "{name}";
// The same operator over rings of int8. Its scales follow the other inputs and outputs.
inline constexpr const char* kInt8CacheName = "{int8_name}";
// The same, where keys lie in the ring without their bias.
inline constexpr const char* kKeyBiasName = "{key_bias_name}";
// Digit tables: row kDigitBase · k + d is the rotation of position d · kDigitBaseᵏ.
inline constexpr std::int64_t kDigitBase = {base};
inline constexpr std::int64_t kTableRows = {table_rows};

enum Input : std::int32_t {{
{inputs}
}};

enum Output : std::int32_t {{
{outputs}
}};

// kModel is T, the type of activations; kRing is T too, but int8 with an int8 cache.
enum class ElementKind : std::int32_t {{ kModel, kRing, kInt64, kFloat32 }};

// Dimensions by name. kRotaryPairs is R/2; sinks have max(N, 1) slots.
enum class Letter : std::int32_t {{ {letters} }};

inline constexpr int kMostDimensions = {most_dimensions};

struct Operand {{
  const char* name;
  ElementKind element;
  int rank;
  Letter shape[kMostDimensions];
}};

inline constexpr Operand kInputs[kNumKeyBiasInputs] = {{
{input_table}
}};

inline constexpr Operand kOutputs[kNumInt8CacheOutputs] = {{
{output_table}
}};

// The input that an output is the updated state of, or kNone.
inline constexpr std::int32_t kNone = -1;
inline constexpr std::int32_t kUpdatedInput[kNumInt8CacheOutputs] = {{
{sources}
}};

// As on the node.
struct Attributes {{
{attributes}
}};

// One of the two members is null.
struct AttributeField {{
  const char* name;
  std::int64_t Attributes::*integer;
  float Attributes::*number;
}};

inline constexpr AttributeField kAttributes[] = {{
{attribute_table}
}};

// Addresses of the tensors of one call.
struct Tensors {{
{fields}
}};

// Takes addresses in the operator's order; those of scales only with an int8 cache, those of a
// bias only in the operator that has one.
inline void setTensors(Tensors& tensors, const void* const* inputs, void* const* outputs,
                       bool int8Cache, bool hasKeyBias) {{
{assignments}
}}

}}  // namespace lminf

// clang-format on
"""
