"""The trainer's side: `RemoteEagle3Backend`, and the errors it raises."""

from eagle3_client.backend import RemoteEagle3Backend
from eagle3_client.pace import PrefetchStats
from eagle3_client.prefetch import Prefetch
from eagle3_client.results import RemoteBatchHandle
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
    TransportError,
    Unauthorized,
    VocabMappingMissing,
)

__all__ = [
    "DeadlineExceeded",
    "FingerprintMismatch",
    "InvalidRequest",
    "LimitExceeded",
    "MalformedPayload",
    "NotReady",
    "PackingUnsupported",
    "PoisonRequest",
    "Prefetch",
    "PrefetchStats",
    "ProtocolMismatch",
    "QueueFull",
    "RemoteBatchHandle",
    "RemoteEagle3Backend",
    "RemoteEagle3Error",
    "TargetFailed",
    "TransportError",
    "Unauthorized",
    "VocabMappingMissing",
]
