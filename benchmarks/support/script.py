"""How a script ends: as its `main` says, or in one line and with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from lminf_export.errors import LminfError


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit.

    An error that its user can cause, one of ours or of a file, is one line on stderr and exit code
    2; any other is a mistake of the script, and keeps its traceback.
    """
    try:
        code = main()
    except LminfError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
    sys.exit(code or 0)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
