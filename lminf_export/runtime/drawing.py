"""Drawing a token by the kernel library, which reads a whole vocabulary faster than numpy.

`sampling.py` says what is drawn, and draws the same tokens where there is no library.
"""

from __future__ import annotations

import ctypes

import numpy as np

from lminf_export.errors import SessionError
from lminf_export.runtime.kernels import KernelLibrary

_NO_MEMORY = -2


class Drawing:
    """A library's function that draws a token.

    Args:
        library: loaded before, by `find_kernels`.

    Raises:
        AttributeError: the library is of an older build and has no such function.
    """

    def __init__(self, library: KernelLibrary) -> None:
        function = ctypes.CDLL(str(library.path.resolve())).lminfDrawToken
        number, whole = ctypes.c_double, ctypes.c_int64
        function.restype = whole
        function.argtypes = [ctypes.c_void_p, whole, number, whole, number, number, number]
        self._function = function

    @staticmethod
    def takes(logits: np.ndarray) -> bool:
        """Tell whether logits (V,) lie in memory as the function reads them."""
        return (
            logits.ndim == 1
            and logits.dtype == np.float32
            and logits.flags.c_contiguous
            and 0 < len(logits) < 2**31 - 2**8
        )

    def token(
        self,
        logits: np.ndarray,
        *,
        inverse_temperature: float,
        top_k: int,
        top_p: float,
        least_exponent: float,
        uniform: float,
    ) -> int | None:
        """Draw a token.

        Args:
            logits: (V,) float32, which this `takes`; not changed.
            inverse_temperature: above 0, finite.
            top_k: 0 keeps all.
            top_p: in (0, 1].
            least_exponent: of the weight of a token that min-p keeps, at most 0.
            uniform: in [0, 1); where the token is drawn.

        Returns:
            The token, or None if a logit is not a number or none is finite.

        Raises:
            SessionError: there is no memory for it.
        """
        found = self._function(
            logits.ctypes.data,
            len(logits),
            inverse_temperature,
            min(top_k, len(logits)),
            top_p,
            least_exponent,
            uniform,
        )
        if found == _NO_MEMORY:
            raise SessionError(f"no memory to draw one of {len(logits)} tokens; free some")
        return found if found >= 0 else None


def drawing_of(library: KernelLibrary | None) -> Drawing | None:
    """Return a library's function; None without a library, or of an older build."""
    if library is None:
        return None
    try:
        return Drawing(library)
    except AttributeError:
        return None
