"""The trainer's side: `RemoteEagle3Backend`, and the errors it raises."""

from eagle3_client.backend import RemoteEagle3Backend
from eagle3_client.draft_vocab_tools import (
    SpecForgeMapping,
    build_draft_vocab,
    count_token_ids,
    draft_vocab_coverage,
    from_t2d_d2t,
    to_t2d_d2t,
)
from eagle3_client.pace import PrefetchStats
from eagle3_client.prefetch import Prefetch
from eagle3_client.preflight_report import PreflightReport
from eagle3_client.results import RemoteBatchHandle
from eagle3_schemas.capture import Capture
from eagle3_schemas.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    LimitExceeded,
    MalformedPayload,
    NotReady,
    PackingUnsupported,
    PoisonRequest,
    ProtocolMismatch,
    QueueFull,
    RemoteEagle3Error,
    TargetFailed,
    TargetOutOfMemory,
    TransportError,
    Unauthorized,
    VocabMappingMissing,
)
from eagle3_schemas.target_head import FinalNorm, TargetHead

__all__ = [
    "Capture",
    "DeadlineExceeded",
    "FinalNorm",
    "FingerprintMismatch",
    "InvalidRequest",
    "LimitExceeded",
    "MalformedPayload",
    "NotReady",
    "PackingUnsupported",
    "PoisonRequest",
    "Prefetch",
    "PrefetchStats",
    "PreflightReport",
    "ProtocolMismatch",
    "QueueFull",
    "RemoteBatchHandle",
    "RemoteEagle3Backend",
    "RemoteEagle3Error",
    "SpecForgeMapping",
    "TargetFailed",
    "TargetHead",
    "TargetOutOfMemory",
    "TransportError",
    "Unauthorized",
    "VocabMappingMissing",
    "build_draft_vocab",
    "count_token_ids",
    "draft_vocab_coverage",
    "from_t2d_d2t",
    "to_t2d_d2t",
]
