"""How much attention the stock demo models pay to tokens further away than training ever showed.

    python -m benchmarks.evaluation.far_attention

Where perplexity explodes beyond the training length, attention goes there; see docs/evidence.md.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.evaluation.evidence import CONTEXT, MODELS, RESULTS, texts
from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment

TOKENS = 8 * CONTEXT
QUERIES = 256


@torch.no_grad()
def far_share(name: str) -> list[float]:
    """Return, by layer, the mean share of the last queries' attention beyond training's reach."""
    folder = MODELS[name]
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mpt":
        config.max_seq_len = TOKENS  # the length of its table of biases
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(texts(name)[0].read_text(encoding="utf-8")).ids[:TOKENS]
    layers = model(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    distance = torch.arange(TOKENS)[-QUERIES:, None] - torch.arange(TOKENS)[None]
    far = distance >= CONTEXT
    return [round((weights[0, :, -QUERIES:] * far).sum(-1).mean().item(), 4) for weights in layers]


def main() -> None:
    shares = {MODELS[name].name: far_share(name) for name in ("llama", "mpt")}
    write_result(
        RESULTS / "far-attention.json",
        {
            "evaluation": "attention beyond the training length",
            "training_length": CONTEXT,
            "tokens": TOKENS,
            "queries": QUERIES,
            "share_by_layer": shares,
            **environment(),
        },
    )


if __name__ == "__main__":
    main()
