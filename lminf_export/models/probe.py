"""Decides whether a model type without tests can be exported, by a small random instance of it.

A model that fails one of these tests could equal its original inside the window and write wrong
text after it, which no short comparison shows. So its own code runs, small and with random
weights, and its attention calls are examined. In these runs every token attends to itself alone:
positions and other tokens can then reach a query only by ways other than attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ConfigError, ModelError
from lminf_export.models.base import AttentionCall, AttentionPlan, GetModel, use_step
from lminf_export.models.history import HistoryStep
from lminf_export.models.interception import watched
from lminf_export.models.kinds import check_kind, refusal
from lminf_export.models.remote_code import running_code_of
from lminf_export.models.rotary import RotaryFamily, in_layer_order, keep_call
from lminf_export.models.small_model import random_model, small_config, stock_model
from lminf_export.models.steps import run
from lminf_export.models.structure import structural_reasons
from lminf_export.models.transformers_tables import CODE_ERRORS
from lminf_export.operator import reference
from lminf_export.operator.settings import LambdaConfig

_LENGTH, _OFFSET = 19, 37
_UNLIKE = (
    "its attention code is unlike that of the tested models, so how it uses positions is unknown "
    "and text beyond the window could be wrong"
)
_TEMPERATURE = (
    "attention temperature: queries or keys grow with the absolute position, which a graph that "
    "knows distances only cannot follow"
)
# Beyond every trained length: some models scale their queries by how many of those have passed.
_FAR_OFFSET = 2**24 + _OFFSET
# float32 through a few layers; a wrong rotation is wrong by orders of magnitude more.
_TOLERANCE = 1e-3
# Parameters of the small instance that is run: more would take gigabytes and minutes.
_MOST_PARAMETERS = 2**27


class ProbedFamily(RotaryFamily):
    """Adapter of a model type that has no test of its own: probed before it is planned.

    Args:
        model_type: transformers' name.
    """

    def __init__(self, model_type: str) -> None:
        super().__init__(model_type)

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Probe the model, then plan it as any rotary model, with a notice.

        Raises:
            ModelError: naming the test it fails, and what that means.
        """
        kind = config.model_type
        check_kind({"model_type": kind}, config, tested=False)
        reasons = structural_reasons(config)
        if reasons:
            raise refusal(kind, reasons)
        with _explained(kind), running_code_of(config):
            # On the model itself first: what is said of its layers is true of all of them.
            plan = self.observed_plan(config, settings, model)
            self._probe(small_config(config))
        notice = (
            f"model type {kind!r} has no test of its own; it passed the probe (one attention a "
            f"layer, rotation recognised, no other trace of positions, equal to the original "
            f"inside the window): check the bundle with `lminf validate`"
        )
        return replace(plan, notices=(*plan.notices, notice))

    def _probe(self, config: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = random_model(config, _MOST_PARAMETERS)
            tokens = torch.randint(3, config.vocab_size, (1, _LENGTH))
        with torch.no_grad():
            self._test_positions(model, tokens)
            self._test_tokens_meet_in_attention(model, tokens)
            settings = LambdaConfig(2 * _LENGTH, 0, chunk_size=_LENGTH)
            plan = self.observed_plan(config, settings)
            self._test_rotation(model, plan, tokens)
            self._test_inside_the_window(model, plan, config, tokens)

    def _test_positions(self, model: nn.Module, tokens: Tensor) -> None:
        start = self._seen(model, tokens, None)
        in_layer_order(start.calls, model.config)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ModelError(
                "unknown positions: it takes no position_ids, so whether its queries and keys "
                "depend on absolute positions cannot be tested"
            )
        try:
            moved = self._seen(model, tokens, _OFFSET)
        except IndexError:
            moved = None  # a table of positions has ended
        if moved is not None and not start.equals(moved) and start.points_as(moved):
            raise ModelError(_TEMPERATURE)
        if moved is None or not start.equals(moved):
            raise ModelError(
                "absolute positions: queries and keys change with them even without rotation, as "
                "by a learned table, so text after the window would be wrong"
            )
        if not start.equals(self._seen(model, tokens, _FAR_OFFSET)):
            raise ModelError(_TEMPERATURE)

    def _test_tokens_meet_in_attention(self, model: nn.Module, tokens: Tensor) -> None:
        other = tokens.clone()
        other[0, 0] = tokens[0, 0] - 1
        # Not bit by bit: another token may change the order in which experts are computed.
        if not self._seen(model, tokens).equals(self._seen(model, other), _TOLERANCE):
            raise ModelError(
                "recurrent or convolutional: tokens reach one another past the attention, by a "
                "state that the exported caches do not carry"
            )

    def _seen(self, model: nn.Module, tokens: Tensor, offset: int | None = None) -> _Record:
        """Return the attention calls of the patched model, without the first token."""
        with self.patched(model):
            return _record(model, tokens, offset).without_first()

    def _test_rotation(self, model: nn.Module, plan: AttentionPlan, tokens: Tensor) -> None:
        position = _OFFSET + torch.arange(_LENGTH)
        with watched(model):
            try:
                turned = _record(model, tokens, _OFFSET)
            except IndexError:
                # A table of angles that has a row for every token of the step, and no more.
                position -= _OFFSET
                turned = _record(model, tokens, None)
        with self.patched(model):
            plain = _record(model, tokens, int(position[0]))
        for layer, index in enumerate(plan.layer_rotation):
            for before, after in zip(plain.pair(layer), turned.pair(layer), strict=True):
                wanted = before
                if index is not None:
                    rotation = plan.rotations[index]
                    angle = position[:, None] * rotation.inv_freq
                    m = rotation.attention_factor
                    rows = angle.cos() * m, angle.sin() * m
                    wanted = reference.rotate(before, *rows, interleaved=rotation.interleaved)
                if not torch.allclose(after, wanted, rtol=0, atol=_TOLERANCE * _size(wanted)):
                    raise ModelError(
                        f"in layer {layer} rotation is not the last thing that happens to queries "
                        f"and keys (a norm may follow it), so its logits depend on absolute "
                        f"positions"
                    )

    def _test_inside_the_window(
        self, model: nn.Module, plan: AttentionPlan, config: Any, tokens: Tensor
    ) -> None:
        step = HistoryStep(plan)
        step.begin(torch.tensor([_LENGTH]))
        with self.patched(model):
            got = run(model, tokens, step, torch.arange(_LENGTH)[None])
        stock = stock_model(config, "eager")
        stock.load_state_dict(model.state_dict())
        wanted = stock(input_ids=tokens, use_cache=False).logits
        if not torch.allclose(got, wanted, rtol=0, atol=_TOLERANCE * _size(wanted)):
            raise ModelError(
                "already inside the window its logits are not those of the original: its attention "
                "differs from that of tested models"
            )


@dataclass
class _Record:
    """Answers attention with each token's own value, and keeps the calls."""

    calls: dict[int, AttentionCall] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def attend(self, call: AttentionCall) -> Tensor:
        keep_call(self.calls, call)
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        return _pair_of(self.calls[layer])

    def without_first(self) -> _Record:
        """Leave out the first token."""
        calls = {}
        for layer, call in self.calls.items():
            query, key, value = (x[:, :, 1:] for x in (call.query, call.key, call.value))
            calls[layer] = replace(call, query=query, key=key, value=value)
        return _Record(calls, self.logits[:, 1:])

    def points_as(self, other: _Record) -> bool:
        """Whether all queries and keys have the directions of the other's, at any length."""
        return all(
            torch.allclose(_direction(x), _direction(y), rtol=0, atol=_TOLERANCE)
            for layer, call in self.calls.items()
            for x, y in zip(_pair_of(call), _pair_of(other.calls[layer]), strict=True)
        )

    def equals(self, other: _Record, tolerance: float = 0.0) -> bool:
        """Whether all queries, keys, values and logits agree; by default bit by bit."""
        pairs = [(self.logits, other.logits)]
        for layer, call in self.calls.items():
            same = other.calls[layer]
            pairs += [(call.query, same.query), (call.key, same.key), (call.value, same.value)]
        return all(torch.allclose(x, y, rtol=0, atol=tolerance * _size(x)) for x, y in pairs)


def _record(model: nn.Module, tokens: Tensor, offset: int | None) -> _Record:
    record = _Record()
    position = {}
    if offset is not None:
        position["position_ids"] = offset + torch.arange(tokens.shape[1])[None]
    with use_step(record):
        record.logits = model(input_ids=tokens, use_cache=False, **position).logits
    return record


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Say what of a model type's structure stands in the way, or else which test it fails."""
    try:
        yield
    except (ModelError, *CODE_ERRORS) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error) if isinstance(error, ModelError) else _UNLIKE
        raise refusal(kind, [reason]) from error


def _pair_of(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return the query and the key of a call."""
    return call.query, call.key


def _direction(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _size(x: Tensor) -> float:
    return max(float(x.max() - x.min()), 1e-6)
