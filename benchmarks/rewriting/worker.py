"""The contestants of `race.py`, each in a process of its own: those of the peers, and one more."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.peers import worker


class Rewritten(worker.Ours):
    """A graph of onnxruntime-genai as it was rewritten; it chooses each token, as a generator."""

    def __init__(self, work: Path, precision: str, threads: int, longest: int) -> None:
        super().__init__(work, precision, threads, longest)
        self.folder = work / f"rewritten-{precision}"

    def step(self) -> None:
        """Read the last token, choose the next one."""
        logits = self.model.forward(self.token, self.state, logits="last")
        assert logits is not None
        self.token = np.array([[int(np.argmax(logits[0, -1]))]])


def main() -> None:
    worker.KINDS["rewritten"] = Rewritten
    worker.main()


if __name__ == "__main__":
    main()
