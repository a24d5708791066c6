"""The results of `bench`, in records that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FirstToken:
    """A fresh process from its start to its first token, in seconds.

    Attributes:
        process: from starting the interpreter to the first token.
        imports: of that, importing the runtime.
        load: of that, opening the bundle and its graph.
        step: of that, the first step: one token.
        map_weights: reading the weights file once from where the system keeps it now.
    """

    process: float
    imports: float
    load: float
    step: float
    map_weights: float

    @property
    def load_to_first_token(self) -> float:
        """Load and step, as a program feels it that has imported everything."""
        return self.load + self.step


@dataclass(frozen=True)
class Memory:
    """Of the fresh process, in bytes: with everything loaded and every ring full, one stream.

    Attributes:
        imports_anonymous: memory of its own before anything is loaded.
        anonymous: memory of its own, which no file backs.
        total: all that is resident, pages of the mapped weights included.
    """

    imports_anonymous: int
    anonymous: int
    total: int


@dataclass(frozen=True)
class Prefill:
    """Reading a prompt of random tokens into fresh states."""

    batch_size: int
    tokens: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Decode:
    """One token of every stream at a position.

    Attributes:
        batch_size: B.
        position: tokens each stream has seen.
        windows: the same in windows; None where the position is an absolute one.
        ms_per_step: median time of one step, which yields B tokens.
        spread: half the distance of the quartiles, relative to the median.
        bytes_per_step: weights and live cache bytes, each read once.
        floor_ms: bytes_per_step / the measured bandwidth.
        ratio_to_floor: ms_per_step / floor_ms.
    """

    batch_size: int
    position: int
    windows: int | None
    ms_per_step: float
    spread: float
    bytes_per_step: int
    floor_ms: float
    ratio_to_floor: float


@dataclass(frozen=True)
class OutsideRun:
    """Time of a token of one stream outside the engine's run, in seconds; medians.

    Attributes:
        forward: reading a token with `LanguageModel.forward`.
        greedy: making one with `LanguageModel.generate`, the likeliest.
        sampled: the same, drawn: repetition penalty, temperature, top-k and top-p.
    """

    forward: float
    greedy: float
    sampled: float


@dataclass(frozen=True)
class OperatorTime:
    """Time of a decoding step in one kind of operator."""

    kind: str
    ms_per_step: float
    share: float
    calls_per_step: float


@dataclass(frozen=True)
class BenchReport:
    """Everything about one bundle on one machine.

    Attributes:
        bundle: its folder's name.
        model_type: its family.
        dtype: element type of caches and of weights that are not quantised.
        quantization: description of the stored weights; None where they are not quantised.
        kv_cache_dtype: element type of the rings where it is not dtype, else None.
        window_size: W.
        provider: onnxruntime's, or the builder of the plan.
        threads: of one operator; None is onnxruntime's own choice.
        attention: what computed the attention.
        cuda_graph: on a GPU whether single tokens are played from a CUDA graph: "yes", or "no"
            and why; None on a CPU.
        cache_updates: of a plan: whether its caches were updated in place, in words; else None.
        bandwidth: bytes per second of streaming main memory, the best of this run; on a GPU those
            that are read and written in its memory.
        positions_are_set: decoding positions are set, not read: caches hold random numbers.
        first_token: a fresh process.
        memory: of the same process.
        prefill: one row for each batch size.
        decode: one row for each batch size and position.
        outside_run: at the last of the positions.
        profile: slowest kind first; None unless asked for.
        environment: device and versions.
    """

    bundle: str
    model_type: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str | None
    window_size: int
    provider: str
    threads: int | None
    attention: str
    cuda_graph: str | None
    cache_updates: str | None
    bandwidth: float
    positions_are_set: bool
    first_token: FirstToken
    memory: Memory
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    outside_run: OutsideRun
    profile: tuple[OperatorTime, ...] | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        found = asdict(self)
        found["first_token"]["load_to_first_token"] = self.first_token.load_to_first_token
        return found
