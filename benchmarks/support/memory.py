"""Anonymous memory of processes, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

# The modules an export imports, for a process that holds only them.
IMPORTS = "import lminf_export.export.run, torch.onnx, transformers.models.llama.modeling_llama"


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")), 0)
