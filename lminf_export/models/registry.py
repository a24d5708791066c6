"""The registry of model families: `model_type` → the adapter that plans and patches it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lminf_export.bundle.versions import package_version, supported_versions
from lminf_export.errors import DependencyError
from lminf_export.models.remote_code import runs_own_code

if TYPE_CHECKING:
    from lminf_export.models.base import Family

# Dense models; each is proved by a case of the same name in benchmarks/support/families.py.
_DENSE = (
    "apertus",
    "arcee",
    "bitnet",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neox",
    "granite",
    "helium",
    "jais2",
    "llama",
    "ministral",
    "mistral",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
)
# Mixtures of experts; each is proved by a case in benchmarks/support/families.py.
_EXPERTS = (
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)
# Class, in a module of this package → the model types that it is the adapter of.
_CLASSES: dict[str, tuple[str, ...]] = {
    "rotary.RotaryFamily": (*_DENSE, *_EXPERTS),
    # Proved by cases in benchmarks/support/families.py, as the dense ones.
    "hunyuan.HunyuanFamily": ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    "ministral3.Ministral3Family": ("ministral3",),
    # Families without the attention interface; proved in tests/test_families_own.py.
    "gptj.GptjFamily": ("gptj", "codegen"),
    "mpt.MptFamily": ("mpt",),
    "bloom.BloomFamily": ("bloom",),
    "falcon.FalconFamily": ("falcon",),
}
# Model type → the class of its adapter; its module is imported when the model type is asked for.
FAMILIES: dict[str, str] = {
    model_type: path for path, model_types in _CLASSES.items() for model_type in model_types
}


def family_of(config: Any) -> Family:
    """Return the family of a configuration: one that probes where the model's code is its own.

    Raises:
        DependencyError: as `find_family`.
    """
    if runs_own_code(config):
        return _probed(config.model_type)
    return find_family(config.model_type)


def find_family(model_type: str) -> Family:
    """Return the family of a `model_type`; of an unknown one, a family that probes it first.

    Raises:
        DependencyError: the family's code cannot be imported beside the installed transformers.
    """
    if model_type not in FAMILIES:
        return _probed(model_type)
    module, _, name = FAMILIES[model_type].rpartition(".")
    try:
        family: Family = getattr(import_module(f"{__package__}.{module}"), name)(model_type)
    except (ImportError, AttributeError) as error:
        raise DependencyError(
            f"the adapter of {model_type} models does not load with transformers "
            f"{package_version('transformers')}, supported is "
            f"transformers{supported_versions('transformers')}: {' '.join(str(error).split())}"
        ) from error
    return family


def _probed(model_type: str) -> Family:
    from lminf_export.models.probe import ProbedFamily

    return ProbedFamily(model_type)
