"""What is published installs anywhere: the wheel, the source distribution, other processors.

Tests marked `registry` install from the package registry into environments of their own;
`make test-versions` runs them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lminf_export
from lminf_export.runtime.kernels import INSTALLED

ROOT = Path(__file__).resolve().parents[1]
# In a source distribution besides the package: what builds, explains, checks and measures it.
SHIPPED = (
    *("Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "SECURITY.md", "CONTRIBUTING.md"),
    *("docs/architecture.md", "docs/howto/add_a_family.md", "docs/perplexity.png"),
    *("plugins/CMakeLists.txt", "plugins/onnxruntime/CMakeLists.txt", "plugins/operator/rules.cpp"),
    *("plugins/lambda_attention/launch.cu", "plugins/lambda_attention/decode.cuh"),
    *("plugins/tensorrt/plugin.cpp", "plugins/tensorrt/exports.map"),
    *("plugins/emulation/emulation.cpp", "plugins/tests/harness/main.cpp"),
    *("examples/demo-llama/model.safetensors", "examples/demo-mpt/tokenizer.json"),
    *("benchmarks/results/models.json", "scripts/docs/write_all.py", "tests/test_packages.py"),
    *(".ci/run", ".clang-format"),
)
PORTABLE = ("register.cc", "tensor.cc", "lambda_attention_op.cc", "linear_op.cc")
PORTABLE += ("linear_nbits_op.cc", "cpu_kernel.cc", "huge_pages.cc", "cpu/attention.cc")
PORTABLE += ("cpu/block_portable.cc", "cpu/linear.cc", "cpu/linear_portable.cc")
PORTABLE += ("cpu/int8_linear.cc", "cpu/int8_linear_portable.cc", "../operator/rules.cpp")
PORTABLE += ("mapped_weight.cc", "cpu/ask.cc", "cpu/draw.cc", "cpu/draw_portable.cc")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that has to succeed, outside the checkout and without its paths."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
    return done.stdout + done.stderr


def make_environment(folder: Path) -> Path:
    """Make an empty environment and return its Python."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def head(symbol: str, library: bytes) -> int:
    """Return the newest minor version that a library asks for of a versioned symbol."""
    return max(map(int, re.findall(rb"\0" + symbol.encode() + rb"(\d+)", library)), default=0)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A source distribution of this checkout, and a wheel built from it unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("packages")
    python = make_environment(folder / "builder")
    run(python, "-m", "pip", "install", "--quiet", "build", "auditwheel", cwd=folder)
    tree = folder / "tree"
    listed = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", cwd=folder)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    run(python, "-m", "build", "--sdist", "--outdir", folder / "dist", tree, cwd=folder)
    with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    source = next((folder / "unpacked").iterdir())
    run(python, "-m", "build", "--wheel", "--outdir", folder / "dist", source, cwd=folder)
    return folder


@pytest.mark.registry
@pytest.mark.slow
def test_the_source_distribution_is_complete(packages):
    with tarfile.open(next((packages / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not set(SHIPPED) - names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.registry
@pytest.mark.slow
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="tags of Linux on x86-64")
def test_the_wheel_binds_no_python_and_says_which_systems_it_runs_on(packages):
    wheel = next((packages / "dist").glob("*.whl"))
    found = re.fullmatch(
        rf"lminf_export-{re.escape(lminf_export.__version__)}-py3-none-manylinux_2_(\d+)_x86_64",
        wheel.stem,
    )
    assert found, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(f"lminf_export/lib/{INSTALLED.name}")
    assert b"PyObject" not in library
    assert int(found[1]) >= head("GLIBC_2\\.", library) > 0
    python = packages / "builder" / "bin" / "python"
    shown = run(python, "-m", "auditwheel", "show", wheel, cwd=packages)
    assert f'"manylinux_2_{found[1]}_x86_64"' in " ".join(shown.split())


@pytest.mark.registry
@pytest.mark.slow
def test_the_wheel_has_the_page(packages):
    folder = "lminf_export/serve/page"
    with zipfile.ZipFile(next((packages / "dist").glob("*.whl"))) as archive:
        names = {name for name in archive.namelist() if name.startswith(f"{folder}/")}
    assert names == {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir()}


@pytest.mark.registry
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["demo-llama", "demo-mpt"])
def test_the_installed_wheel_exports_validates_and_writes(model, installed, tmp_path):
    """By its commands, outside the checkout, with what pip resolves and no constraints."""
    source, commands = shutil.copytree(ROOT / "examples" / model, tmp_path / model), installed
    line = run(commands / "lminf-export", "--model", source, "--out", "bundle", cwd=tmp_path)
    assert (tmp_path / "bundle" / "model.onnx").is_file(), line
    lines = run(commands / "lminf", "validate", "bundle", "--model", source, cwd=tmp_path)
    assert "failed" not in lines
    words = ("--prompt", "In the beginning", "--max-new-tokens", "40", "--seed", "1")
    text = run(commands / "lminf", "generate", "bundle", *words, cwd=tmp_path)
    assert len(text.split()) > 10
    assert "warn" not in text.lower()
    shown = run(commands / "lminf", "inspect", "bundle", cwd=tmp_path)
    assert INSTALLED.name in shown  # the kernel that the wheel brought


@pytest.fixture(scope="module")
def installed(packages, tmp_path_factory) -> Path:
    """The commands of an empty environment with torch, where pip then chose all the rest."""
    folder = tmp_path_factory.mktemp("installed")
    python = make_environment(folder / "environment")
    # Before the wheel: pip would take the newest torch within our bounds, on Linux with CUDA.
    run(python, "-m", "pip", "install", "--quiet", "torch==2.13.0", cwd=folder)
    wheel = next((packages / "dist").glob("*.whl"))
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    where = run(python, "-c", "import lminf_export; print(lminf_export.__file__)", cwd=folder)
    assert str(folder) in where
    return folder / "environment" / "bin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        pytest.param("aarch64-linux-gnu-g++", ("-U__linux__",), id="not Linux"),
        pytest.param("aarch64-linux-gnu-g++", (), id="aarch64"),
    ],
)
def test_the_portable_kernels_compile_for_other_machines(compiler, flags, tmp_path):
    """They are compiled and linked, not run: the machine at hand is none of them."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    objects = []
    for name in PORTABLE:
        objects.append(tmp_path / f"{Path(name).stem}.o")
        common = (
            "-std=c++17",
            "-O0",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Werror",
        )
        source = ROOT / "plugins" / "onnxruntime" / name
        run(compiler, *common, *flags, "-c", source, "-o", objects[-1], cwd=tmp_path)
    library = tmp_path / "library.so"
    run(compiler, "-shared", "-Wl,--no-undefined", *objects, "-o", library, cwd=tmp_path)
    assert library.stat().st_size > 0


def test_the_version_stands_in_one_place():
    """pyproject.toml has it; the package asks its metadata, CMake reads that line."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    tracked = subprocess.run(
        ["git", "-C", ROOT, "grep", "-lF", f'"{version[1]}"', "--", "*.py", "*.txt", "*.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert tracked.stdout.split() == ["pyproject.toml"]
    assert "pyproject.toml" in (ROOT / "plugins" / "CMakeLists.txt").read_text()
