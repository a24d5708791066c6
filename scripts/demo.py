"""`make demo`: export the demo model, check it, let it write far past its training length.

Every step is a command anybody can type; they are shown as they run.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("examples/demo-llama")
BUNDLE = Path("demo")
CONTEXTS = 21  # how many training lengths of text to write
PROMPT = "In the beginning"


def show(*command: str) -> None:
    """Print a command and run it; stop with its exit code if it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    program = sys.executable if command[0] == "python" else command[0]
    code = subprocess.run((program, *command[1:]), cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def write_text() -> None:
    """Generate, and show how the text begins and where it is at the end."""
    import lminf_export

    model = lminf_export.load(ROOT / BUNDLE)
    training = model.bundle.manifest.training_length
    assert training is not None
    count = CONTEXTS * training
    print(f"\nwriting {count} tokens, {CONTEXTS}× the training length of {training} …", flush=True)
    decode = model.codec.tokenizer.decode
    state, start = model.new_state(), time.perf_counter()
    ids = list(
        model.generate(
            model.codec.encode(PROMPT), max_new_tokens=count, temperature=1.0, top_p=0.95, seed=1,
            state=state,
        )
    )  # fmt: skip
    seconds = time.perf_counter() - start
    text = ROOT / "demo.txt"
    text.write_text(PROMPT + decode(ids), encoding="utf-8")
    print(f"\n[tokens 1 … 90] {PROMPT}{decode(ids[:90])}")
    print(f"\n[tokens {count - 149} … {count}]{decode(ids[-150:])}")
    print(
        f"\n{count} tokens in {seconds:.1f} s, {1e3 * seconds / count:.2f} ms each; the "
        f"cache holds {state.nbytes} bytes and will hold no more. All of it: {text.name}"
    )


def main() -> None:
    """Run the demonstration from the repository's root."""
    has_builder = importlib.util.find_spec("tensorrt_rtx") is not None
    out = BUNDLE / "engine.plan" if has_builder else BUNDLE
    show("lminf-export", "--model", str(MODEL), "--out", str(out), "--force")
    show("lminf", "inspect", str(BUNDLE))
    show("lminf", "validate", str(BUNDLE))
    write_text()
    show(
        "python", "-m", "benchmarks.evaluation.perplexity", "--bundle", str(BUNDLE),
        "--model", str(MODEL), "--text", str(MODEL / "heldout.txt"), "--factors", "1", "16",
        "--blocks", "12", "--table",
    )  # fmt: skip
    if has_builder:
        print("\nengine.plan was built, not executed: this demo needs no GPU.")


if __name__ == "__main__":
    main()
