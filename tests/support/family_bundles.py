"""A family's tiny model and its bundle, exported once for all tests that look at them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support.families import FamilyCase
from benchmarks.support.family_check import export_family
from tests.support.made_once import MadeOnce


def family_folder(made_once: MadeOnce, case: FamilyCase) -> Path:
    """Return the folder of a case as it is registered: the model in m, its bundle in b."""
    return made_once.made(f"families/{case.model_type}", lambda to: export_family(case, to))
