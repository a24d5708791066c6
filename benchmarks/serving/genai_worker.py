"""onnxruntime-genai in a process of its own: it has no server, so prompts go in by Python.

Orders are JSON lines on stdin, answers are JSON lines on stdout: `load` (folder, threads, slots,
longest), `batch` and `engine` (prompts, new: seconds of each token), `follow` (history, more).

Its Engine batches continuously only with paged attention, which its builder writes for CUDA and
WebGPU; on a CPU it takes four requests at a time, and the next four when those have ended. So the
prompts are also given to one generator with a batch of all of them, which is possible as they are
equally long.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai


class Genai:
    """A model, and what it is asked to do."""

    def load(self, folder: str, threads: int, slots: int, longest: int) -> dict[str, Any]:
        config = onnxruntime_genai.Config(folder)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        more = {
            "model": {"decoder": {"session_options": options}},
            "engine": {"static_batching": {"max_batch_size": slots}},
        }
        config.overlay(json.dumps(more))
        self.model, self.longest = onnxruntime_genai.Model(config), longest
        return {}

    def batch(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Continue prompts of one length by one generator."""
        begun = time.perf_counter()
        generator = self._generator(len(prompts))
        generator.append_tokens(np.array(prompts, np.int32))
        arrivals = []
        for _ in range(new):
            generator.generate_next_token()
            arrivals.append(time.perf_counter() - begun)
        return {"arrivals": [arrivals] * len(prompts)}

    def _generator(self, rows: int) -> Any:
        params = onnxruntime_genai.GeneratorParams(self.model)
        # A shortest length keeps the end of text from being chosen.
        params.set_search_options(
            max_length=self.longest, min_length=self.longest, batch_size=rows, do_sample=False
        )
        return onnxruntime_genai.Generator(self.model, params)

    def engine(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Give prompts to an Engine, each as a request."""
        begun = time.perf_counter()
        engine = onnxruntime_genai.Engine(self.model)
        events = engine.create_event_buffer(4 * len(prompts))
        requests = []
        for prompt in prompts:
            options = onnxruntime_genai.RequestOptions()
            options.set_max_session_tokens(self.longest)
            request = engine.create_request(options=options)
            turn = onnxruntime_genai.TurnOptions(request)
            turn.set_do_sample(False)
            turn.set_max_generated_tokens(new)
            turn.set_min_generated_tokens(new)
            request.begin_turn(np.array(prompt, np.int32), turn)
            requests.append(request)
        arrivals: list[list[float]] = [[] for _ in prompts]
        while engine.has_pending_requests():
            found = list(engine.run(events) or ())
            now = time.perf_counter() - begun
            for event in found:
                if event.error_code != onnxruntime_genai.EngineErrorCode.NONE:
                    raise RuntimeError(f"a request failed: {event.error_code.name}")
                if event.token is not None:
                    arrivals[requests.index(event.request)].append(now)
        for request in requests:
            request.close()
        return {"arrivals": arrivals}

    def follow(self, history: list[int], more: list[int]) -> dict[str, Any]:
        """Seconds to the next token: behind a history that was read, and with it."""
        kept = self._generator(1)
        kept.append_tokens(np.array(history, np.int32))
        kept.generate_next_token()
        begun = time.perf_counter()
        kept.append_tokens(np.array(more, np.int32))
        kept.generate_next_token()
        followed = time.perf_counter() - begun
        begun = time.perf_counter()
        fresh = self._generator(1)
        fresh.append_tokens(np.array(history + more, np.int32))
        fresh.generate_next_token()
        return {"kept": followed, "stateless": time.perf_counter() - begun}


def main() -> None:
    genai = Genai()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            found = getattr(genai, order.pop("do"))(**order)
        except RuntimeError as error:
            found = {"refused": str(error)[:300]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
