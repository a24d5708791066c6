"""Python that a model's repository brings: whether it may run, and models made of it.

The leave to run it is given once, when a model is opened, and stays with its configuration and
every copy of it. All models are built here, so that none is built without asking.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lminf_export.bundle.versions import package_version
from lminf_export.errors import LminfError, ModelError, shortened
from lminf_export.models.transformers_tables import CODE_ERRORS

_LEAVE = "_lminf_may_run_its_code"
_CLASS = "AutoModelForCausalLM"
_ATTENTION = "attn_implementation"


def allow_code(config: Any) -> None:
    """Let models of a configuration, and of its copies, run Python of their repository."""
    setattr(config, _LEAVE, True)


def may_run_code(config: Any) -> bool:
    """Whether models of a configuration may run Python of their repository."""
    return bool(getattr(config, _LEAVE, False))


def runs_own_code(config: Any) -> bool:
    """Whether models of a configuration are classes of their repository, not of transformers."""
    return may_run_code(config) and _CLASS in (getattr(config, "auto_map", None) or {})


def is_own_class(cls: type) -> bool:
    """Whether a class is written in a repository that was fetched, not in a package."""
    return cls.__module__.startswith("transformers_modules.")


def new_model(config: Any, **settings: Any) -> nn.Module:
    """Build a causal language model with random weights; the configuration is not changed.

    A repository's own class is taken from its files each time. transformers would remember it for
    every configuration of that class, also those that have no leave.

    Args:
        config: of the model.
        settings: of transformers' `from_config`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = copy.deepcopy(config)
    if not runs_own_code(config):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
    with running_code_of(config):
        cls: Any = get_class_from_dynamic_module(config.auto_map[_CLASS], config.name_or_path)
        try:
            return cls._from_config(config, **settings)
        except KeyError as error:
            # Older code looks the attention's name up in a table of its own classes.
            name = settings.get(_ATTENTION)
            if name is None or error.args != (name,):
                raise
        return cls._from_config(config, **{**settings, _ATTENTION: "eager"})


@contextmanager
def running_code_of(config: Any, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run what may be code of a repository, and say so where it fails.

    Args:
        config: of the model.
        dtype: of its parameters. Such code makes masks in torch's default type and puts the least
            number of its parameters' type into them.

    Raises:
        ModelError: the repository's code has failed.
    """
    if not runs_own_code(config):
        yield
        return
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        yield
    except CODE_ERRORS as error:
        if isinstance(error, LminfError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(
            f"the repository's own code of this {shortened(config.model_type, 40)} model fails "
            f"with transformers {package_version('transformers')}, for which it may not be "
            f"written: {shortened(reason, 120)}"
        ) from error
    finally:
        torch.set_default_dtype(before)
