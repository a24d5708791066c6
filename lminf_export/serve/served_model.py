"""One model that a server serves: its engine, its text, its template."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field

from lminf_export.errors import InputError, LminfError, require_instance, shown
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.chat.files import find_template
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.text import TextCodec
from lminf_export.runtime.token_bytes import TokenBytes
from lminf_export.serve.api_errors import invalid
from lminf_export.serve.settings import ServeSettings

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """A model, the engine that runs it, and what its texts need.

    Attributes:
        name: by which requests ask for it.
        lm: the loaded bundle.
        engine: over its session.
        template: its chat template, or None.
        token_bytes: the bytes of its tokens.
        end_ids: tokens that end an answer in the template, such as <|im_end|>, which not every
            model's files name.
        created: Unix time, seconds.
    """

    name: str
    lm: LanguageModel
    engine: Engine
    template: ChatTemplate | None
    token_bytes: TokenBytes
    end_ids: frozenset[int] = frozenset()
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls,
        name: str,
        lm: LanguageModel,
        settings: ServeSettings,
        template: ChatTemplate | None = None,
    ) -> ServedModel:
        """Start an engine over a model.

        Args:
            name: by which requests ask for it.
            lm: the loaded bundle.
            settings: slots and queue.
            template: instead of the bundle's own.

        Raises:
            InputError: an argument of another kind.
            BundleError: it has no tokenizer, or a damaged template.
            SessionError: the slots' caches are more than the memory holds.
        """
        require_instance("lm", lm, LanguageModel)
        require_instance("settings", settings, ServeSettings)
        if not isinstance(name, str) or not name:
            raise InputError(f"name={shown(name)}: must be a text, not an empty one")
        if template is not None:
            require_instance("template", template, ChatTemplate)
        codec = lm.codec
        if template is None and find_template(lm.bundle.path, lm.bundle.manifest.files):
            template = ChatTemplate.of(lm.bundle)
        engine = Engine(lm, settings.slots, max_waiting=settings.max_waiting)
        state_bytes = engine.stats().cache_bytes // settings.slots
        if 0 < settings.session_bytes < state_bytes:
            logger.warning(
                "a conversation of %s has up to %d bytes, and session_bytes is %d: long ones are "
                "not kept in memory", name, state_bytes, settings.session_bytes,
            )  # fmt: skip
        ends = frozenset() if template is None else _end_ids(template, codec)
        return cls(name, lm, engine, template, TokenBytes(codec.tokenizer), ends)

    def require_template(self) -> ChatTemplate:
        """Return the chat template.

        Raises:
            ApiError: 400 if there is none.
        """
        if self.template is None:
            raise invalid(
                f"{self.name} has no chat template, so it cannot chat; use /v1/completions, or "
                "start lminf serve with --template FILE",
                "messages",
                "no_chat_template",
            )
        return self.template


def _end_ids(template: ChatTemplate, codec: TextCodec) -> frozenset[int]:
    for system in (None, "Be brief."):  # some templates refuse a system's message, some need one
        with suppress(LminfError):
            return template.end_ids(codec, system=system)
    return frozenset()  # nothing can be added behind its answers; they are rendered whole
