"""The application: endpoints over models; any ASGI server runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from lminf_export.errors import InputError, LminfError, require_instance, shown
from lminf_export.serve.api_errors import ApiError, of_ours, shutting_down
from lminf_export.serve.caller import OWNER
from lminf_export.serve.chat import chat
from lminf_export.serve.completions import complete
from lminf_export.serve.guard import CLIENT_CLOSED, Guard
from lminf_export.serve.metrics import CONTENT_TYPE
from lminf_export.serve.page_files import page_files
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.serving import Serving
from lminf_export.serve.sessions import checked_session_id, session_key
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.tokens import detokenize, tokenize

_SESSION = "/v1/sessions/{session_id}"
_MODEL = "/v1/models/{name:path}"
_READING = ["GET", "HEAD"]
_HEADERS_SHOWN = ["x-cached-tokens", "x-session-state", "x-session-turn", "retry-after"]


def create_app(models: Mapping[str, ServedModel], settings: ServeSettings) -> FastAPI:
    """Return the application that serves models; its end closes their engines.

    Args:
        models: by the names that requests use, at least one.
        settings: keys and limits.

    Returns:
        An application whose `state.serving` is what its endpoints share.

    Raises:
        InputError: no models, or other objects; the folder of conversations cannot be used.
        ParkingError: their store cannot be reached.
    """
    _require_models(models, settings)
    serving = Serving(models, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        serving.is_draining = True
        await asyncio.to_thread(serving.close)

    app = FastAPI(
        title="lminf",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.serving = serving
    files = page_files()
    _add_errors(app)
    _add_answers(app, serving)
    _add_operations(app, serving)
    _add_sessions(app, serving)
    for path, response in files.items():
        app.add_api_route(path, _always(response), methods=_READING)
    labels = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(
        Guard,
        serving=serving,
        label=lambda path: _label(path, labels),
        is_page=files.__contains__,
    )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients send many of their own
            expose_headers=_HEADERS_SHOWN,
        )
    return app


def _require_models(models: Mapping[str, ServedModel], settings: ServeSettings) -> None:
    """Refuse what is no table of models under their names, or no settings."""
    require_instance("settings", settings, ServeSettings)
    if not isinstance(models, Mapping) or not models:
        raise InputError("models: expected a table of at least one ServedModel by its name")
    for name, model in models.items():
        require_instance(f"models[{shown(name)}]", model, ServedModel)
        if name != model.name:
            raise InputError(f"models[{shown(name)}] is called {model.name!r}; use one name")


def _label(path: str, known: set[str]) -> str:
    """Return the endpoint that a path belongs to, one of few."""
    if path in known:
        return path
    for prefix, label in (("/v1/sessions/", _SESSION), ("/v1/models/", _MODEL)):
        if path.startswith(prefix):
            return label
    return "other"


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def respond() -> Response:
        return response

    return respond


def _add_answers(app: FastAPI, serving: Serving) -> None:
    """Add the endpoints that read a body."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(serving, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat(serving, request)

    @app.post("/tokenize")
    async def tokens_of(request: Request) -> Response:
        return await tokenize(serving, request)

    @app.post("/detokenize")
    async def text_of(request: Request) -> Response:
        return await detokenize(serving, request)


def _add_operations(app: FastAPI, serving: Serving) -> None:
    """Add what is asked for without a body: models, health, metrics."""

    @app.api_route("/v1/models", methods=_READING)
    async def models() -> Response:
        listed = [_described(model) for model in serving.models.values()]
        return JSONResponse({"object": "list", "data": listed})

    @app.api_route(_MODEL, methods=_READING)
    async def one_model(name: str) -> Response:
        return JSONResponse(_described(serving.model(name)))

    @app.api_route("/healthz", methods=_READING)
    async def healthz() -> Response:
        failed = [name for name, stats in serving.stats().items() if not stats.healthy]
        if failed:
            raise ApiError(503, f"the engine of {', '.join(failed)} has failed", code="unhealthy")
        return JSONResponse({"status": "ok"})

    @app.api_route("/readyz", methods=_READING)
    async def readyz() -> Response:
        if serving.is_draining:
            raise shutting_down()
        return await healthz()

    @app.api_route("/metrics", methods=_READING)
    async def metrics() -> Response:
        exposition = await asyncio.to_thread(serving.metrics.exposition)
        return Response(exposition, headers={"content-type": CONTENT_TYPE})


def _add_sessions(app: FastAPI, serving: Serving) -> None:
    """Add what tells of conversations, and ends them."""

    @app.api_route("/v1/sessions", methods=_READING)
    async def sessions() -> Response:
        counts = serving.sessions.counts()
        return JSONResponse(
            {
                "object": "sessions",
                "sessions": counts.sessions,
                "prefixes": counts.prefixes,
                "bytes": counts.nbytes,
                "files": counts.files,
                "file_bytes": counts.file_bytes,
            }
        )

    @app.api_route(_SESSION, methods=_READING)
    async def one_session(request: Request, session_id: str) -> Response:
        name = checked_session_id(session_id)
        assert name is not None
        owner = request.scope.get(OWNER, "")
        problem = _no_session()
        for model in serving.models.values():
            key = session_key(model.name, owner, name)
            try:
                found = await serving.sessions.where(key, model.lm)
            except ApiError as error:
                problem, found = error, None  # another model may have one
            if found is not None:
                return JSONResponse(
                    {
                        "id": name,
                        "object": "session",
                        "model": model.name,
                        "turn": found.turn,
                        "tokens": found.num_tokens,
                    }
                )
        raise problem

    @app.delete(_SESSION)
    async def end_session(request: Request, session_id: str) -> Response:
        name = checked_session_id(session_id)
        assert name is not None
        owner = request.scope.get(OWNER, "")
        was_there, failed = False, None
        for model in serving.models:
            try:
                was_there |= await serving.sessions.drop(session_key(model, owner, name))
            except ApiError as error:
                failed = error  # those of other models are removed
        if failed is not None:
            raise failed
        if not was_there:
            raise _no_session()
        return JSONResponse({"id": name, "object": "session.deleted", "deleted": True})


def _no_session() -> ApiError:
    return ApiError(404, "there is no such session", code="session_not_found")


def _described(model: ServedModel) -> dict[str, object]:
    manifest = model.lm.bundle.manifest
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lminf",
        "vocab_size": manifest.vocab_size,
        "window_size": manifest.lambda_config.window_size,
        "num_sink_tokens": manifest.lambda_config.num_sink_tokens,
        "chat": model.template is not None,
    }


def _add_errors(app: FastAPI) -> None:
    """Give every error OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(LminfError)
    async def refuse_ours(_: Request, error: LminfError) -> Response:
        return of_ours(error).response()

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            found = ApiError(404, f"unknown path: {request.url.path[:200]}", code="unknown_url")
        elif error.status_code == 405:
            found = ApiError(405, f"{request.method} is not allowed", code="method_not_allowed")
        else:
            found = ApiError(error.status_code, str(error.detail))
        response = found.response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def forget(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def admit(_: Request, error: Exception) -> Response:
        return ApiError(500, "an error of the server; its log says more").response()
