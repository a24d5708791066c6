"""A graph's weights get the names that their tensors have in the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require


@dataclass(frozen=True)
class RenameInitializersPass(ir.passes.InPlacePass):
    """Rename initializers; they become the last ones, in the order given.

    Requires: those names are the graph's, and no two initializers would get one name.
    Ensures: the new names are the graph's.

    Attributes:
        names: old name → new one.
    """

    names: Mapping[str, str]

    def requires(self, model: ir.Model) -> None:
        missing = self.names.keys() - model.graph.initializers.keys()
        require(not missing, f"the graph has no initializers {sorted(missing)[:3]}")
        others = model.graph.initializers.keys() - self.names.keys()
        unique = {*others, *self.names.values()}
        wanted = len(others) + len(self.names)
        require(len(unique) == wanted, "two initializers would get one name")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for old, new in self.names.items():
            editing.rename_initializer(model.graph, old, new)
        return ir.passes.PassResult(model, bool(self.names))

    def ensures(self, model: ir.Model) -> None:
        for name in self.names.values():
            value = model.graph.initializers.get(name)
            ensure(value is not None and value.name == name, f"no initializer is called {name}")
