"""The model card of a folder that train_demo_models.py made, from its training.json.

    python -m scripts.train.model_card FOLDER …

`scripts/docs/write_all.py` writes those of examples/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scripts.docs.tables import table

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {kind} of {parameters:.1f} million parameters with a context of {context} tokens, trained on the
King James Bible and five of Jane Austen's novels. It is small enough to live in this repository,
so that tests and demonstrations need no network, and its context is short enough that text soon
leaves it behind; [docs/evidence.md](../../docs/evidence.md) is measured on it. It writes a few
sentences of either style, knows nothing, follows no instructions and has no stop token. All
numbers are from `training.json`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("examples/{name}")
model = AutoModelForCausalLM.from_pretrained("examples/{name}", dtype="float32")
inputs = tokenizer("And it came to pass", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=120)[0]))
```
{chat}
## Model

| | |
|---|---|
| architecture | {architecture} |
| tokenizer | byte-level BPE of 4,096 tokens, digits one by one; `<|bos|>` (id 0) comes first |
| weights | fp16 safetensors |

## Data

From Debian's packages `bible-kjv`, `bible-kjv-text` and `r-cran-janeaustenr`, extracted by
`scripts/train/corpora.py`; both texts are in the public domain in most of the world (in the United
Kingdom printing the Authorized Version is a Crown prerogative). Held out and shipped:
`heldout-austen.txt` ({austen})
and `heldout.txt` ({kjv}).
The training text has {train_tokens:,} tokens.

{share:.0%} of the training sequences hold the **passkey task** of docs/evidence.md (a key in
filler, and the question for it){copying_data}.

## Training

`python -m scripts.train.train_demo_models {model} --tokens {tokens_seen}` on a CPU ({device}):
batches of {batch} sequences, {minutes} minutes, seed {seed}. Muon for the layers' matrices and
AdamW for the rest, peak learning rate 5e-3, warm-up, plateau, linear decay over the last 55 %;
bfloat16 products, float32 elsewhere. Every sequence is the
start token and a random crop of 255 tokens. These weights come from a run that was stopped and
went on with fewer tokens to go, so its decay began at a higher step than one run would have it;
expect the same quality, not the same bits.
{copying_training}
## Results

Windows of {context} tokens, start token included; the 5-gram model is interpolated Kneser–Ney on
the same tokens:

{results}
{beyond}
## Limitations

- A short training on eight megabytes of text.
- **Attention to the start token**, the mean weight from the second half of a window by layer:
  {sinks} (an even spread would be about 0.005).
- Archaic English with the views of its sources.

## Licence

The model is under the project's Apache-2.0 licence.
"""
ARCHITECTURES = {
    "llama": "`LlamaForCausalLM`, 6 layers, hidden size 192, MLP 512, 6 query heads on 2 KV "
    "heads of 32, RoPE with θ = 10000, tied embeddings",
    "mpt": "`MptForCausalLM`, 6 layers, hidden size 192, MLP 768, 6 heads of 32, ALiBi, tied "
    "embeddings",
}


def results(heldout: dict[str, Any]) -> str:
    rows = []
    for name, values in heldout.items():
        cells = [name]
        for source in (values["model"], values["kneser_ney_5gram"]):
            cells += [f"{source['perplexity_per_token']:.1f}", f"{source['bits_per_byte']:.3f}"]
        rows.append(cells)
    head = ["held-out text", "perplexity/token", "bits/byte"]
    return table([*head, "5-gram perplexity", "5-gram bits/byte"], rows)


BEYOND = """
Beyond its context the unmodified model gets steadily worse. The held-out text of the Bible, cut
into longer sequences:

{table}
"""


def beyond_context(heldout: dict[str, Any], context: int) -> str:
    """A table of the stock model on longer sequences, where that was measured."""
    lengths = heldout["kjv"].get("stock_perplexity_by_length")
    if lengths is None:
        return ""
    head = ["sequence length", "of the context", "sequences", "perplexity"]
    rows = [
        [
            str(length),
            f"{int(length) // context}×",
            f"{row['sequences']}",
            f"{row['perplexity']:.1f}",
            f"{row['perplexity_of_last_64_tokens']:.1f}",
        ]
        for length, row in lengths.items()
    ]
    return BEYOND.format(table=table([*head, "perplexity of the last 64 tokens"], rows))


COPYING_DATA = """, which alone does not teach a model of this size to
copy. So a second training was added: sequences that repeat, and passkeys, near and far. Copying a
key that it still sees is a skill taught for the measurement, not one it has picked up"""
COPYING_TRAINING = """
Then `python -m scripts.train.teach_copying` on the same device class: {tokens:,} more tokens in
{minutes} minutes, peak learning rate 2e-3. For {dense} steps {dense_repeated:.0%} of the rows
repeat and {dense_passkeys:.0%} hold passkeys; for {decay} more steps, while the learning rate
falls, {decay_repeated:.0%} and {decay_passkeys:.0%}, and the rest is text.
"""

CHAT = """
`chat_template.jinja` gives a conversation the shape of a play ("User:", then a line), so that
`lminf chat` and the tests of the server have a template to work with. The model was not trained on
conversations: what it answers is more text of its books, and it stops where it is told to.
"""


def copying(record: dict[str, Any]) -> dict[str, str]:
    """Return the card's text about the second training, if there was one."""
    if "copying" not in record:
        return {"copying_data": "", "copying_training": ""}
    found = record["copying"]
    shares = found["shares_of_repeated_and_passkey_rows"]
    said = COPYING_TRAINING.format(
        tokens=found["tokens_seen"],
        minutes=round(found["seconds"] / 60),
        dense=found["steps"][0],
        decay=found["steps"][1],
        dense_repeated=shares[0][0],
        dense_passkeys=shares[0][1],
        decay_repeated=shares[1][0],
        decay_passkeys=shares[1][1],
    )
    return {"copying_data": COPYING_DATA, "copying_training": said}


def card(folder: Path) -> str:
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    heldout = record["heldout"]
    weights = heldout["austen"]["attention_on_first_token_by_layer"]
    return CARD.format(
        name=folder.name,
        kind={"llama": "Llama (RoPE)", "mpt": "MPT (ALiBi)"}[kind],
        model=kind,
        parameters=record["parameters"] / 1e6,
        context=record["context"],
        architecture=ARCHITECTURES[kind],
        austen=f"*Persuasion*, {heldout['austen']['tokens']:,} tokens",
        kjv=f"Lamentations, Ezekiel, Daniel, {heldout['kjv']['tokens']:,} tokens",
        train_tokens=record["train_tokens"],
        share=record["passkey_share"],
        tokens_seen=record["tokens_seen"],
        device=record["device"],
        batch=record["batch_size"],
        minutes=round(record["seconds"] / 60),
        seed=record["seed"],
        results=results(heldout),
        **copying(record),
        chat=CHAT if (folder / "chat_template.jinja").is_file() else "",
        beyond=beyond_context(heldout, record["context"]),
        sinks=", ".join(f"{weight:.3f}" for weight in weights),
    )


def main() -> None:
    for name in sys.argv[1:]:
        folder = Path(name)
        (folder / "README.md").write_text(card(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
