"""How a benchmark gives its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Print a result as JSON on the last line, and write it if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    sys.stdout.flush()
