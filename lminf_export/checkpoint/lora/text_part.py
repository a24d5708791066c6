"""An adapter that was trained on a multimodal model, as one of its text model.

The names in its file are those of the whole model, in its new or its old layout; changes of the
modules that read images or sound are left out. Patterns in its settings are matched with the names
that it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lminf_export.checkpoint.lora.files import Adapter
from lminf_export.checkpoint.text_part import TextPart


@dataclass(frozen=True)
class OuterNames:
    """The names that an adapter has for the modules of a text model.

    Attributes:
        part: the text model in its wrapper.
        trained: name of the text model → the adapter's own, where its file has one.
    """

    part: TextPart
    trained: Mapping[str, str]

    def __call__(self, name: str) -> str:
        """Return the adapter's name of a module or tensor of the text model."""
        return self.trained.get(name) or self.part.outer_name(name)


def of_text_part(adapter: Adapter, part: TextPart) -> tuple[Adapter, str | None]:
    """Return an adapter with the names of the text model, and a notice of what is left out.

    Raises:
        ModelError: it changes nothing of the text model.
    """
    modules = {module: _own_module(module, part) for module, _ in adapter.changes}
    tensors = {name: part.checkpoint_name(name) for name in adapter.replaced}
    changes = {
        (own, depth): change
        for (module, depth), change in adapter.changes.items()
        if (own := modules[module]) is not None
    }
    replaced = {
        own: tensor
        for name, tensor in adapter.replaced.items()
        if (own := tensors[name]) is not None
    }
    others = [name for name, own in {**modules, **tensors}.items() if own is None]
    if not changes and not replaced:
        raise adapter.refuse(
            f"it changes nothing of the text model of this {part.model_type} model, only "
            f"{len(others)} others such as {min(others)}"
        )
    trained = {own: name for name, own in {**modules, **tensors}.items() if own is not None}
    found = replace(
        adapter, changes=changes, replaced=replaced, outer_name=OuterNames(part, trained)
    )
    if not others:
        return found, None
    return found, (
        f"adapter {adapter.name!r} also changes {len(others)} modules that are not of the text "
        f"model, such as {min(others)}: they are left out"
    )


def _own_module(name: str, part: TextPart) -> str | None:
    """Return the text model's name of a module; of one with tensors of any name."""
    found = part.checkpoint_name(f"{name}.weight")
    return part.module_name(name) if found is None else found.removesuffix(".weight")
