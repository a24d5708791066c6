"""Train the demo models, which docs/evidence.md is measured on: a RoPE Llama and an ALiBi MPT.

    python -m scripts.train.train_demo_models llama --out examples/demo-llama
    python -m scripts.train.train_demo_models mpt --out examples/demo-mpt
    python -m scripts.train.train_demo_models llama --no-start-token --tokens 3000000 --out build/…

Both read the King James Bible and five of Jane Austen's novels (scripts/train/corpora.py) in crops
of 256 tokens, each behind a start token, and every twelfth sequence holds the passkey task. A run
that is interrupted goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.support.demo_models import HELDOUT_FILES
from scripts.train.corpora import fetch_corpora
from scripts.train.training_data import (
    BATCH_SIZE,
    BOS,
    CHAT_TEMPLATE,
    CONTEXT,
    VOCAB_SIZE,
    Batches,
    encode,
    train_tokenizer,
    windows_of,
)
from scripts.train.training_loop import Schedule, add_options, finish, prepare, save_model, train
from scripts.train.training_record import describe_run

PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 150
DECAY_SHARE = 0.55


def build_model(kind: str) -> PreTrainedModel:
    """Return the untrained model: about 3 M parameters, six layers of width 192."""
    shared = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": None}
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            pad_token_id=None,
            **shared,
        )
        model = LlamaForCausalLM(config)
    else:
        config = MptConfig(d_model=192, n_heads=6, n_layers=6, max_seq_len=CONTEXT, **shared)
        model = MptForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=0, do_sample=True, temperature=1.0, top_p=0.95
    )
    return model


def schedule(tokens: int) -> Schedule:
    """Return the schedule of the learning rate for a number of tokens."""
    steps = tokens // (BATCH_SIZE * CONTEXT)
    return Schedule(steps, PEAK_LEARNING_RATE, WARMUP_STEPS, round(DECAY_SHARE * steps))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama", "mpt"))
    parser.add_argument("--tokens", type=int, default=7_000_000, help="training tokens to see")
    parser.add_argument("--no-start-token", dest="start_token", action="store_false")
    add_options(parser, seed=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prepare(args)
    corpora = fetch_corpora()
    tokenizer = train_tokenizer([corpus.train for corpus in corpora])
    saved_as = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)
    if args.model == "llama":
        saved_as.chat_template = CHAT_TEMPLATE
    saved_as.save_pretrained(args.out)
    train_ids = torch.cat([encode(tokenizer, corpus.train) for corpus in corpora])
    probes = {}
    for corpus in corpora:
        (args.out / HELDOUT_FILES[corpus.name]).write_text(corpus.heldout)
        ids = encode(tokenizer, corpus.heldout)
        print(f"{corpus.name}: {len(ids)} held-out tokens", flush=True)
        probes[corpus.name] = windows_of(ids, args.start_token, limit=32)
    print(f"{len(train_ids)} training tokens", flush=True)
    model = build_model(args.model)
    batches = Batches(train_ids, tokenizer, args.seed, args.start_token)
    seconds = train(model, batches, probes, schedule(args.tokens), args.out)
    save_model(model, args.out)
    saved = type(model).from_pretrained(args.out, dtype=torch.float32).eval()
    record = describe_run(saved, tokenizer, corpora, args, seconds)
    finish(args.out, record)


if __name__ == "__main__":
    main()
