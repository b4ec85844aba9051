"""`create_app`: the routes. Each is three moves: decode, ask the target, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from eagle3_schemas.capture import CaptureResponse
from eagle3_schemas.errors import RemoteEagle3Error
from eagle3_schemas.frame import encode
from eagle3_schemas.inspection import InspectResponse
from eagle3_schemas.messages import (
    BatchRequest,
    DraftHeadFields,
    DraftVocabInfo,
    ModelInfo,
    SupervisionResponse,
    TargetHeadFields,
)
from eagle3_schemas.protocol import (
    CAPTURE_PATH,
    DRAFT_HEAD_PATH,
    DRAFT_VOCAB_PATH,
    EMBEDDINGS_PATH,
    HEALTH_PATH,
    INSPECT_PATH,
    METRICS_PATH,
    MODEL_PATH,
    PAGE_PATH,
    READY_PATH,
    SELF_CHECK_PATH,
    STATUS_PATH,
    SUPERVISION_PATH,
    TARGET_HEAD_PATH,
)
from eagle3_schemas.self_check import SelfCheckResponse
from eagle3_schemas.status import ServerStatus
from eagle3_server.accounting import Accounting
from eagle3_server.admission import admit_capture, admit_draft_vocab, admit_supervision
from eagle3_server.asgi import FrameResponse, TokenGuard, problem_response, read_frame_body
from eagle3_server.config import ServerSettings
from eagle3_server.engine import DeviceTensors, HostTensors, Job, Target, TargetDescription
from eagle3_server.inspecting import TokenTexts, inspect_text
from eagle3_server.loading import load_tokenizer
from eagle3_server.openapi import GIVES_FRAME, PROBLEMS, TAKES_FRAME, TAKES_TEXT, needs_token
from eagle3_server.page import page_response
from eagle3_server.record import TokenCounts, record_of
from eagle3_server.response_size import (
    capture_bytes,
    embeddings_bytes,
    head_bytes,
    supervision_bytes,
    target_head_bytes,
)
from eagle3_server.self_checking import SelfChecks
from eagle3_server.service import Service

AnyRequest = TypeVar("AnyRequest", bound=BatchRequest)
AnyJob = TypeVar("AnyJob", bound=Job)


def create_app(
    target: Target | Callable[[], Target],
    settings: ServerSettings | None = None,
    *,
    on_failure: Callable[[BaseException], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> FastAPI:
    """Build the service around one target.

    Args:
        target: a loaded target, or a function that loads one. A function runs on the compute
            thread when the app starts and is warmed up there; until then, `/healthz` answers and
            `/readyz` is 503.
        settings: limits and tokens; the default reads `EAGLE3_*` variables.
        on_failure: called on the compute thread if loading fails or the device is lost, after
            readiness says why. The process should end.
        on_ready: called there when a target that was loaded has been warmed up.

    Returns:
        The app, with the `Service` as `app.state.service`. One process serves one target; run
        replicas for more.
    """
    settings = ServerSettings() if settings is None else settings
    service = Service(target, settings)
    tokens = settings.tokens()
    guarded = needs_token(tokens)
    texts = TokenTexts(lambda: load_tokenizer(settings))
    self_checks = SelfChecks(service)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start(on_failure, on_ready)
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="eagle3-remote",
        version=version("eagle3-remote"),
        lifespan=lifespan,
        # The interactive pages load scripts from the internet; the schema alone stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=PROBLEMS,
    )
    app.state.service = service
    app.add_middleware(TokenGuard, tokens=tokens)
    app.add_middleware(Accounting, service=service)  # the outermost: it sees refused ones too
    app.add_exception_handler(ClientDisconnect, problem_response)
    app.add_exception_handler(RemoteEagle3Error, problem_response)
    app.add_exception_handler(HTTPException, problem_response)
    app.add_exception_handler(RequestValidationError, problem_response)

    @app.get(HEALTH_PATH)
    async def health() -> dict[str, str]:
        """The process is alive; says nothing of the target."""
        return {"status": "alive"}

    @app.get(READY_PATH)
    async def ready() -> dict[str, str]:
        """The target is loaded and requests are served; else 503 with the reason."""
        service.loaded()
        return {"status": "ready"}

    @app.head(PAGE_PATH, include_in_schema=False)
    @app.get(PAGE_PATH, response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The page for people: a shell without data, which asks for the token."""
        return page_response()

    @app.get(MODEL_PATH, dependencies=guarded)
    async def model() -> ModelInfo:
        """What is served, and its limits."""
        return service.model_info()

    @app.get(STATUS_PATH, dependencies=guarded)
    async def status() -> ServerStatus:
        """What the server does now, and what bounds its throughput."""
        return service.status()

    @app.get(METRICS_PATH, response_class=PlainTextResponse, dependencies=guarded)
    async def metrics() -> Response:
        """The same and more for Prometheus, in its text format."""
        return Response(generate_latest(service.telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    @app.put(DRAFT_VOCAB_PATH, openapi_extra=TAKES_FRAME, dependencies=guarded)
    async def draft_vocab(digest: str, request: Request) -> DraftVocabInfo:
        """Register a draft vocab under the digest of its ordered ids; safe to repeat."""
        description = service.loaded().describe()
        body = await read_frame_body(request, settings.max_body_bytes, service.bytes)
        vocab = await asyncio.to_thread(admit_draft_vocab, body, digest, description.vocab_size)
        service.draft_vocabs.register(vocab)
        return DraftVocabInfo(digest=vocab.digest, draft_vocab_size=vocab.draft_vocab_size)

    @app.get(DRAFT_HEAD_PATH, response_class=Response, responses=GIVES_FRAME, dependencies=guarded)
    async def draft_head(digest: str, request: Request) -> Response:
        """The head's rows of a registered draft vocab, a frame with `weight` and maybe `bias`."""
        target = service.loaded()
        vocab = service.draft_vocabs.get(digest)
        service.reserve_bytes(request, head_bytes(vocab, target.describe()))
        result = await service.compute(lambda: target.draft_head(vocab), request)
        fields = DraftHeadFields(
            fingerprint=target.describe().fingerprint,
            draft_vocab_digest=vocab.digest,
            **asdict(target.describe().transform),
        )
        return FrameResponse(encode(fields.model_dump(), result.tensors, result.checksums))

    @app.get(TARGET_HEAD_PATH, response_class=Response, responses=GIVES_FRAME, dependencies=guarded)
    async def target_head(request: Request) -> Response:
        """The whole head and the final norm, a frame with `weight` [V, H] and what goes with it."""
        target = service.loaded()
        description = target.describe()
        service.reserve_bytes(request, target_head_bytes(description))
        result = await service.compute(target.target_head, request)
        norm = description.norm
        fields = TargetHeadFields(
            fingerprint=description.fingerprint,
            **asdict(description.transform),
            norm=None if norm is None else norm.kind,
            norm_eps=None if norm is None else norm.eps,
            norm_gain_in_float32=norm is not None and norm.gain_in_float32,
        )
        return FrameResponse(encode(fields.model_dump(), result.tensors, result.checksums))

    @app.get(EMBEDDINGS_PATH, response_class=Response, responses=GIVES_FRAME, dependencies=guarded)
    async def input_embeddings(request: Request) -> Response:
        """The input embeddings, a frame with `weight` [V_in, H]."""
        target = service.loaded()
        service.reserve_bytes(request, embeddings_bytes(target.describe()))
        result = await service.compute(target.input_embeddings, request)
        fields = {"fingerprint": target.describe().fingerprint}
        return FrameResponse(encode(fields, result.tensors, result.checksums))

    async def run_batch(
        http_request: Request,
        admit: Callable[..., tuple[AnyRequest, AnyJob]],
        size: Callable[[AnyJob, TargetDescription], int],
        work: Callable[[Target, AnyJob], DeviceTensors],
    ) -> tuple[AnyRequest, AnyJob, HostTensors, str]:
        """Admit and compute a batch; returns the target's fingerprint too."""
        target = service.loaded()
        description = target.describe()
        body = await read_frame_body(http_request, settings.max_body_bytes, service.bytes)
        request, job = await asyncio.to_thread(
            admit,
            body,
            description,
            service.limits(),
            service.draft_vocabs,
            deterministic=service.deterministic,
        )
        record = record_of(http_request)
        record.held.enter_context(service.tokens.reserve(record.client, job.input_ids.numel()))
        service.reserve_bytes(http_request, size(job, description))
        result = await service.compute(lambda: work(target, job), http_request, body)
        record.tokens = TokenCounts.of(job, result.tensors.get("position_mask"))
        return request, job, result, description.fingerprint

    @app.post(
        SUPERVISION_PATH,
        response_class=Response,
        responses=GIVES_FRAME,
        openapi_extra=TAKES_FRAME,
        dependencies=guarded,
    )
    async def supervision(http_request: Request) -> Response:
        """Aux hidden states and draft-vocab supervision for one batch."""
        request, job, result, fingerprint = await run_batch(
            http_request,
            admit_supervision,
            supervision_bytes,
            lambda target, job: target.supervise(job),
        )
        record_of(http_request).draft_vocab_digest = request.draft_vocab_digest
        response = SupervisionResponse(
            request_id=request.request_id,
            fingerprint=fingerprint,
            draft_vocab_digest=job.draft_vocab.digest,
            aux_layer_ids=job.aux_layer_ids,
            encoding=job.encoding,
            rows=job.rows,
            aux_dtype=job.aux_dtype,
        )
        return FrameResponse(encode(response.model_dump(), result.tensors, result.checksums))

    @app.post(
        CAPTURE_PATH,
        response_class=Response,
        responses=GIVES_FRAME,
        openapi_extra=TAKES_FRAME,
        dependencies=guarded,
    )
    async def capture(http_request: Request) -> Response:
        """Outputs of the target by name, for trainers other than EAGLE-3's."""
        request, job, result, fingerprint = await run_batch(
            http_request, admit_capture, capture_bytes, lambda target, job: target.capture(job)
        )
        record_of(http_request).draft_vocab_digest = request.draft_vocab_digest
        response = CaptureResponse(
            request_id=request.request_id,
            fingerprint=fingerprint,
            outputs=job.outputs,
            aux_layer_ids=job.aux_layer_ids,
            draft_vocab_digest=request.draft_vocab_digest,
        )
        return FrameResponse(encode(response.model_dump(), result.tensors, result.checksums))

    @app.post(INSPECT_PATH, openapi_extra=TAKES_TEXT, dependencies=guarded)
    async def inspect(request: Request) -> InspectResponse:
        """A text's tokens, each with what the target expects after it. For people, not trainers."""
        return await inspect_text(service, texts, request)

    @app.post(SELF_CHECK_PATH, dependencies=guarded)
    async def self_check(request: Request) -> SelfCheckResponse:
        """What was proved of the target at load, proved anew. For `eagle3-remote verify`."""
        return await self_checks.answer(request)

    return app
