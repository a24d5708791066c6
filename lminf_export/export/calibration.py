"""Quantises weights on the inputs that a text gives them, one layer of the model after the other.

The text passes the unmodified model as `checkpoint.streamed` reads it. Every layer runs twice: with
its own weights, when the inputs of its projections are counted, and with the quantised ones, so
that the next layer meets what it will meet. What is held at a time is one layer and its statistics;
the blocks wait in files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.stock import stock_model
from lminf_export.errors import InputError
from lminf_export.export.passes.choose_weights import Quantized
from lminf_export.progress import Progress
from lminf_export.quantize.calibrated import InputStatistics, calibrated_rows
from lminf_export.quantize.formats import dequantize_rows
from lminf_export.quantize.spool import SpooledBlocks
from lminf_export.quantize.stored import QuantizedWeight
from lminf_export.runtime.text import TextCodec

# Tokens that attend to each other, and how many of a text are read.
LENGTH = 512
LEAST_TOKENS, MOST_TOKENS, MOST_BYTES = 32, 16384, 2**20
MOST_FEATURES = 2**25


def calibration_batch(tokenizer: Path, file: Path, width: int = 0) -> NDArray[np.int64]:
    """Return the beginning of a text as rows of tokens (B, T), each behind the start tokens.

    Args:
        tokenizer: `tokenizer.json`.
        file: UTF-8 text.
        width: features of a token; of wide ones fewer tokens are read, for they are held at once.

    Raises:
        InputError: the text cannot be read or is too short, or the model has no tokenizer.
    """
    if not tokenizer.is_file():
        raise InputError("calibrate: the model has no tokenizer to read a text with; leave it out")
    codec = TextCodec(tokenizer)
    most = min(MOST_TOKENS, max(LENGTH, MOST_FEATURES // max(width, 1)))
    tokens = codec.encode(_beginning(file), add_special_tokens=False)[:most]
    if len(tokens) < LEAST_TOKENS:
        raise InputError(f"{file.name} has {len(tokens)} tokens; calibrate takes {LEAST_TOKENS}")
    probe = codec.encode("a", add_special_tokens=False)
    first = codec.encode("a")
    first = first[: len(first) - len(probe)] if first[len(first) - len(probe) :] == probe else []
    length = min(LENGTH - len(first), len(tokens))
    count = len(tokens) // length
    rows = np.asarray(tokens[: count * length], np.int64).reshape(count, length)
    return np.concatenate([np.tile(np.asarray(first, np.int64), (count, 1)), rows], axis=1)


def _beginning(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES)
            whole = not opened.read(1)
        return data.decode("utf-8") if whole else data[: data.rindex(b"\n")].decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{file.name} is no UTF-8 text in lines; calibrate takes one") from None


@dataclass(frozen=True)
class Calibration:
    """A calibration on a text.

    Attributes:
        checkpoint: the model.
        batch: (B, T) token ids.
        folder: an existing folder for blocks until they are written.
        progress: told of every layer.
    """

    checkpoint: Checkpoint
    batch: NDArray[np.int64]
    folder: Path
    progress: Progress

    def of(self, pieces: Sequence[Quantized]) -> list[Quantized]:
        """Return the pieces, with the blocks of those that layers multiply by made already."""
        wanted = {p.name: i for i, p in enumerate(pieces) if is_calibrated(p)}
        result = list(pieces)
        if not wanted:
            return result
        model = stock_model(self.checkpoint)
        layers = [0]

        def around(name: str, layer: nn.Module, run: Callable[[], Any]) -> Any:
            self.progress(f"calibrating layer {layers[0]}", None)
            layers[0] += 1
            found = {
                f"{name}.{path}.weight": module
                for path, module in layer.named_modules()
                if isinstance(module, nn.Linear)
            }
            own = {weight: module for weight, module in found.items() if weight in wanted}
            statistics = _count_inputs(own, pieces, wanted, run)
            for weight, module in own.items():
                index = wanted[weight]
                piece = result[index]
                assert isinstance(piece, QuantizedWeight)
                made = SpooledBlocks(self.folder, index)
                _quantize(piece, module.weight, statistics[weight], made)
                result[index] = replace(piece, method="calibrate", made=made)
            return run()

        model.around_layer = around
        model.hidden_states(torch.from_numpy(self.batch))
        return result


def is_calibrated(piece: Quantized) -> bool:
    """Say whether a weight is one that calibration is about: of 4 bits, and not kept."""
    if not isinstance(piece, QuantizedWeight):
        return False
    return piece.form.bits == 4 and piece.method != "keep"


def _count_inputs(
    modules: dict[str, nn.Linear],
    pieces: Sequence[Quantized],
    wanted: dict[str, int],
    run: Callable[[], Any],
) -> dict[str, InputStatistics]:
    """Run a layer, and return the statistics of its projections' inputs, by weight.

    Projections that read one tensor, such as those of queries and keys, share them.
    """
    shared: dict[tuple[int, int], InputStatistics] = {}
    seen: dict[str, InputStatistics] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the place of one that was counted

    def hook(weight: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            piece = pieces[wanted[weight]]
            assert isinstance(piece, QuantizedWeight)
            key = (x.data_ptr(), x.shape[-1])
            if key not in shared:
                shared[key] = InputStatistics(x.shape[-1], piece.form.block_size)
                shared[key].add(x)
                alive.append(x)
            seen[weight] = shared[key]

        return count

    with ExitStack() as hooks:
        for weight, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(hook(weight)).remove)
        run()
    columns = {w: pieces[wanted[w]].tensor.shape[1] for w in modules}
    unseen = {w: _no_inputs(columns[w]) for w in modules if w not in seen}
    return {**seen, **unseen}


def _no_inputs(columns: int) -> InputStatistics:
    """Return statistics of a projection that met no token: all its inputs count the same."""
    statistics = InputStatistics(columns, 1)
    for total in statistics.sums:
        total.diagonal().fill_(1)
    return statistics


@torch.no_grad()
def _quantize(
    piece: QuantizedWeight, weight: Tensor, statistics: InputStatistics, made: SpooledBlocks
) -> None:
    """Quantise a weight, keep its blocks, and put the values they stand for in its place."""
    form = piece.form
    rows = weight.to(torch.float32)
    blocks = calibrated_rows(rows, form, piece.dtype, statistics, positive=piece.signed)
    made.put(blocks)
    weight.copy_(torch.from_numpy(np.ascontiguousarray(dequantize_rows(blocks, form))))
