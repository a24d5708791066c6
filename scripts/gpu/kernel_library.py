"""The kernels' shared library from Python: ctypes over torch tensors' addresses.

The same calls drive the library built by nvcc on a GPU and the one built by a C++ compiler on
the block emulation, so that what compares them is tested without a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lminf_export.operator import contract

DATA_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KERNEL_NAMES = (
    *("simple", "decode8", "decode16", "tiles64", "tiles128"),
    *("tiles_hopper", "tiles_tall"),
)
# Which kernels a library may choose: `lminf::KernelPreference`.
PREFERENCES = ("portable", "by_device", "hopper", "tall")
SUPPORTED_HEAD_DIMS = (32, 64, 80, 96, 128, 256)

_TENSORS = (*contract.input_names(key_bias=True), *contract.output_names(int8_cache=True))
_ATTRIBUTE_TYPES = {"int": ctypes.c_int64, "float": ctypes.c_float}
_SIZES = (
    *("batch_size", "num_heads", "num_kv_heads", "sequence_length", "capacity", "head_dim"),
    "sink_batch_size",
)


class Params(ctypes.Structure):
    """`lminf::LambdaAttentionParams` of plugins/operator/params.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((x.name, _ATTRIBUTE_TYPES[x.kind]) for x in contract.ATTRIBUTES),
        ("data_type", ctypes.c_int32),
        ("int8_cache", ctypes.c_bool),
        ("has_key_bias", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("growing_ring", ctypes.c_bool),
    )


@dataclass(frozen=True)
class Plan:
    """Choices of the launcher: see plugins/lambda_attention/plan.h."""

    kernel: str
    rows_per_block: int
    row_blocks: int
    splits: int
    threads: int
    keys_per_tile: int
    shared_bytes: int


@dataclass(frozen=True)
class Choices:
    """`lminf::LaunchChoices` of plugins/lambda_attention/lambda_attention.h.

    Attributes:
        splits: of the keys; 0 leaves them to the plan.
        starts_early: a kernel may start before the one ahead of it ends.
        appends_in_decode: a single token is appended by the decode kernel.
        arrivals: of `KernelLibrary.arrivals`, where the block of decode that ends last combines its
            splits; None where a kernel does.
    """

    splits: int = 0
    starts_early: bool = True
    appends_in_decode: bool = True
    arrivals: Tensor | None = field(default=None, compare=False)


CHOSEN_BY_PLAN = Choices()


class KernelError(RuntimeError):
    """The library refused a call or the device failed it."""


class KernelLibrary:
    """A loaded liblminf_kernels.so; every tensor given to it must live where its kernels run.

    Args:
        path: the library.
        preference: which kernels may run: "portable" (those for every device, which is what runs
            if nobody asks), "by_device" (and those of the device, where the shape is theirs),
            "hopper" (that of compute capability 9.0 with any number of rows, where it can) or
            "tall" (warps of 32 query rows, for more rows than decode takes, where they can).

    Raises:
        KernelError: its params struct is not the one described here.
    """

    def __init__(self, path: Path, preference: str = "portable") -> None:
        self.path = path
        self.preference = preference
        self.c = ctypes.CDLL(str(path))
        self.c.lminfParamsSize.restype = ctypes.c_size_t
        self.c.lminfValidate.restype = ctypes.c_size_t
        self.c.lminfWorkspaceSize.restype = ctypes.c_size_t
        self.c.lminfArrivalBytes.restype = ctypes.c_size_t
        self.c.lminfErrorName.restype = ctypes.c_char_p
        if self.c.lminfParamsSize() != ctypes.sizeof(Params):
            raise KernelError(
                f"{path}: its params take {self.c.lminfParamsSize()} bytes, "
                f"{ctypes.sizeof(Params)} expected; build it from this checkout"
            )

    @property
    def has_hopper(self) -> bool:
        """Whether it holds the kernel for compute capability 9.0."""
        return bool(self.c.lminfHasHopper())

    def problem(self, params: Params) -> str:
        """Return the message of the library's own validation, empty if there is none."""
        message = ctypes.create_string_buffer(1024)
        self.c.lminfValidate(ctypes.byref(params), message, ctypes.c_size_t(len(message)))
        return message.value.decode()

    def workspace_size(self, params: Params) -> int:
        """Return the bytes of scratch memory that a call can make use of."""
        return int(self.c.lminfWorkspaceSize(ctypes.byref(params)))

    def arrivals(self, params: Params, device: str) -> Tensor:
        """Return the counters of `Choices.arrivals` for calls of these sizes, int32, all zero."""
        count = int(self.c.lminfArrivalBytes(ctypes.byref(params))) // 4
        return torch.zeros(count, dtype=torch.int32, device=device)

    def plan(
        self,
        params: Params,
        multiprocessors: int,
        shared_bytes: int,
        workspace_bytes: int,
        *,
        hopper: bool = False,
    ) -> Plan:
        """Return what the launcher would do on a device with these limits."""
        numbers = (ctypes.c_int64 * 7)()
        self.c.lminfPlan(
            ctypes.byref(params),
            multiprocessors,
            ctypes.c_size_t(shared_bytes),
            int(hopper and self.has_hopper),
            ctypes.c_size_t(workspace_bytes),
            PREFERENCES.index(self.preference),
            numbers,
        )
        kernel, *rest = (int(n) for n in numbers)
        return Plan(KERNEL_NAMES[kernel], *rest)

    def launch(
        self,
        params: Params,
        workspace: Tensor | None,
        stream: int = 0,
        choices: Choices = CHOSEN_BY_PLAN,
    ) -> None:
        """Enqueue one call.

        Raises:
            KernelError: with the library's message or the name of the CUDA error.
        """
        status = self.c.lminfLaunchWith(
            ctypes.byref(params),
            PREFERENCES.index(self.preference),
            choices.splits,
            int(choices.starts_early),
            int(choices.appends_in_decode),
            _address(choices.arrivals),
            _address(workspace),
            ctypes.c_size_t(
                workspace.numel() * workspace.element_size() if workspace is not None else 0
            ),
            ctypes.c_void_p(stream),
        )
        if status:
            name = self.c.lminfErrorName(status).decode()
            raise KernelError(self.problem(params) or f"launch failed: {name}")


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def params_of(
    inputs: list[Tensor],
    outputs: list[Tensor],
    attributes: dict[str, Any],
    *,
    growing: bool = False,
) -> Params:
    """Describe one call of the operator.

    Args:
        inputs: the operator's 17 inputs in order (lminf_export/operator/contract.py), contiguous;
            19 with rings of int8.
        outputs: its 5 outputs, 7 with rings of int8; a present tensor that is its past is updated
            in place.
        attributes: num_sink_tokens, window_size, distance_limit, scale, softcap, rotary_dim,
            rotary_interleaved.
        growing: the ring may be smaller than W + S − 1 and does not wrap in this call.

    Returns:
        The struct; it holds addresses only, so the tensors must outlive it.
    """
    int8 = inputs[3].dtype == torch.int8
    names = (*contract.input_names(int8_cache=int8), *contract.output_names(int8_cache=int8))
    tensors = dict(zip(names, (*inputs, *outputs), strict=True))
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise KernelError(f"{name}: must be contiguous")
    batch, heads, steps, head_dim = tensors["query"].shape
    _, kv_heads, capacity, _ = tensors["past_key"].shape
    return Params(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        data_type=DATA_TYPES[tensors["query"].dtype],
        int8_cache=int8,
        batch_size=batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        sequence_length=steps,
        capacity=capacity,
        head_dim=head_dim,
        sink_batch_size=tensors["past_sink_key"].shape[0],
        growing_ring=growing,
        **attributes,
    )
