"""Builds the CPU kernel for onnxruntime with the package; everything else is in pyproject.toml.

Without a C++ compiler the package installs all the same, and graphs run by the operator's
function body. The library links neither Python nor onnxruntime: onnxruntime loads it.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
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
            "cpu/attention.cc",
            "cpu/block_portable.cc",
            "cpu/block_avx2.cc",
            "cpu/block_avx512.cc",
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


class BuildKernels(build_ext):
    """A plain shared library, each source compiled for its own instruction set."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name it as a plain library: onnxruntime loads it, Python does not."""
        package, _, name = fullname.rpartition(".")
        return str(Path(*package.split("."), f"lib{name}.so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, where the platform is one we know."""
        if sys.platform == "win32":
            self.warn("the CPU kernel is not built on Windows; graphs run by their function body")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [name for source in ext.sources for name in self._compile(source)]
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


setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildKernels})
