"""Small wrong changes to files: JSON trees, bytes, safetensors headers and arrays."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

# Values that stand where another kind of value, or a sensible one, is expected.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31, -(2**31), 2**63, 10**30),
    *(0.0, -0.5, 0.5, 1e-300, 1e308, float("inf"), float("nan"), "", "x" * 5000, "32", "nan"),
    *("\x00", "../x", "/etc/passwd", "~", "日本語", "\ud800", "float99", "float16", "I64", "BOOL"),
    *([], {}, [[]], [1, 2], ["a"], {"a": 1}, [None] * 3, [0] * 100, [-1, 2**40]),
)
# Names that a reader may look for, with values that some of them have.
KEYS: tuple[tuple[str, Any], ...] = (
    ("is_causal", False),
    ("use_bidirectional_attention", True),
    ("is_decoder", False),
    ("is_encoder_decoder", True),
    ("sliding_window", 3),
    ("use_sliding_window", True),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    ("rope_parameters", {"rope_type": "llama3"}),
    ("rope_parameters", {"full_attention": {"rope_type": "linear"}}),
    ("partial_rotary_factor", 0.3),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("attn_implementation", "flash_attention_2"),
    ("tie_word_embeddings", True),
    ("torch_dtype", "bfloat16"),
    ("head_dim", 6),
    ("hidden_act", "no-such-function"),
    ("auto_map", {"AutoConfig": "code.Config"}),
    ("architectures", ["BertForMaskedLM"]),
    ("num_experts", 4),
    ("attention_bias", True),
    ("kv_lora_rank", 16),
    ("per_layer_config", [{}]),
)


# More than the header of a small GGUF file has, less than its tensors.
GGUF_HEADER = 6144


def mutate_json(content: Any, dice: random.Random) -> Any:
    """Return a copy of a JSON tree with one to three wrong places."""
    changed = json.loads(json.dumps(content))
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places or not isinstance(changed, (dict, list)):
            return _odd(dice)
        owner, key = dice.choice(places)
        dice.choice(_CHANGES)(owner, key, dice)
    return changed


def json_text(content: Any, dice: random.Random) -> bytes:
    """Write JSON as a file might hold it: now and then damaged, nested or with a doubled key."""
    text = json.dumps(content)
    fate = dice.random()
    if fate < 0.02:
        levels = dice.choice((50, 990, 10**5))
        text = text[:-1] + ', "x": ' + "[" * levels + "]" * levels + "}"
    elif fate < 0.04:
        text = text[:-1] + ", " + text[1:]
    raw = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(raw, dice) if 0.04 < fate < 0.1 else raw


def mutate_bytes(raw: bytes, dice: random.Random) -> bytes:
    """Flip, cut, repeat or insert some bytes."""
    changed = bytearray(raw)
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(len(changed) + 1)
        fate = dice.randrange(5)
        if fate == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << dice.randrange(8)
        elif fate == 1:
            del changed[place:]
        elif fate == 2:
            changed[place:place] = dice.randbytes(dice.choice((1, 4, 64)))
        elif fate == 3:
            del changed[place : place + dice.choice((1, 2, 8, 100))]
        else:
            changed[place:place] = changed[place : place + 16]
    return bytes(changed)


def mutate_gguf(raw: bytes, dice: random.Random) -> bytes:
    """Change the header of a GGUF file: mostly numbers and texts in their places."""
    header, rest = raw[:GGUF_HEADER], raw[GGUF_HEADER:]
    if dice.random() < 0.3:
        return mutate_bytes(header, dice) + rest
    changed = bytearray(header)
    for _ in range(dice.choice((1, 1, 2))):
        place, count = dice.randrange(len(changed)), dice.choice((1, 1, 4, 8))
        new = dice.choice((bytes(count), b"\xff" * count, dice.randbytes(count)))
        changed[place : place + count] = new[: len(changed) - place]
    return bytes(changed) + rest


def mutate_safetensors(raw: bytes, dice: random.Random) -> bytes:
    """Change a file of safetensors: mostly its header, whose length is right or wrong."""
    if dice.random() < 0.2:
        return mutate_bytes(raw[:4096], dice) + raw[4096:]
    (count,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + count]), raw[8 + count :]
    if dice.random() < 0.5:
        header = mutate_json(header, dice)
    else:
        _change_entry(header, dice)
    text = json_text(header, dice)
    length = len(text) if dice.random() < 0.9 else dice.choice((0, 1, 2**40, 2**63, len(text) + 8))
    if dice.random() < 0.1:
        body = body[: dice.randrange(len(body) + 1)]
    return struct.pack("<Q", length) + text + body


def _change_entry(header: dict[str, Any], dice: random.Random) -> None:
    """Change one tensor in a way that keeps the table plausible."""
    name = dice.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    fate = dice.randrange(6)
    if fate == 0:
        entry["dtype"] = dice.choice(("F16", "BF16", "I8", "F64", "I64", "BOOL", "F8_E4M3", "X"))
    elif fate == 1:
        entry["shape"] = entry["shape"][::-1]
    elif fate == 2:
        entry["shape"] = [*entry["shape"], dice.choice((1, 0, 2**62))]
    elif fate == 3:
        header[dice.choice(("x" * 5000, "", "lm_head.weight", "a.b"))] = header.pop(name)
    elif fate == 4:
        entry["data_offsets"] = [dice.choice((0, 1, 2**63)), dice.choice((0, 8, 2**63))]
    else:
        del header[name]


def mutate_npz(raw: bytes, dice: random.Random) -> bytes:
    """Change an npz file: its bytes, one of its arrays, or the JSON that one of them holds."""
    if dice.random() < 0.3:
        return mutate_bytes(raw, dice)
    with np.load(io.BytesIO(raw)) as found:
        arrays: dict[str, Any] = {name: found[name] for name in found.files}
    for _ in range(dice.choice((1, 1, 2))):
        name = dice.choice(list(arrays))
        if name == "meta" and dice.random() < 0.8:
            meta = mutate_json(json.loads(arrays[name].tobytes()), dice)
            arrays[name] = np.frombuffer(json_text(meta, dice), np.uint8)
        else:
            mutate_array(arrays, name, dice)
        if not arrays:
            break
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def mutate_array(arrays: dict[str, Any], name: str, dice: random.Random) -> None:
    """Change the type, the shape, the values or the name of one of some arrays."""
    array = arrays[name]
    fate = dice.randrange(8)
    if fate == 0:
        del arrays[name]
    elif fate == 1:
        kind = dice.choice((np.float64, np.int8, np.int64, np.uint16, np.complex64, "U8", "M8[s]"))
        arrays[name] = np.zeros(array.shape, kind)
    elif fate == 2:
        arrays[name] = array.reshape(-1)[: dice.randrange(array.size + 1)]
    elif fate == 3:
        arrays[name] = array[..., None]
    elif fate == 4:
        arrays[name] = np.full_like(array, dice.choice((0, 1, 127)))
    elif fate == 5:
        arrays[dice.choice(("x", "meta", "losses/lambda", "snapshot/lambda/x"))] = arrays.pop(name)
    elif fate == 6:
        arrays[name] = np.array(dice.choice((0, -1, 2**40)))
    else:
        arrays[name] = (array.astype(np.float64) * -3).astype(array.dtype)


def _places(node: Any) -> list[tuple[Any, Any]]:
    found, level = [], [node]
    while level:
        node = level.pop()
        if isinstance(node, dict):
            items: list[tuple[Any, Any]] = list(node.items())
        elif isinstance(node, list):
            items = list(enumerate(node[:64]))
        else:
            continue
        for key, child in items:
            found.append((node, key))
            level.append(child)
    return found


def _odd(dice: random.Random) -> Any:
    return copy.deepcopy(dice.choice(ODD))


def _put_odd(owner: Any, key: Any, dice: random.Random) -> None:
    owner[key] = _odd(dice)


def _scale(owner: Any, key: Any, dice: random.Random) -> None:
    value = owner[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        owner[key] = _odd(dice)
        return
    owner[key] = dice.choice(
        (value + 1, value - 1, value * 2, -value, float(value), str(value), [value], value * 0.5)
    )


def _delete(owner: Any, key: Any, dice: random.Random) -> None:
    if isinstance(owner, dict):
        del owner[key]
    else:
        owner.pop(key)


def _rename(owner: Any, key: Any, dice: random.Random) -> None:
    if isinstance(owner, dict):
        owner[dice.choice(("x", f"{key}_", "", "dtype", "y" * 5000))] = owner.pop(key)
    else:
        owner.insert(0, owner[key])


def _move(owner: Any, key: Any, dice: random.Random) -> None:
    other, place = dice.choice(_places(owner) or [(owner, key)])
    owner[key] = json.loads(json.dumps(other[place]))


def _add(owner: Any, key: Any, dice: random.Random) -> None:
    if isinstance(owner, dict):
        name, value = dice.choice(KEYS)
        owner[name] = json.loads(json.dumps(value))
    else:
        owner.append(_odd(dice))


_CHANGES: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    *(_put_odd, _put_odd, _put_odd, _scale, _scale, _delete, _rename, _move, _add),
)
