"""The model that Triton's python backend runs; a repository's `model.py` names this class.

Triton hands requests to `execute` and does not wait: the model is decoupled. They are answered in
one event loop of a thread, over one engine whose slots are the batch; a request joins it between
two steps. So Triton's own batchers are not used: a sequence batcher would hold a place for each
session, idle ones too, and sessions of ours are parked instead.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lminf_export.errors import LminfError, SessionError
from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.opening import opened
from lminf_export.serve.serving import Serving
from lminf_export.triton.answers import Asked, Reply, answer
from lminf_export.triton.messages import told
from lminf_export.triton.parameters import Parameters
from lminf_export.triton.requests import asked_of

logger = logging.getLogger(__name__)

_METRIC_SECONDS = 0.5
_OURS = "an error of the server; its log says more"
_GAUGES = {
    "active": ("lminf_slots_busy", "Sequences that have a slot."),
    "waiting": ("lminf_queue_length", "Sequences that wait for a slot."),
    "parked": ("lminf_parked", "Sequences that gave their slot up for a while."),
}


class TritonPythonModel:
    """One bundle behind Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and start its engine.

        Args:
            args: Triton's: the configuration as JSON, and where the model stands.

        Raises:
            LminfError: the bundle cannot be served, or a parameter is wrong.
        """
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        _require_arrays(pb_utils)
        config = json.loads(args["model_config"])
        given = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self._serving = _serving(args["model_name"], Parameters.of(given).within(folder))
        except LminfError as error:
            raise SessionError(told(error)) from error
        (self._model,) = self._serving.models.values()
        with ExitStack() as stack:
            stack.callback(self._serving.close)
            self._gauges = self._made_gauges(args["model_name"])
            self._tasks: set[asyncio.Task[None]] = set()
            self._loop = asyncio.new_event_loop()
            # The last that can fail: this thread keeps the process.
            self._thread = threading.Thread(target=self._loop.run_forever, name="lminf-triton")
            self._thread.start()
            stack.pop_all()
        self._start(self._publish())

    def execute(self, requests: list[Any]) -> None:
        """Begin to answer requests; their responses are sent as they come."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = asked_of(request, self._pb)
            except LminfError as error:
                self._refuse(sender, told(error))
                continue
            except Exception:
                logger.exception("a request could not be read")
                self._refuse(sender, _OURS)
                continue
            self._start(self._answer(asked, sender))

    def finalize(self) -> None:
        """End what still runs, and write sessions that are not written."""
        self._serving.is_draining = True
        for model in self._serving.models.values():
            model.engine.close()
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._serving.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        def start() -> None:
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._end)

        self._loop.call_soon_threadsafe(start)

    def _end(self, task: asyncio.Task[None]) -> None:
        """Forget a task; log what nobody else would be told."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a request was not answered", exc_info=error)

    async def _ended(self) -> None:
        self._publisher.cancel()
        others = self._tasks - {self._publisher}
        await asyncio.gather(*others, self._publisher, return_exceptions=True)

    async def _answer(self, asked: Asked, sender: Any) -> None:
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        replies = answer(self._serving, self._model, asked, sender.is_cancelled)
        try:
            async for reply in replies:
                flags = final if reply.finish_reason else 0
                sender.send(self._response(reply, asked), flags=flags)
        except ApiError as error:
            if sender.is_cancelled():
                sender.send(flags=final)  # nobody is there to be told
            else:
                self._refuse(sender, told(error))
        except LminfError as error:
            self._refuse(sender, told(error))
        except Exception:
            # A request without an end would keep Triton from unloading the model.
            logger.exception("a request was not answered")
            self._refuse(sender, _OURS)
        finally:
            await replies.aclose()

    def _response(self, reply: Reply, asked: Asked) -> Any:
        values = {
            "text_output": np.array([reply.text.encode("utf-8", "replace")], object),
            "finish_reason": np.array([reply.finish_reason.encode("ascii")], object),
            "num_input_tokens": np.array([reply.num_input_tokens], np.int32),
            "num_cached_tokens": np.array([reply.num_cached_tokens], np.int32),
            "num_output_tokens": np.array([reply.num_output_tokens], np.int32),
        }
        if asked.with_ids:
            values["output_ids"] = np.array(reply.ids, np.int32)
        tensors = [self._pb.Tensor(name, array) for name, array in values.items()]
        return self._pb.InferenceResponse(output_tensors=tensors)

    def _refuse(self, sender: Any, message: str) -> None:
        error = self._pb.TritonError(message)
        response = self._pb.InferenceResponse(output_tensors=[], error=error)
        sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _made_gauges(self, name: str) -> dict[str, Any]:
        """Return gauges beside Triton's own metrics, by the field of `EngineStats`."""
        gauge = self._pb.MetricFamily.GAUGE
        # A family that nobody holds takes its metrics away.
        self._families = {
            field: self._pb.MetricFamily(name=metric, description=text, kind=gauge)
            for field, (metric, text) in _GAUGES.items()
        }
        return {
            field: family.Metric(labels={"model": name}) for field, family in self._families.items()
        }

    async def _publish(self) -> None:
        """Set the gauges; end when the server has gone, which would leave the folder locked."""
        server = os.getppid()
        current = asyncio.current_task()
        assert current is not None
        self._publisher = current
        while True:
            stats = self._model.engine.stats()
            for field, gauge in self._gauges.items():
                gauge.set(getattr(stats, field))
            await asyncio.sleep(_METRIC_SECONDS)
            if os.getppid() != server:
                os._exit(1)


def _serving(name: str, parameters: Parameters) -> Serving:
    """Load the bundle and open its sessions; all of that, or nothing."""
    settings = parameters.read()
    models = opened(
        {name: parameters.bundle}, settings, template=parameters.template, **parameters.loading
    )
    with ExitStack() as stack:
        for model in models.values():
            stack.callback(model.engine.close)
        serving = Serving(models, settings)
        stack.pop_all()
    return serving


def _require_arrays(pb_utils: Any) -> None:
    """Refuse a backend that misreads the arrays of this numpy.

    Raises:
        SessionError: it was built for the layout before version 2.
    """
    if int(np.__version__.partition(".")[0]) < 2:
        return
    wanted = np.array([1, 2, 3, 4], np.uint8)
    found = pb_utils.Tensor.from_dlpack("probe", wanted).as_numpy()
    if not np.array_equal(found, wanted):
        raise SessionError(
            f"this release of Triton misreads arrays of numpy {np.__version__}: install 'numpy<2' "
            "in the environment of its python backend, or take a newer release"
        )
