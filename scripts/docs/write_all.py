"""Write every page, card and header that is generated, or check that all are current.

python -m scripts.docs.write_all
python -m scripts.docs.write_all --check          write nothing, exit with 1 if one is stale
python -m scripts.docs.write_all docs/models.md   only this one
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.docs import (
    api_reference,
    cpu_kernel,
    evidence,
    evidence_real,
    fleet,
    models,
    operator_contract,
    performance,
    quantization,
    rewriting,
    scaling,
    serving,
    triton,
)
from scripts.docs.tables import ROOT, page
from scripts.gpu import report
from scripts.train.model_card import card

# File → what it must hold.
PAGES: dict[str, Callable[[], str]] = {
    "README.md": partial(page, "../README.md", {**evidence_real.TABLES, **rewriting.TABLES}),
    "docs/api.md": api_reference.page,
    "docs/chat.md": partial(page, "chat.md", serving.TABLES),
    "docs/cpu_kernel.md": partial(page, "cpu_kernel.md", cpu_kernel.TABLES),
    "docs/evidence.md": partial(page, "evidence.md", {**evidence.TABLES, **evidence_real.TABLES}),
    "docs/gpu.md": report.current_page,
    "docs/models.md": partial(page, "models.md", models.TABLES),
    "docs/operator.md": partial(page, "operator.md", operator_contract.TABLES),
    "docs/performance.md": partial(page, "performance.md", performance.TABLES),
    "docs/quantization.md": partial(page, "quantization.md", quantization.TABLES),
    "docs/rewriting.md": partial(page, "rewriting.md", rewriting.TABLES),
    "docs/scaling.md": partial(page, "scaling.md", {**scaling.TABLES, **fleet.TABLES}),
    "docs/serving.md": partial(page, "serving.md", serving.TABLES),
    "docs/triton.md": partial(page, "triton.md", triton.TABLES),
    "examples/demo-llama/README.md": partial(card, ROOT / "examples" / "demo-llama"),
    "examples/demo-mpt/README.md": partial(card, ROOT / "examples" / "demo-mpt"),
    "plugins/operator/contract.h": operator_contract.header,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="of the repository; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.files if name not in PAGES]
    if unknown:
        parser.error(f"not generated: {', '.join(unknown)}; choose from {', '.join(PAGES)}")
    stale = [name for name in arguments.files or PAGES if not is_current(name)]
    if not arguments.check:
        for name in stale:
            (ROOT / name).write_text(PAGES[name](), encoding="utf-8")
            print(f"wrote {name}")
    elif stale:
        sys.exit(f"stale: {', '.join(stale)}; run python -m scripts.docs.write_all")


def is_current(name: str) -> bool:
    """Whether a file holds what would be written."""
    path: Path = ROOT / name
    return path.is_file() and path.read_text(encoding="utf-8") == PAGES[name]()


if __name__ == "__main__":
    main()
