"""The web app: its routes, what it tells of itself, and errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from .. import __version__
from ..apps.open_model import Tell, silent
from ..model import InterleavedModel
from . import replies
from .api import chat, drawing, responses
from .loop import Refused, ServingLoop
from .middleware import AccessMiddleware, error_response
from .request import WEB_PATH, ServeRequest
from .schema import explain, options_of
from .state import AppState, State


def make_app(
    loop: ServingLoop,
    request: ServeRequest,
    key: str | None = None,
    add_page: Callable[[FastAPI, AppState], None] | None = None,
    log: Tell = silent,
) -> ASGIApp:
    """Return the app of a serving loop, which starts and stops with the app.

    Args:
        key: API key that clients have to send; None asks for none.
        add_page: adds a page for browsers to the app, such as `web.page.add_page`.
        log: takes a line for each request, see `AccessMiddleware`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await to_thread.run_sync(loop.stop)

    pages = {"docs_url": None, "redoc_url": None, "separate_input_output_schemas": False}
    app = FastAPI(title="mgp5", version=__version__, description=replies.ABOUT, lifespan=lifespan, **pages)
    app.state.serving = state = AppState(loop, request)
    keyed = [] if key is None else [Security(HTTPBearer(scheme_name="key", auto_error=False))]  # for the document
    for router in (chat.routes, responses.routes, drawing.routes, routes):
        app.include_router(router, dependencies=keyed)
    app.include_router(open_routes)
    options = options_of(loop.model.head.spec.image_options)
    replies.complete_document(app, request.model_name, options, request.limits)
    app.add_exception_handler(Refused, lambda _, error: error_response(error))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, lambda *_: error_response(Refused(500, "it failed", "internal_error")))
    if add_page:
        add_page(app, state)
    return AccessMiddleware(app, state, key, log)


def make_loop(request: ServeRequest, model: InterleavedModel, cores: int) -> ServingLoop:
    """Return the loop of a server that has so many cores; it does not run yet."""
    workers = max(1, cores // torch.get_num_threads()) if model.device.type == "cpu" else 1
    return ServingLoop(model, request.rows, request.waiting, workers)


routes, open_routes = APIRouter(), APIRouter()


@routes.get("/v1/models", responses=replies.errors(401))
async def models(state: State) -> replies.Models:
    """List the one model."""
    return replies.Models(object="list", data=[state.description])


@routes.get("/v1/models/{model:path}", responses=replies.errors(401, 404))
async def one_model(model: str, state: State) -> replies.Model:
    """Describe the model of this name."""
    state.check(model)
    return state.description


@routes.get("/metrics", response_class=Response, responses=replies.errors(401) | replies.PLAIN)
async def metrics(state: State) -> Response:
    """Tell the counters in Prometheus' text format."""
    return Response(generate_latest(state.metrics), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


@open_routes.get("/health", responses=replies.errors() | {503: {"model": replies.Health}})
async def health(state: State, response: Response) -> replies.Health:
    """Tell whether requests are served."""
    loop = state.loop
    response.status_code = 200 if loop.alive else 503
    return replies.Health(status="ok" if loop.alive else "failed", running=loop.running, waiting=loop.waiting)


@open_routes.get("/", include_in_schema=False)
@open_routes.get("/docs", include_in_schema=False)
async def front(request: Request, state: State) -> Response:
    """Lead a visitor with a browser to the page, or tell what is at which address."""
    if state.request.web and request.url.path == "/":
        return RedirectResponse(WEB_PATH)
    return HTMLResponse(replies.front_page(request.app, state.name))


def _invalid(_: Request, error: Exception) -> Response:
    return error_response(explain([one | {"loc": one["loc"][1:]} for one in error.errors()], error.body))


def _http_error(request: Request, error: Exception) -> Response:
    headers, words = error.headers or {}, str(error.detail)
    if error.status_code == 404:
        words = f"there is nothing at this address, expected {', '.join(replies.addresses(request.app))}"
    elif "Allow" in headers:
        words = f"{request.method} is not answered at this address, expected {headers['Allow']}"
    answer = error_response(Refused(error.status_code, words, "invalid_request"))
    answer.headers.update(headers)
    return answer
