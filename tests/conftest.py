"""Which tests `make test-fast` leaves out, and whose settings all tests run with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.made_once import MadeOnce, shared_folder

if TYPE_CHECKING:
    from lminf_export.runtime.language_model import LanguageModel
    from tests.support.foreign_models import Foreign


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every case of a `sampled` test but its first as slow."""
    seen = set()
    for item in items:
        if item.get_closest_marker("sampled") is None:
            continue
        function = item.nodeid.partition("[")[0]
        if function in seen:
            item.add_marker(pytest.mark.slow)
        seen.add(function)


def pytest_runtest_setup() -> None:
    """Let torch's exporter read what it can translate once, and not anew for every model.

    One process exports hundreds of models here, and anybody else's one. Where nothing has
    imported torch, nothing is imported.
    """
    exporter = sys.modules.get("torch.onnx._internal._lazy_import")
    if exporter is not None and "get_torchlib_ops" not in vars(exporter.onnxscript_apis):
        apis = exporter.onnxscript_apis
        apis.get_torchlib_ops = cache(apis.get_torchlib_ops)


@pytest.fixture(scope="session", autouse=True)
def _settings_of_a_new_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what is remembered about plans out of the user's own folder, in children too."""
    folder = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, exported for onnxruntime."""
    from lminf_export import export

    demo = Path(__file__).resolve().parents[1] / "examples" / "demo-llama"
    return export(str(demo), tmp_path_factory.mktemp("demo") / "bundle").path


@pytest.fixture(scope="session")
def demo_lm(demo_bundle: Path) -> LanguageModel:
    """The demo model, loaded; an idle one may be run by anybody."""
    from lminf_export import load

    return load(demo_bundle, threads=1)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """Models that other tools built, made when they are first asked for."""
    from tests.support.foreign_models import Foreign

    return Foreign(shared_folder(tmp_path_factory, "foreign"))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Folders that tests of several files share."""
    return MadeOnce(shared_folder(tmp_path_factory, "made"))
