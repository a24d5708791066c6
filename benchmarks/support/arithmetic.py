"""How many products a second this processor's vector units can multiply and add, measured."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_REPEATS, _ROUNDS, _SUMS = 2_000_000, 5, 16
_SOURCE = """
#include <immintrin.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define NAME(name) _mm512_##name
typedef __m512 Vec;
#else
#define NAME(name) _mm256_##name
typedef __m256 Vec;
#endif

void floats(int64_t repeats, float* out) {
  Vec sum[16], a = NAME(set1_ps)(out[0]), b = a;
  for (int j = 0; j < 16; ++j) {
    sum[j] = NAME(setzero_ps)();
    __asm__ volatile("" : "+v"(sum[j]));  // else one sum would do for all
  }
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) sum[j] = NAME(fmadd_ps)(a, b, sum[j]);
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (int j = 0; j < 16; ++j) out[0] += sum[j][0];
}

#if defined(__AVX512VNNI__)
void bytes(int64_t repeats, float* out) {
  __m512i sum[16], a = _mm512_set1_epi32((int)out[0]), b = a;
  for (int j = 0; j < 16; ++j) {
    sum[j] = _mm512_setzero_si512();
    __asm__ volatile("" : "+v"(sum[j]));
  }
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (int j = 0; j < 16; ++j) out[0] += _mm512_cvtsi512_si32(sum[j]);
}
#endif
"""


def products_per_second(threads: int) -> dict[str, float]:
    """Return the best rate of some threads together: "float32", and "int8" with AVX-512 VNNI.

    An empty result means that there is no C compiler here, or no x86-64 processor with AVX2.
    """
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if compiler is None or "avx2" not in flags:
        return {}
    lanes = 16 if "avx512f" in flags else 8
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(_SOURCE)
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
        code = ctypes.CDLL(str(library))
        rates = {"float32": _rate(code.floats, threads) * lanes}
        if hasattr(code, "bytes"):
            rates["int8"] = _rate(code.bytes, threads) * 64
    return rates


def _rate(function: ctypes._CFuncPtr, threads: int) -> float:
    """Vector operations a second of some threads together."""
    function.argtypes, best = [ctypes.c_int64, ctypes.c_void_p], 0.0
    results = [(ctypes.c_float * 16)(*([1.0] * 16)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(lambda one: function(_REPEATS, one), results))
            best = max(best, threads * _REPEATS * _SUMS / (time.perf_counter() - start))
    return best
