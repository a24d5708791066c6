"""One contestant of `race.py` in a process of its own: orders as JSON lines in, answers out.

Orders: load, first, prefill (tokens), stand (context), decode (tokens), memory. Between orders it
waits on stdin and is stopped by its parent, so that it takes nothing from who is being timed.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# What a peer can be asked to read before a measurement; beyond, its cache must be set.
READ_LIMIT = 4096
ROOM = 256
SEED = 0


class Limits:
    """Set by the parent."""

    read = READ_LIMIT


class Contestant(Protocol):
    """A contestant; contexts are tokens seen so far."""

    def load(self) -> None:
        """Load the model."""

    def prefill(self, tokens: list[int]) -> None:
        """Read a prompt into a fresh cache and compute the next token's logits."""

    def stand(self, context: int) -> str:
        """Go to a context; say whether it was "read" or "set". ValueError where it cannot."""

    def step(self) -> None:
        """Decode one token."""


def anonymous_bytes() -> int:
    """Memory that no file backs; shared memory is of that kind, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kinds = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def random_tokens(count: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(SEED).integers(5, vocab_size, count).tolist()


class Ours:
    """A bundle of lminf-export."""

    def __init__(self, work: Path, precision: str, threads: int, longest: int) -> None:
        import lminf_export  # noqa: F401  # imports count as imports

        self.folder, self.threads = work / f"ours-{precision}", threads

    def load(self) -> None:
        import lminf_export

        self.model = lminf_export.load(self.folder, threads=self.threads, **self.options())
        self.vocab_size = self.model.vocab_size
        self.state: Any = self.model.new_state()
        self.token = np.array([[7]])

    def options(self) -> dict[str, Any]:
        return {}

    @property
    def attention(self) -> str:
        """The name of the implementation of Λ-attention."""
        return getattr(self.model.session, "attention", "the graph's function body")

    def prefill(self, tokens: list[int]) -> None:
        self.state = self.model.new_state()
        self.model.forward([tokens], self.state, logits="last")

    def stand(self, context: int) -> str:
        # The ring is as large as it would be here; what it holds costs the same whatever it is.
        is_new = self.state.furthest < context
        self.model.session.stand_at(self.state, context)
        if is_new:
            self.model.session.fill(self.state, np.random.default_rng(SEED))
        return "set"

    def step(self) -> None:
        self.model.forward(self.token, self.state, logits="last")


class OursWithoutKernel(Ours):
    """The same bundle on the graph's own function body."""

    def options(self) -> dict[str, Any]:
        import lminf_export

        known = inspect.signature(lminf_export.load).parameters
        return {"kernels": "none"} if "kernels" in known else {}


class Transformers:
    """transformers with DynamicCache and scaled_dot_product_attention, in float32."""

    def __init__(self, work: Path, precision: str, threads: int, longest: int) -> None:
        import torch
        import transformers.models.llama.modeling_llama

        assert transformers.models.llama.modeling_llama
        self.torch, self.folder = torch, work / "checkpoint"
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def load(self) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.torch.float32, attn_implementation="sdpa"
        ).eval()
        self.config = self.model.config
        self.vocab_size = self.config.vocab_size
        # By the configuration, layers with a sliding window forget.
        self.new_cache = partial(DynamicCache, config=self.config)
        self.token = self.torch.tensor([[7]])
        self.cache = self.new_cache()

    def prefill(self, tokens: list[int]) -> None:
        self.cache = self.new_cache()
        self._run(self.torch.tensor([tokens]))

    def stand(self, context: int) -> str:
        forgets = any(getattr(layer, "is_sliding", False) for layer in self.cache.layers)
        if self.cache.get_seq_length() > context and not forgets:
            self.cache.crop(context)
        if self.cache.get_seq_length() == context:
            return "set"
        config = self.config
        dim = getattr(config, "head_dim", None)
        dim = dim or config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, context, dim)
        self.cache = self.new_cache()
        for layer in range(config.num_hidden_layers):
            self.cache.update(self.torch.randn(shape), self.torch.randn(shape), layer)
        return "set"

    def step(self) -> None:
        self._run(self.token)

    def _run(self, ids: Any) -> None:
        self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


class Genai:
    """onnxruntime-genai through its own generator, up to READ_LIMIT; beyond, its graph."""

    def __init__(self, work: Path, precision: str, threads: int, longest: int) -> None:
        import onnxruntime_genai

        self.api, self.folder = onnxruntime_genai, work / f"genai-{precision}"
        self.threads, self.longest = threads, longest

    def load(self) -> None:
        config = self.api.Config(str(self.folder))
        options = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = self.api.Model(config)
        self.vocab_size = json.loads((self.folder / "genai_config.json").read_text())["model"][
            "vocab_size"
        ]
        self.generator = self._new_generator()

    def _new_generator(self) -> Any:
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=self.longest, do_sample=False)
        return self.api.Generator(self.model, params)

    def prefill(self, tokens: list[int]) -> None:
        self.generator = self._new_generator()
        self.generator.append_tokens(np.array(tokens, np.int32))
        self.generator.generate_next_token()

    def stand(self, context: int) -> str:
        if context > min(Limits.read, self.longest - ROOM // 2):
            raise ValueError("its cache cannot be set; reading that many tokens takes too long")
        before = context - 1
        if self.generator.token_count() > before:
            self.generator.rewind_to(before)
            missing = [7]
        else:
            missing = random_tokens(context, self.vocab_size)[self.generator.token_count() :]
        self.generator.append_tokens(np.array(missing, np.int32))
        self.generator.generate_next_token()  # takes the token whose logits are there already
        return "read"

    def step(self) -> None:
        self.generator.generate_next_token()


class GenaiGraph:
    """The graph of onnxruntime-genai in onnxruntime, past and present bound to one buffer."""

    def __init__(self, work: Path, precision: str, threads: int, longest: int) -> None:
        import onnxruntime

        self.ort, self.folder = onnxruntime, work / f"genai-{precision}"
        self.threads, self.longest = threads, longest

    def load(self) -> None:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        self.session = self.ort.InferenceSession(
            str(self.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        table = {x.name: x for x in self.session.get_inputs()}
        self.vocab_size = self.session.get_outputs()[0].shape[-1]
        self.names = set(table)
        self.caches = {}
        model = json.loads((self.folder / "genai_config.json").read_text())["model"]["decoder"]
        heads, dim = model["num_key_value_heads"], model["head_size"]
        for name in table:
            if name.startswith("past"):
                shape = (1, heads, self.longest, dim)
                array = np.zeros(shape, np.float32)
                self.caches[name] = self.ort.OrtValue.ortvalue_from_numpy(array), array
        self.position = 0

    def prefill(self, tokens: list[int]) -> None:
        raise ValueError("measured through its own generator")

    def stand(self, context: int) -> str:
        if context + 64 > self.longest:
            raise ValueError(f"its context ends at {self.longest}")
        if not self.position:
            for _, array in self.caches.values():
                array[...] = 0.5
        self.position = context
        return "set"

    def step(self) -> None:
        binding = self.session.io_binding()
        one = {
            "input_ids": np.array([[7]]),
            "attention_mask": np.ones((1, self.position + 1), np.int64),
            "position_ids": np.array([[self.position]]),
        }
        for name, array in one.items():
            if name in self.names:
                binding.bind_cpu_input(name, array)
        for name, (value, _) in self.caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.position += 1


class LlamaCpp:
    """llama.cpp, its cache in float16 as it comes."""

    # Layers with a sliding window keep everything where the cache is to be shifted.
    SHIFTS = False

    def __init__(self, work: Path, precision: str, threads: int, longest: int) -> None:
        import llama_cpp

        self.api, self.path = llama_cpp, work / f"llama-{precision}.gguf"
        self.threads, self.longest = threads, longest

    def load(self) -> None:
        known = inspect.signature(self.api.Llama.__init__).parameters
        settings = {"swa_full": self.SHIFTS} if "swa_full" in known else {}
        if "flash_attn" in known:  # faster on a CPU, too
            settings["flash_attn"] = True
        self.model = self.api.Llama(
            str(self.path), n_ctx=self.longest, n_threads=self.threads,
            n_threads_batch=self.threads, n_batch=512, verbose=False, **settings,
        )  # fmt: skip
        self.context = self.model.ctx
        self.vocab_size, self.count = self.model.n_vocab(), 0

    def prefill(self, tokens: list[int]) -> None:
        self._rewind(0)
        self._read(tokens)

    def stand(self, context: int) -> str:
        if context > min(Limits.read, self.longest - ROOM // 2):
            raise ValueError("its cache cannot be set; reading that many tokens takes too long")
        self._rewind(min(context, self.count))
        self._read(random_tokens(context, self.vocab_size)[self.count :])
        return "read"

    def step(self) -> None:
        self._read([7])

    def _rewind(self, count: int) -> None:
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_rm(memory, -1, count, -1)
        self.count = count

    def _read(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), 512):
            piece = tokens[start : start + 512]
            array = (self.api.llama_token * len(piece))(*piece)
            batch = self.api.llama_batch_get_one(array, len(piece))
            if self.api.llama_decode(self.context, batch):
                raise ValueError("llama_decode failed")
        self.count += len(tokens)


class LlamaCppShift(LlamaCpp):
    """llama.cpp with a bounded context: when it is full, half of what is not kept is dropped."""

    SHIFTS = True
    CONTEXT, KEPT = 2048, 16

    def load(self) -> None:
        self.longest = self.CONTEXT
        super().load()

    def stand(self, context: int) -> str:
        if context < self.CONTEXT:
            return super().stand(context)
        self._rewind(0)
        self._read(random_tokens(self.CONTEXT, self.vocab_size))
        return "its context full"

    def step(self) -> None:
        if self.count == self.CONTEXT:
            memory = self.api.llama_get_memory(self.context)
            dropped = (self.CONTEXT - self.KEPT) // 2
            first = self.KEPT + dropped
            self.api.llama_memory_seq_rm(memory, 0, self.KEPT, first)
            self.api.llama_memory_seq_add(memory, 0, first, self.count, -dropped)
            self.count -= dropped
        super().step()


KINDS: dict[str, Any] = {
    "ours": Ours,
    "ours-body": OursWithoutKernel,
    "transformers": Transformers,
    "genai": Genai,
    "genai-graph": GenaiGraph,
    "llama.cpp": LlamaCpp,
    "llama.cpp-shift": LlamaCppShift,
}


def answer(contestant: Contestant, order: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked; times in seconds."""
    kind = order["do"]
    start = time.perf_counter()
    if kind == "load":
        contestant.load()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "attention": getattr(contestant, "attention", None)}
    if kind == "first":
        contestant.prefill([7])
    elif kind == "prefill":
        contestant.prefill(random_tokens(order["tokens"], contestant.vocab_size))  # type: ignore[attr-defined]
    elif kind == "stand":
        return {"how": contestant.stand(order["context"])}
    elif kind == "decode":
        times = []
        for _ in range(order["tokens"]):
            begin = time.perf_counter()
            contestant.step()
            times.append(time.perf_counter() - begin)
        return {"times": times}
    elif kind == "memory":
        return {"anonymous_bytes": anonymous_bytes()}
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    kind, precision, work, threads, longest, read_limit = sys.argv[1:]
    Limits.read = int(read_limit)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    contestant = KINDS[kind](Path(work), precision, int(threads), int(longest))
    print(json.dumps({"anonymous_bytes": anonymous_bytes()}), file=replies, flush=True)
    for line in sys.stdin:
        try:
            found = answer(contestant, json.loads(line))
        except ValueError as error:  # it cannot do this, and says why
            found = {"refused": str(error)}
        print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    main()
