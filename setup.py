"""Builds the CPU kernel for onnxruntime with the package; everything else is in pyproject.toml.

Without a C++ compiler the package installs all the same, and graphs run by the operator's
function body. The library links neither Python nor onnxruntime: onnxruntime loads it. One wheel
therefore serves every Python 3 of a platform, and its tag says which C library it needs.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("plugins/onnxruntime")
OPERATOR = Path("plugins/operator")
COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
# One file per instruction set; which one runs is decided where it runs. CMakeLists.txt agrees.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
AVX512_VNNI = ["-mavx512vnni", *AVX512]
INSTRUCTION_SETS = {
    "block_avx2.cc": AVX2,
    "block_avx512.cc": AVX512,
    "draw_avx2.cc": AVX2,
    "draw_avx512.cc": AVX512,
    "linear_avx2.cc": AVX2,
    "linear_avx512.cc": AVX512,
    "int8_linear_avx2.cc": AVX2,
    "int8_linear_avx512.cc": AVX512,
    "int8_linear_avx512vnni.cc": AVX512_VNNI,
}
KERNELS = Extension(
    "lminf_export.lib.lminf_ort",
    sources=[
        str(SOURCES / name)
        for name in (
            "register.cc",
            "tensor.cc",
            "lambda_attention_op.cc",
            "linear_op.cc",
            "linear_nbits_op.cc",
            "cpu_kernel.cc",
            "huge_pages.cc",
            "mapped_weight.cc",
            "cpu/ask.cc",
            "cpu/attention.cc",
            "cpu/block_portable.cc",
            "cpu/block_avx2.cc",
            "cpu/block_avx512.cc",
            "cpu/draw.cc",
            "cpu/draw_portable.cc",
            "cpu/draw_avx2.cc",
            "cpu/draw_avx512.cc",
            "cpu/linear.cc",
            "cpu/linear_portable.cc",
            "cpu/linear_avx2.cc",
            "cpu/linear_avx512.cc",
            "cpu/int8_linear.cc",
            "cpu/int8_linear_portable.cc",
            "cpu/int8_linear_avx2.cc",
            "cpu/int8_linear_avx512.cc",
            "cpu/int8_linear_avx512vnni.cc",
        )
    ]
    + [str(OPERATOR / "rules.cpp")],
    depends=[str(path) for folder in (SOURCES, OPERATOR) for path in sorted(folder.rglob("*.h"))],
    language="c++",
    optional=True,
)


SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"  # lminf_export/runtime/kernels.py agrees
# The C library of manylinux_2_N → the newest GLIBCXX_3.4.x that its distributions have.
LIBSTDCXX = {17: 19, 24: 22, 28: 24, 31: 28, 34: 29, 35: 30, 38: 32, 39: 33}


class BuildKernels(build_ext):
    """A plain shared library, each source compiled for its own instruction set."""

    def run(self) -> None:
        """Build for the processor of this machine, also where Python itself is for two."""
        if sys.platform == "darwin":
            os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Name it as a plain library: onnxruntime loads it, Python does not."""
        package, _, name = fullname.rpartition(".")
        return str(Path(*package.split("."), f"lib{name}{SUFFIX}"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, where the platform is one we know."""
        if sys.platform == "win32":
            self.warn("the CPU kernel is not built on Windows; graphs run by their function body")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.parallel or _cores()) as pool:
            compiled = list(pool.map(self._compile, ext.sources))
        objects = [name for names in compiled for name in names]
        # Operators and allocator are known to onnxruntime for good: the library must stay.
        stay = ["-Wl,-z,nodelete"] if sys.platform == "linux" else []
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=stay, target_lang="c++"
        )

    def copy_extensions_to_source(self) -> None:
        """Put the library where an editable install finds it."""
        Path("lminf_export/lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def _compile(self, source: str) -> list[str]:
        flags = INSTRUCTION_SETS.get(Path(source).name, [])
        if flags and platform.machine().lower() not in ("x86_64", "amd64"):
            return []
        return self.compiler.compile(
            [source], output_dir=self.build_temp, extra_postargs=[*COMMON, *flags]
        )


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of a platform, tagged by what the library needs of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform."""
        *_, platform_tag = super().get_tag()
        build = self.get_finalized_command("build_ext")
        library = Path(build.get_ext_fullpath(KERNELS.name))
        if library.is_file():
            return "py3", "none", _platform_tag(platform_tag, library.read_bytes())
        if self.distribution.have_run.get("build_ext") and not build.editable_mode:
            return "py3", "none", "any"  # there was no compiler: only Python is left
        return "py3", "none", platform_tag


def _platform_tag(tag: str, library: bytes) -> str:
    """Return the tag of the oldest systems that have every symbol version a library asks for."""
    if sys.platform == "darwin":
        return tag.replace("universal2", platform.machine())
    glibc = [int(found) for found in re.findall(rb"\0GLIBC_2\.(\d+)", library)]
    if not tag.startswith("linux_") or not glibc:
        return tag
    libstdcxx = max(map(int, re.findall(rb"\0GLIBCXX_3\.4\.(\d+)", library)), default=0)
    systems = [old for old, newest in LIBSTDCXX.items() if newest >= libstdcxx]
    if not systems:
        return tag
    return f"manylinux_2_{max(*glibc, min(systems))}_{tag.removeprefix('linux_')}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})
