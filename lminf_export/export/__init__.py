"""Turn a model of Hugging Face into a bundle: `lminf_export.export(model, out)`.

The package has the name of the function that users call, and importing any of its modules puts
the package in the function's place. So the package can be called, and is then that function:
`lminf_export.export.run.export`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    @property
    def _function(self) -> Any:
        # Here and not above: importing the package must not import torch.
        from lminf_export.export.run import export

        return export

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


sys.modules[__name__].__class__ = _CallablePackage
