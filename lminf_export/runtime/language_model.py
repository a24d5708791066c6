"""The interface of a loaded bundle: logits of any chunk of tokens, and generation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import InputError, require_instance, shown
from lminf_export.operator.settings import as_integer, require_one_of
from lminf_export.runtime.cache import State
from lminf_export.runtime.drawing import drawing_of
from lminf_export.runtime.inputs import checked_chunk, checked_prompt, listed_ids
from lminf_export.runtime.memory import require_memory
from lminf_export.runtime.sampling import Sampler, SamplingConfig
from lminf_export.runtime.session import Session
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.text import TextCodec
from lminf_export.runtime.token_reader import Logits, TokenReader
from lminf_export.runtime.unpicklable import Unpicklable

if TYPE_CHECKING:
    from lminf_export.runtime.batching.batch import Generated, Piece

_LOGITS = get_args(Logits)

DEFAULT_MAX_NEW_TOKENS = 256


class LanguageModel(Unpicklable):
    """A bundle and a session that runs it; `lminf_export.load` makes one.

    Attributes:
        bundle: what was loaded.
        session: what runs it.
        state_id: `Manifest.state_id`, of the states that it reads and writes.
    """

    in_its_place = "load the bundle again"

    def __init__(self, bundle: Bundle, session: Session) -> None:
        require_instance("bundle", bundle, Bundle)
        if not callable(getattr(session, "step", None)):
            raise InputError(f"session={shown(session)}: must be a Session")
        self.bundle = bundle
        self.session = session
        self.state_id = bundle.manifest.state_id
        self._vocab_size = bundle.manifest.vocab_size
        self._reader = TokenReader(bundle.manifest, session)
        self._codec: TextCodec | None = None

    @property
    def vocab_size(self) -> int:
        """V, number of token ids."""
        return self._vocab_size

    @property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer, read when first asked for."""
        if self._codec is None:
            self._codec = TextCodec.of(self.bundle)
        return self._codec

    def new_state(self, batch_size: int = 1, *, full: bool = False) -> State:
        """Return the state of `batch_size` streams that have seen nothing.

        Args:
            batch_size: B, streams side by side.
            full: bind every ring in full from the start, which `State.rows` needs.

        Raises:
            InputError: for a batch below 1.
            SessionError: if the caches would exceed this machine's memory.
        """
        batch_size = as_integer("batch_size", batch_size, 1, InputError)
        require_memory(self.bundle.manifest, self.session, batch_size)
        return self.session.new_state(batch_size, full=full)

    def prime(self, prompt: str | Sequence[int] | np.ndarray) -> State:
        """Return the state of one stream that has read a prompt, to be forked or saved.

        To draw several continuations of the prompt alone, leave its last token out here and give
        it to each `generate`, which needs one token at least.

        Args:
            prompt: a text, or (P,) token ids, P ≥ 1.

        Raises:
            InputError: an empty prompt, or an id outside the vocabulary.
            SessionError: see `forward`.
        """
        given = self.codec.encode(prompt) if isinstance(prompt, str) else prompt
        ids = checked_prompt(given, self._vocab_size)
        state = self.new_state()
        self.forward(ids, state, logits="none")
        return state

    def load_snapshot(self, path: str | Path) -> Snapshot:
        """Return the snapshot that `State.save` or `Snapshot.save` wrote to a file.

        Every shape, type and length is checked, and a checksum over all of it. The file takes no
        more memory than it has bytes.

        Raises:
            InputError: there is no such file.
            SessionError: it is of another bundle, damaged or cut short.
        """
        return Snapshot.load(path, self.bundle.manifest.contract, self.state_id)

    def snapshot_from_bytes(self, data: bytes) -> Snapshot:
        """Return the snapshot of which `Snapshot.to_bytes` made these, checked as a file is.

        Raises:
            InputError: they are no bytes.
            SessionError: they are of another bundle, damaged or cut short.
        """
        return Snapshot.from_bytes(data, self.bundle.manifest.contract, self.state_id)

    def load_state(self, path: str | Path) -> State:
        """Return a state of as many streams as a file holds, which `State.save` wrote.

        Token ids that were saved as not read are in `Snapshot.unread` of `load_snapshot`.

        Raises:
            InputError: there is no such file.
            SessionError: see `load_snapshot`, or the memory is short.
        """
        snapshot = self.load_snapshot(path)
        state = self.new_state(snapshot.batch_size)
        state.restore(snapshot)
        return state

    def forward(
        self,
        token_ids: Any,
        state: State,
        *,
        lengths: Any = None,
        logits: Logits = "all",
    ) -> np.ndarray | None:
        """Read the next tokens of every stream and advance the state.

        Chunks longer than the model's chunk size are split inside. If an error is raised, the
        state stands behind the last piece that succeeded, or is unchanged if none did.
        Only logits that are computed can be found not finite: logits="none" checks nothing.

        Args:
            token_ids: (B, S) integers, S ≥ 1; what stands behind a row's length is ignored.
            state: from `new_state`, B streams.
            lengths: (B,) integers 0 … S, real tokens of each row; all S by default.
            logits: which to return.

        Returns:
            A fresh float32 array: (B, S, V) for "all", zeros behind a row's length; (B, 1, V)
            of each row's last real token for "last", zeros for a row of length 0; None for
            "none".

        Raises:
            InputError: token ids, lengths or a state that do not fit.
            SessionError: a step failed or yielded logits that are not finite.
        """
        self._check_state(state)
        ids, counts = checked_chunk(token_ids, lengths, state.batch_size, self._vocab_size)
        require_one_of("logits", logits, _LOGITS, InputError)
        with state.in_use:
            if ids.shape[1] == 1 and lengths is None:
                found = self._reader.one_token(ids, state, wanted=logits != "none")
                return found.copy() if logits != "none" else None
            return self._reader.read(ids, counts, state, logits)

    def generate(
        self,
        prompt_ids: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        state: State | None = None,
    ) -> Iterator[int]:
        """Continue a prompt; yield token ids one by one, without end if nothing stops it.

        A given state moves on as ids are asked for: by the prompt with the first one, then by
        each id yielded before. The last id yielded has not been read into it: pass it on with
        what follows to continue the stream. A stop token is not yielded.

        Args:
            prompt_ids: (P,) integers, P ≥ 1: what stands behind the tokens that the state has
                read, which are not given again.
            max_new_tokens: how many at most; None for no end.
            temperature: see `SamplingConfig`, as for the settings that follow it.
            top_k: see `SamplingConfig`.
            top_p: see `SamplingConfig`.
            min_p: see `SamplingConfig`.
            repetition_penalty: see `SamplingConfig`.
            seed: see `SamplingConfig`.
            presence_penalty: see `SamplingConfig`.
            frequency_penalty: see `SamplingConfig`.
            logit_bias: see `SamplingConfig`.
            stop_token_ids: ids that end the text; the bundle's end-of-text ids by default.
            state: a state of one stream to continue; by default a new one, which nobody sees.

        Raises:
            ConfigError: a sampling setting outside its rule.
            InputError: an empty prompt, an id outside the vocabulary, a wrong state.
            SessionError: see `forward`.
        """
        sampling = SamplingConfig(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            presence_penalty,
            frequency_penalty,
            logit_bias,
        )
        ids = checked_prompt(prompt_ids, self._vocab_size)
        if max_new_tokens is not None:
            max_new_tokens = as_integer("max_new_tokens", max_new_tokens, 0, InputError)
        if stop_token_ids is None:
            stop_token_ids = self.bundle.manifest.eos_token_ids
        stops = listed_ids(stop_token_ids, "stop_token_ids")
        window = self.bundle.manifest.lambda_config.window_size
        sampler = Sampler(sampling, self._vocab_size, window, drawing_of(self.session.library))
        if state is None:
            state = self.new_state()
        self._check_state(state)
        if state.batch_size != 1:
            raise InputError(f"generate continues one stream, this state has {state.batch_size}")
        sampler.observe(ids[0, -window:].tolist())
        return self._generate(ids, max_new_tokens, sampler, frozenset(stops), state)

    def generate_batch(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        n: int = 1,
        stream: bool = False,
        max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] | None = None,
        num_logprobs: int | None = None,
        slots: int = 8,
    ) -> list[Generated] | Iterator[Piece]:
        """Continue prompts of any lengths side by side; each gets what it would get alone.

        Args:
            prompts: texts, or token ids.
            n: continuations of each prompt, which is read once; continuation i draws with seed + i.
            stream: yield what every continuation gets as it gets it, in place of all at the end.
            max_new_tokens: how many at most for each; None for no end.
            temperature: see `SamplingConfig`, as for the settings that follow it.
            top_k: see `SamplingConfig`.
            top_p: see `SamplingConfig`.
            min_p: see `SamplingConfig`.
            repetition_penalty: see `SamplingConfig`.
            presence_penalty: see `SamplingConfig`.
            frequency_penalty: see `SamplingConfig`.
            logit_bias: see `SamplingConfig`.
            seed: see `SamplingConfig`.
            stop: strings that end a text and are no part of it.
            stop_token_ids: ids that end a text; the bundle's end-of-text ids by default.
            num_logprobs: see `Request`.
            slots: continuations that decode side by side at most.

        Returns:
            The continuations, in the order of the prompts; or with `stream` an iterator of pieces.

        Raises:
            ConfigError: a sampling setting outside its rule.
            InputError: a prompt, a number or a stop string that cannot be served.
            SessionError: see `forward`; the caches of the slots are more than the memory holds.
        """
        from lminf_export.runtime.batching.batch import Batch
        from lminf_export.runtime.batching.request import Request

        sampling = SamplingConfig(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            presence_penalty,
            frequency_penalty,
            logit_bias,
        )
        if not isinstance(stream, bool):
            raise InputError(f"stream={shown(stream)}: must be True or False")
        stops = stop_token_ids
        if stops is not None:
            stops = frozenset(listed_ids(stops, "stop_token_ids"))
        request = Request(
            (),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_token_ids=stops,
            num_logprobs=num_logprobs,
        )
        batch = Batch(self, prompts, n=n, request=request, stop=stop, slots=slots)
        return batch.pieces() if stream else batch.collected()

    def _generate(
        self,
        ids: np.ndarray,
        max_new_tokens: int | None,
        sampler: Sampler,
        stops: frozenset[int],
        state: State,
    ) -> Iterator[int]:
        if max_new_tokens == 0:
            return
        logits = self.forward(ids, state, logits="last")
        assert logits is not None
        token = sampler.choose(logits[0, 0])
        begun = state.furthest - 1
        for count in itertools.count(1):
            if token in stops:
                return
            yield token
            if state.furthest != begun + count:
                raise InputError(
                    f"another call has moved this state from token {begun + count} to "
                    f"{state.furthest}: it cannot go on here; one generator at a time"
                )
            if count == max_new_tokens:
                return
            sampler.observe((token,))
            with state.in_use:
                # These logits are the state's, until its next step.
                logits = self._reader.one_token(np.array([[token]], np.int64), state)
                token = sampler.choose(logits[0, 0])

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State) or not self.session.owns(state):
            raise InputError("this state is not from this model's new_state()")
