"""Add a plan that was built elsewhere to the bundle whose recipe built it."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lminf_export.bundle.card import CARD_NAME, model_card
from lminf_export.bundle.destination import locked
from lminf_export.bundle.files import file_sha256, sync
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.license import read_license
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import MANIFEST_NAME, Engine, EngineRecipe, FileEntry, Plugin, Role
from lminf_export.bundle.trust import is_trusted, remember, require_hash
from lminf_export.engine.common import LOGGER_NAME
from lminf_export.engine.plugin import PLUGIN_FILE, check_plugin
from lminf_export.errors import EngineError
from lminf_export.runtime.gpu import find_gpu
from lminf_export.runtime.tensorrt import TensorRTSession

logger = logging.getLogger(LOGGER_NAME)

BUILT_ELSEWHERE = "built elsewhere, not executed here"
LOADED = "built elsewhere, loaded here, not executed"

# How a plan begins, as NVIDIA's trtexec reads it (--getPlanVersionOnly): a tag, a version of the
# layout, and in bytes 24 … 27 the release that built it.
_HEADER = struct.Struct("<4sI16x4B")
_TAG, _RTX_TAG, _LAYOUT = b"ftrt", b"vtrt", 0
_OLDEST = (10, 3)
_TARGET = re.compile(r"sm_\d{2,3}")
# Names under which files are written before they are renamed.
_PARTIAL = re.compile(r"\..+\.\d+\.partial")


@dataclass(frozen=True)
class _NewFile:
    """A file to add to the bundle: where it is now, and its name, role and digest there."""

    name: str
    role: Role
    source: Path
    entry: FileEntry


def add_plan(
    bundle_path: str | Path,
    plan_path: str | Path,
    *,
    target: str | None = None,
    plugin: str | Path | None = None,
    force: bool = False,
    trust_plan: bool | str = False,
) -> Bundle:
    """Register a plan that TensorRT built from a bundle's recipe.

    Where this machine has the GPU and the release the plan is for, it is loaded and compared
    with the manifest first; elsewhere only its header is read.

    Args:
        bundle_path: a bundle with a recipe, as `--builder none` writes it.
        plan_path: the plan; it may lie in the bundle's folder already.
        target: the GPU it was built on, such as "sm_90"; by default this machine's.
        plugin: the library it was built with; by default the one in the bundle's folder.
        force: replace a plan the bundle has.
        trust_plan: to agree to a library that lies in the folder of a bundle that was not
            exported here, as `load` has it; a library that `plugin` names needs no word.

    Returns:
        The bundle, opened again.

    Raises:
        LminfError: with one line; the bundle is as it was.
    """
    bundle = Bundle.open(bundle_path)
    recipe = _recipe(bundle, force=force)
    plan = Path(plan_path)
    version = read_version(plan)
    target = _checked_target(target)
    files = [_new_file(recipe.file, "plan", plan)]
    library = _library(bundle, recipe, plugin, trust_plan)
    if library is not None:
        files.append(_new_file(PLUGIN_FILE, "plugin", library))
    engine = Engine(
        builder="tensorrt",
        version=version,
        target=target,
        file=recipe.file,
        dtype=bundle.manifest.dtype,
        profiles=recipe.profiles,
        plugin=Plugin(file=PLUGIN_FILE, sha256=files[-1].entry.sha256, embedded=recipe.embed_plugin)
        if library is not None
        else None,
        ring_writes="circular" if recipe.needs_plugin else "linear",
        sinks_in_place=recipe.needs_plugin,
        options=recipe.options,
        note=BUILT_ELSEWHERE,
    )
    with _alone_in(bundle), _partial_copies(bundle, files) as copies:
        engine = _loaded_if_possible(bundle, engine, copies)
        _put(bundle, engine, files, copies)
    return Bundle.open(bundle.path)


def read_version(path: Path) -> str:
    """Return the release of TensorRT that built a plan, such as "10.16.1.11".

    Raises:
        EngineError: the file cannot be read, is no plan, or one that cannot be used.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise EngineError(f"cannot read the plan {path}: {error.strerror}") from None
    tag, layout, *numbers = (
        _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0, 0)
    )
    if tag == _RTX_TAG:
        raise EngineError(
            f"{path} is a plan of TensorRT for RTX; this bundle's recipe is for TensorRT: export "
            "with --builder tensorrt-rtx instead"
        )
    if tag != _TAG or layout != _LAYOUT:
        raise EngineError(f"{path} is not a plan of TensorRT 10.3 or later")
    version = ".".join(map(str, numbers))
    if tuple(numbers[:2]) < _OLDEST:
        raise EngineError(
            f"{path} was built by TensorRT {version}; TensorRT 10.3 or later is required"
        )
    return version


def _recipe(bundle: Bundle, *, force: bool) -> EngineRecipe:
    recipe = bundle.manifest.engine_recipe
    if recipe is None:
        raise EngineError(
            f"{bundle.path} has no recipe of a TensorRT engine; export with --builder none"
        )
    engine = bundle.manifest.engine
    if engine is not None and not force:
        raise EngineError(
            f"{bundle.path} has a plan already ({engine.builder} {engine.version} for "
            f"{engine.target}); --force replaces it"
        )
    return recipe


def _checked_target(asked: str | None) -> str:
    if asked is None:
        gpu = find_gpu()
        if isinstance(gpu, str):
            raise EngineError(
                f"which GPU is the plan for? None is usable here to ask ({gpu}); name it with "
                "--target, such as sm_90"
            )
        return gpu.target
    if not _TARGET.fullmatch(asked):
        raise EngineError(
            f"target={asked!r}: must be a compute capability without its dot, such as sm_90"
        )
    return asked


def _library(
    bundle: Bundle, recipe: EngineRecipe, asked: str | Path | None, trust: bool | str
) -> Path | None:
    if not recipe.needs_plugin:
        if asked is not None:
            raise EngineError("plugin: this bundle's recipe is of standard operators, without one")
        return None
    if asked is not None:
        library = Path(asked)
    elif (bundle.path / PLUGIN_FILE).is_file():
        # Where the recipe's command has it, in the bundle already or put there for the build.
        library = bundle.path / PLUGIN_FILE
        _require_trust(bundle, library, trust)
    else:
        raise EngineError(
            f"{bundle.path} lacks {PLUGIN_FILE}, the library the plan was built with; name it "
            "with --plugin PATH"
        )
    check_plugin(library)
    return library


def _require_trust(bundle: Bundle, library: Path, trust: bool | str) -> None:
    """Whoever adds a plan trusts the plan; the library may be of whoever made the bundle."""
    if isinstance(trust, str):
        require_hash(bundle, trust)
    elif not trust and not is_trusted(bundle.manifest):
        raise EngineError(
            f"{library} is code, and this bundle was not exported here: name it with --plugin if "
            "it is yours, or say --trust-plan if you trust who made the bundle"
        )


def _new_file(name: str, role: Role, source: Path) -> _NewFile:
    entry = FileEntry(bytes=source.stat().st_size, sha256=file_sha256(source), role=role)
    return _NewFile(name, role, source, entry)


@contextmanager
def _alone_in(bundle: Bundle) -> Iterator[None]:
    """Keep other calls out of the folder, and clear what a killed one left in it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(bundle.path))
        except BlockingIOError:
            raise EngineError(
                f"another process adds a plan to {bundle.path}; try again when it is done"
            ) from None
        except OSError as error:
            logger.info("%s has no lock: %s", bundle.path, error.strerror)
        else:
            for path in bundle.path.iterdir():
                if _PARTIAL.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        yield


@contextmanager
def _partial_copies(bundle: Bundle, files: list[_NewFile]) -> Iterator[dict[str, Path]]:
    """Copy files into the bundle's folder under temporary names; unused copies are removed."""
    copies: dict[str, Path] = {}
    try:
        for file in files:
            place = bundle.path / file.name
            if place.exists() and place.resolve() == file.source.resolve():
                continue  # already in place
            copies[file.name] = bundle.path / f".{file.name}.{os.getpid()}.partial"
            shutil.copyfile(file.source, copies[file.name])
            if file_sha256(copies[file.name]) != file.entry.sha256:
                raise EngineError(f"{file.source} changed while it was copied; try again")
            sync(copies[file.name])
        yield copies
    except OSError as error:
        raise EngineError(f"cannot add to {bundle.path}: {error.strerror}") from error
    finally:
        for path in copies.values():
            path.unlink(missing_ok=True)


def _loaded_if_possible(bundle: Bundle, engine: Engine, copies: dict[str, Path]) -> Engine:
    """Load the plan if this machine has its GPU and release, so that a wrong one is found now."""
    gpu = find_gpu()
    if isinstance(gpu, str) or gpu.target != engine.target:
        logger.info("the plan is not loaded here: it is for %s", engine.target)
        return engine
    try:
        installed = importlib.import_module("tensorrt").__version__
    except (ImportError, OSError) as error:
        logger.warning("the plan is not loaded here, since TensorRT is not: %s", error)
        return engine
    if installed != engine.version:
        logger.warning(
            "the plan is not loaded here: TensorRT %s is installed, it is of %s",
            installed,
            engine.version,
        )
        return engine
    names = {name: path.name for name, path in copies.items()}
    plugin = engine.plugin
    if plugin is not None:
        plugin = plugin.model_copy(update={"file": names.get(plugin.file, plugin.file)})
    trial = engine.model_copy(
        update={"file": names.get(engine.file, engine.file), "plugin": plugin}
    )
    TensorRTSession(Bundle(bundle.path, _with_engine(bundle.manifest, trial, {})))
    return engine.model_copy(update={"note": LOADED})


def _with_engine(manifest: Manifest, engine: Engine, files: dict[str, FileEntry]) -> Manifest:
    draft = manifest.model_copy(update={"engine": engine})
    return draft.sealed({**manifest.files, **files})


def _put(bundle: Bundle, engine: Engine, files: list[_NewFile], copies: dict[str, Path]) -> None:
    """Rename the files into place, the card with them, the manifest last.

    Where a file of the bundle is replaced, the manifest first loses it and the engine with it: at
    every moment the folder is a whole bundle, of the old plan, of none, or of the new one.
    """
    old, new = bundle.manifest, {file.name: file.entry for file in files}
    new[CARD_NAME] = _write_card(bundle, engine, new, copies)
    if any(name in old.files for name in copies):
        kept = {name: entry for name, entry in old.files.items() if name not in copies}
        _write_manifest(bundle, old.model_copy(update={"engine": None}).sealed(kept))
    for name, path in copies.items():
        os.replace(path, bundle.path / name)
    sync(bundle.path)
    _write_manifest(bundle, _with_engine(old, engine, new))


def _write_card(
    bundle: Bundle, engine: Engine, new: dict[str, FileEntry], copies: dict[str, Path]
) -> FileEntry:
    """Write the card that names the engine under a temporary name, and tell where."""
    files = {**bundle.manifest.files, **new}
    files.pop(CARD_NAME, None)
    manifest = bundle.manifest.model_copy(update={"engine": engine, "files": files})
    path = copies[CARD_NAME] = bundle.path / f".{CARD_NAME}.{os.getpid()}.partial"
    card = model_card(manifest, read_license(bundle.path / CARD_NAME))
    path.write_text(card, encoding="utf-8")
    sync(path)
    return FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path), role="other")


def _write_manifest(bundle: Bundle, manifest: Manifest) -> None:
    # First, so that a killed call may be repeated without a question.
    remember(manifest)
    draft = bundle.path / f".{MANIFEST_NAME}.{os.getpid()}.partial"
    try:
        draft.write_text(manifest.to_json(), encoding="utf-8")
        sync(draft)
        os.replace(draft, bundle.path / MANIFEST_NAME)
        sync(bundle.path)
    finally:
        draft.unlink(missing_ok=True)
