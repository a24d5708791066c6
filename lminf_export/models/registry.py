"""The registry of model families: `model_type` → the adapter that plans and patches it."""

from __future__ import annotations

from lminf_export.models.alibi import BloomFamily, MptFamily
from lminf_export.models.base import Family
from lminf_export.models.falcon import FalconFamily
from lminf_export.models.gptj import GptjFamily
from lminf_export.models.hunyuan import HunyuanFamily
from lminf_export.models.probe import ProbedFamily
from lminf_export.models.rotary import RotaryFamily

# Dense models; each is proved by a case of the same name in benchmarks/support/families.py.
_DENSE = RotaryFamily(
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
_EXPERTS = RotaryFamily(
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
# Families without the attention interface; proved in tests/test_families_own.py.
_OWN = (GptjFamily(), MptFamily(), BloomFamily(), FalconFamily())
# Proved by a case in benchmarks/support/families.py, as the dense ones.
_HUNYUAN = HunyuanFamily("hunyuan_v1_dense", "hunyuan_v1_moe")
_FAMILIES: tuple[Family, ...] = (_DENSE, _EXPERTS, _HUNYUAN, *_OWN)
FAMILIES: dict[str, Family] = {
    model_type: family for family in _FAMILIES for model_type in family.model_types
}


def find_family(model_type: str) -> Family:
    """Return the family of a `model_type`; of an unknown one, a family that probes it first."""
    return FAMILIES.get(model_type) or ProbedFamily(model_type, tuple(sorted(FAMILIES)))
