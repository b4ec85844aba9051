"""The server: a frozen target LM behind HTTP, and the co-located backend."""

from eagle3_server.app import create_app
from eagle3_server.config import ServerSettings
from eagle3_server.target import HFEagle3TargetModel
from eagle3_server.transformers_target import TransformersTarget

__all__ = ["HFEagle3TargetModel", "ServerSettings", "TransformersTarget", "create_app"]
