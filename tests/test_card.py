"""The card of a bundle: written from the manifest, with what is known of the licence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from lminf_export.bundle.card import model_card
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.license import License, read_license
from lminf_export.bundle.records import SourceRecord
from lminf_export.export.run import export
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

TINY = TinyModel()


def front_matter(card):
    head = card.split("---\n")[1]
    return yaml.safe_load(head)


def test_every_bundle_has_a_card_that_the_hub_can_read(tmp_path):
    bundle = TINY.write(tmp_path / "b")
    assert bundle.manifest.files["README.md"].role == "other"
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    fields = front_matter(card)
    assert fields["base_model"] == "somebody/tiny"
    assert fields["library_name"] == "lminf-export"
    assert {"onnx", "llama"} <= set(fields["tags"])
    assert "license" not in fields
    assert "`somebody/tiny` at `main`" in card
    assert "13 tokens" in card
    assert "lminf validate DIR --model somebody/tiny" in card
    assert "- a model made by hand" in card
    assert "| `model.onnx.data` | weights |" in card


def test_what_the_card_says_about_use_runs(tmp_path, monkeypatch, capsys):
    bundle = TINY.write(tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", License("apache-2.0")),
        ('---\r\nlicense: "mit"\r\n---\r\n', License("mit")),
        (
            "---\nlanguage: en\nlicense: other\nlicense_name: my-own\nlicense_link: LICENSE\n---\n",
            License("other", "my-own", "LICENSE"),
        ),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: |\n  long\n---\n", None),
        ("---\ntext: a\n---\nlicense: mit\n", None),
        ("", None),
        ("\xff\xfe", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_alone(tmp_path, text, expected):
    path = tmp_path / "README.md"
    path.write_bytes(text.encode("latin-1"))
    assert read_license(path) == expected
    assert read_license(tmp_path / "missing") is None
    assert read_license(tmp_path) is None


@pytest.mark.slow
def test_the_licence_goes_with_the_weights_and_the_sources_text_does_not(tmp_path):
    source = save_llama(tmp_path / "m", num_hidden_layers=1)
    (source / "README.md").write_text("---\nlicense: Apache-2.0\n---\nmy own words\n")
    (source / "LICENSE.txt").write_text("the terms")
    (source / "NOTICE").write_text("who made it")
    (source / "LICENSE-of-others").write_bytes(bytes(2**20 + 1))
    bundle = export(source, tmp_path / "b", window_size=11)
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "my own words" not in card
    assert front_matter(card)["license"] == "apache-2.0"
    assert "`LICENSE.txt`, `NOTICE`" in card
    assert (bundle.path / "LICENSE.txt").read_text() == "the terms"
    assert not (bundle.path / "LICENSE-of-others").exists()
    again = export(bundle.path, tmp_path / "again", window_size=11)
    assert front_matter((again.path / "README.md").read_text(encoding="utf-8"))["license"]


def test_odd_names_break_neither_front_matter_nor_tables(tmp_path):
    bundle = TINY.write(tmp_path / "b")
    source = SourceRecord(name="a`|b\n---\n# c", revision="r|`")
    manifest = bundle.manifest.model_copy(
        update={"source": source, "notices": ("one\n- two <script>",), "model_type": "x: [y"}
    )
    card = model_card(manifest, License("other", 'a "name": x', "http://x y"))
    assert front_matter(card)["license_name"] == 'a "name": x'
    assert "x: [y" in front_matter(card)["tags"]
    assert card.count("\n---\n") == 1
    assert "<script>" not in card
    assert sum(line.startswith("#") for line in card.splitlines()) == 5


def test_a_card_of_the_users_own_stays(tmp_path):
    from lminf_export.bundle.writer import BundleWriter

    pristine = TINY.write(tmp_path / "a")
    with BundleWriter(tmp_path / "b") as writer:
        for name, entry in pristine.manifest.files.items():
            shutil.copyfile(pristine.path / name, writer.add(name, entry.role))
        Path(writer.add("README.md", "other")).write_text("mine")
        writer.commit(pristine.manifest.model_copy(update={"files": {}}))
    assert (Bundle.open(tmp_path / "b", "full").path / "README.md").read_text() == "mine"
