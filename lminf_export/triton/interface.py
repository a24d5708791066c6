"""The backends that models are written for, and the tensors of the python backend's model.

Names are those of Triton's own language model backends (`text_input`, `sampling_parameters`,
`text_output`), so that its `generate` endpoint and its clients fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["python", "onnxruntime", "tensorrt"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a model.

    Attributes:
        name: of the tensor.
        dtype: as config.pbtxt has it.
        dims: −1 for any number.
        meaning: for readers of config.pbtxt.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    meaning: str


INPUTS = (
    ModelTensor("text_input", "TYPE_STRING", (1,), "the text to continue"),
    ModelTensor("input_ids", "TYPE_INT32", (-1,), "or its token ids"),
    ModelTensor("messages", "TYPE_STRING", (1,), "or the messages of a chat, a JSON list"),
    ModelTensor("stream", "TYPE_BOOL", (1,), "send text as it is written; false by default"),
    ModelTensor(
        "sampling_parameters",
        "TYPE_STRING",
        (1,),
        "a JSON object with the fields of /v1/completions: max_tokens, temperature, stop, ...",
    ),
    ModelTensor("return_output_ids", "TYPE_BOOL", (1,), "send token ids beside the text"),
)
OUTPUTS = (
    ModelTensor("text_output", "TYPE_STRING", (1,), "what is new of the text, or all of it"),
    ModelTensor("output_ids", "TYPE_INT32", (-1,), "token ids, if they are asked for"),
    ModelTensor("finish_reason", "TYPE_STRING", (1,), '"stop" or "length" at the end, else ""'),
    ModelTensor("num_input_tokens", "TYPE_INT32", (1,), "of the prompt, with what a session had"),
    ModelTensor("num_cached_tokens", "TYPE_INT32", (1,), "of those, read before"),
    ModelTensor("num_output_tokens", "TYPE_INT32", (1,), "written so far"),
)
