"""GGUF files as a user has them: split, in a folder, damaged, of other kinds."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.support.gguf_files import save_gguf
from lminf_export.checkpoint.gguf.architectures import ARCHITECTURES
from lminf_export.checkpoint.opening import open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.checkpoint.stock import stock_model
from lminf_export.errors import ModelError
from lminf_export.tensors.gguf_header import read_gguf
from tests.support.memory import MIB, peak_of
from tests.support.tiny_models import save_llama

MODEL = "m.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama; beside it the same as GGUF, whole and in three parts."""
    place = tmp_path_factory.mktemp("gguf")
    model = save_llama(place / "model")
    save_gguf(model, place / "whole" / MODEL)
    save_gguf(model, place / "split" / MODEL, shard_tensors=12)
    return place


@pytest.fixture
def whole(folder, tmp_path) -> Path:
    path = tmp_path / MODEL
    path.write_bytes((folder / "whole" / MODEL).read_bytes())
    return path


def read(path: Path) -> object:
    return stock_model(open_checkpoint(open_source(path)))


def names_of(path: Path) -> set[str]:
    return set(open_checkpoint(open_source(path)).tensors)


def test_any_part_of_a_split_model_finds_the_others(folder):
    parts = sorted((folder / "split").glob("*.gguf"))
    assert len(parts) == 3
    wanted = names_of(folder / "whole" / MODEL)
    for path in (*parts, folder / "split", folder / "whole"):
        assert names_of(path) == wanted
    source = open_source(parts[1])
    assert source.name == "m-00001-of-00003.gguf"


def test_a_file_that_is_not_there_is_not_looked_up_as_a_hub_id(tmp_path):
    with pytest.raises(ModelError, match=r"other\.gguf': no such file here"):
        open_source(tmp_path / "other.gguf")


def test_a_missing_part_is_named(folder, tmp_path):
    for path in sorted((folder / "split").glob("*.gguf"))[:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in (tmp_path / "m-00001-of-00003.gguf", tmp_path):
        with pytest.raises(ModelError, match=r"part m-00003-of-00003.gguf of .* in 3 parts is"):
            open_source(path)


def test_parts_of_other_models_are_refused(folder, tmp_path):
    parts = sorted((folder / "split").glob("*.gguf"))
    for index, name in enumerate(("1", "2", "3")):
        source = parts[0 if name == "2" else index]
        (tmp_path / f"m-0000{name}-of-00003.gguf").write_bytes(source.read_bytes())
    with pytest.raises(ModelError, match="says it is part 0 and is named as part 1"):
        open_source(tmp_path)
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelError, match="is one of 3 parts, and its name does not say so"):
        open_source(alone)
    wrong = tmp_path / "m-00004-of-00003.gguf"
    wrong.write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelError, match="is no part of a split model"):
        open_source(wrong)


def test_of_several_models_in_a_folder_one_is_to_be_named(whole):
    other = whole.with_name("other.gguf")
    other.write_bytes(whole.read_bytes())
    with pytest.raises(ModelError, match=r"several GGUF models, m.gguf and other.gguf; give the"):
        open_source(whole.parent)
    other.rename(whole.with_name("mmproj-model.gguf"))
    assert open_source(whole.parent).name == MODEL


def test_a_folder_of_safetensors_is_read_as_before(folder, tmp_path):
    model = save_llama(tmp_path / "m")
    (model / MODEL).write_bytes(b"not read")
    assert open_source(model).gguf is None


def test_the_temporary_folder_goes_with_the_source(whole):
    source = open_source(whole)
    place = source.folder
    assert (place / "config.json").is_file()
    del source
    assert not place.exists()


def test_other_files_are_refused(tmp_path, whole):
    (tmp_path / "text.txt").write_text("GG")
    with pytest.raises(ModelError, match="is a file and not GGUF"):
        open_source(tmp_path / "text.txt")
    (tmp_path / "fake.gguf").write_text("ONNX and more")
    with pytest.raises(ModelError, match="is not GGUF: it begins with b'ONNX'"):
        open_source(tmp_path / "fake.gguf")
    with pytest.raises(ModelError, match="--revision main is for hub models"):
        open_source(whole, revision="main")


def header(
    *keys: tuple[str, int, bytes], tensors: bytes = b"", count: int = 0, version: int = 3
) -> bytes:
    """Return a file: keys as (name, number of a type, bytes), then entries of tensors."""
    body = b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    return b"GGUF" + struct.pack("<IQQ", version, count, len(keys)) + body + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


ZEROS = bytes(4096)
DAMAGED = {
    "empty": (b"", "begins with b''"),
    "short": (b"GGUF\x03", "ends in its first line"),
    "version 1": (header(version=1), "of version 1; versions 2 and 3 are read"),
    "version 77": (header(version=77), "of version 77"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "many tensors": (header(count=2**40), "claims 1099511627776 tensors"),
    "no keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "9223372036854775808 keys"),
    "long key": (header(("x" * 9, 8, struct.pack("<Q", 2**62))), "claims 4611686018427387904 byt"),
    "long list": (header(("k", 9, struct.pack("<IQ", 4, 2**50))), "claims 1125899906842624 items"),
    "many strings": (header(("k", 9, struct.pack("<IQ", 8, 2**20))), "claims 1048576 strings"),
    "list of lists": (header(("k", 9, struct.pack("<IQ", 9, 1) + ZEROS)), "list of the type 9"),
    "type": (header(("k", 99, ZEROS)), "unknown type 99"),
    "cut list": (header(("k", 9, struct.pack("<IQ", 6, 5000))), "goes on beyond its end"),
    "key twice": (header(("k", 4, b"\1\0\0\0"), ("k", 4, b"\1\0\0\0")), "'k' is there twice"),
    "alignment": (header(("general.alignment", 4, b"\7\0\0\0")), "general.alignment is 7"),
    "rank": (header(tensors=entry("t", (1,) * 5), count=1), "'t' has 5 dimensions"),
    "no elements": (header(tensors=entry("t", (0, 4)) + ZEROS, count=1), r"has shape \[0, 4\]"),
    "huge": (header(tensors=entry("t", (2**62, 2**62)) + ZEROS, count=1), "has shape"),
    "beyond": (header(tensors=entry("t", (99, 99)) + ZEROS, count=1), "beyond the end of the f"),
    "offset": (header(tensors=entry("t", (4,), offset=2**63) + ZEROS, count=1), "beyond the end"),
    "unaligned": (header(tensors=entry("t", (4,), offset=8) + ZEROS, count=1), "multiple of 32"),
    "cut block": (header(tensors=entry("t", (2, 40), 2) + ZEROS, count=1), "multiple of 32"),
    "twice": (
        header(tensors=entry("t", (4,)) + entry("t", (4,), offset=64) + ZEROS, count=2),
        "'t' is there twice",
    ),
    "overlap": (
        header(tensors=entry("t", (64,)) + entry("u", (4,), offset=32) + ZEROS, count=2),
        "t and u overlap",
    ),
    "unknown type": (header(tensors=entry("t", (4,), 999) + ZEROS, count=1), "type number 999"),
    "nothing": (header(), "lacks general.architecture"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(case, tmp_path):
    content, message = DAMAGED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(path)
    assert len(str(caught.value)) < 300
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kept", [0.0005, 0.01, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, whole):
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelError, match=r"GGUF file m.gguf \(\d+ bytes\) is truncated or damaged"):
        open_source(whole)


def changed(path: Path, **keys: object) -> Path:
    """Write a file's tensors again, with some keys of "llama." changed or, for None, left out."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), "llama")
    known = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    names = {name.replace("__", "."): value for name, value in keys.items()}
    for name, value in {**known, **names}.items():
        if name.startswith("GGUF.") or value is None:
            continue
        if name == "general.architecture":
            writer.kv_data[0].pop(name)
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
        add.get(type(value), writer.add_array if isinstance(value, list) else writer.add_int64)(
            name, value
        )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


REFUSED = {
    "a missing key": ({"llama__block_count": None}, "lacks llama.block_count"),
    "a text": ({"llama__block_count": "3"}, "block_count is '3', and an integer is expected"),
    "a negative size": ({"llama__embedding_length": -60}, "is -60, and an integer from 1"),
    "a huge size": ({"llama__attention__head_count": 2**40}, "an integer from 1 to 16384"),
    "many layers": ({"llama__block_count": 2**31}, "is 2147483648, and an integer from 1"),
    "another size": ({"llama__embedding_length": 64}, "embedding_length is 64"),
    "heads": ({"llama__attention__head_count": 7}, "num_attention_heads=7 is not a multiple"),
    "a shape": ({"llama__feed_forward_length": 96}, "asks for"),
    "no number": ({"llama__rope__freq_base": float("nan")}, "a finite number is expected"),
    "a theta": ({"llama__rope__freq_base": -4.0}, "rope_theta"),
    "a dimension": ({"llama__rope__dimension_count": 11}, "an even number up to that is expected"),
    "keys and values": ({"llama__attention__value_length": 8}, "keys of 10 and values of 8 elem"),
    "a scaling": (
        {"llama__rope__scaling__type": "new", "llama__rope__scaling__factor": 2.0},
        "scales rotations by 'new'",
    ),
    "fewer layers": ({"llama__block_count": 2}, r"has tensor blk.2.\w+.weight and 8 more, which"),
    "more layers": ({"llama__block_count": 4}, "the checkpoint lacks model.layers.3"),
    "layers that differ": ({"llama__attention__head_count_kv": [2, 2, 3]}, "differs from layer"),
    "an adapter": ({"general__type": "adapter"}, "holds a 'adapter', not a language model"),
    "an architecture": ({"general__architecture": "mamba"}, "architecture 'mamba' is not read"),
    "an encoder": ({"general__architecture": "clip"}, "holds a 'clip', not a language model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_metadata_gets_wrong_is_refused_in_one_line(case, whole):
    keys, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as caught:
        read(changed(whole, **keys))
    assert len(str(caught.value)) < 300


def test_every_architecture_that_is_read_is_named_in_the_refusal(whole):
    path = changed(whole, general__architecture="rwkv7")
    with pytest.raises(ModelError) as caught:
        open_source(path)
    assert str(caught.value).split(": ")[1].split() == sorted(ARCHITECTURES)


def test_the_page_names_every_architecture():
    page = (Path(__file__).parents[1] / "docs" / "gguf.md").read_text(encoding="utf-8")
    named = page.split("by GGUF's names:")[1].split(". Others")[0]
    found = [re.sub(r"\(.*?\)", "", name, flags=re.DOTALL).strip() for name in named.split(",")]
    assert found == sorted(ARCHITECTURES)


def test_a_type_that_cannot_be_decoded_is_refused_by_name(whole):
    tensor = read_gguf(whole).tensors["blk.1.ffn_up.weight"]
    content = bytearray(whole.read_bytes())
    place = content.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16
    content[place : place + 4] = struct.pack("<I", 24)  # I8
    whole.write_bytes(content)
    assert tensor.ggml_type == "F32"
    with pytest.raises(ModelError, match=r"tensor blk.1.ffn_up.weight of m.gguf is of type I8"):
        open_checkpoint(open_source(whole))


@pytest.mark.slow
def test_a_file_that_claims_much_takes_little_memory(tmp_path):
    path = tmp_path / "m.gguf"
    claims = struct.pack("<IQ", 8, 2**22)
    with path.open("wb") as file:
        file.write(header(("general.tags", 9, claims)))
        file.truncate(2**33)  # of zeros: empty strings without end
    code = f"""
from pathlib import Path
from lminf_export.errors import ModelError
from lminf_export.tensors.gguf_header import read_gguf
try:
    read_gguf(Path({str(path)!r}))
except ModelError:
    pass
"""
    assert peak_of(code, "lminf_export.tensors.gguf_header", "gguf") < 200 * MIB
