"""`ray_cluster`: Ray as replicas need it, started on loopback for one command, or joined."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import children, replica_actor
from eagle3_server.config import ServerSettings
from eagle3_server.listening import is_loopback

_OBJECT_STORE_BYTES = 80 << 20  # about the least Ray takes; nothing of ours is kept there
_LOCAL = {
    # Ray has no other switch for this on Linux: with it a node's address is 127.0.0.1, and all of
    # its processes listen there alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    # It would end an actor where the host's memory is short, whoever uses it.
    "RAY_memory_monitor_refresh_ms": "0",
}

logger = logging.getLogger("eagle3_server")


@dataclass(frozen=True)
class Cluster:
    """A Ray that runs.

    Attributes:
        ray: the package.
        is_local: it was started here, for this command.
        device: that every replica is told: `cuda` or `cpu`.
        actor: the remote class; `actor.remote()` places one.
    """

    ray: Any
    is_local: bool
    device: str
    actor: Any


def is_joined() -> bool:
    """Whether RAY_ADDRESS names a cluster to join."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


@contextmanager
def ray_cluster(settings: ServerSettings) -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS, or start Ray on this host; end, or leave, it afterwards.

    Only in the main thread: what it starts ends with that. It takes the EAGLE3_ variables out of
    this process's environment, for Ray's processes to inherit no token.

    Raises:
        InvalidRequest: Ray is not installed, cannot be joined, or has not the devices.
    """
    for name in [name for name in os.environ if name.startswith("EAGLE3_")]:
        del os.environ[name]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    is_local = not is_joined()
    folder = None
    try:
        if is_local:
            # Ray's paths of sockets are long, and may have 107 bytes: not below TMPDIR.
            folder = tempfile.mkdtemp(
                prefix="eagle3-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")
            )
            ray = _start(settings, Path(folder))
        else:
            ray = _join(os.environ["RAY_ADDRESS"])
        try:
            device = _device(settings, ray, is_local)
            yield Cluster(ray, is_local, device, _actor(settings, ray, device))
        finally:
            ray.shutdown()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _import() -> Any:
    try:
        import ray
    except ImportError as exc:
        raise InvalidRequest(
            f"--replicas needs Ray ({exc.name or exc} is missing). Install it with\n"
            '  pip install "eagle3-remote[ray]"\nor, from a clone\n  pip install ".[ray]"'
        ) from exc
    return ray


def _start(settings: ServerSettings, folder: Path) -> Any:
    """Start Ray on loopback, with a token of its own that only this user can read.

    Ray makes its folder writable to all; ours above it, which it does not know of, is not.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        del os.environ[name]
    os.environ.update(_LOCAL, RAY_AUTH_TOKEN_PATH=str(token))
    ray = _import()
    logger.info("starting Ray, on loopback, for this command alone")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        num_cpus=settings.replicas,
        num_gpus=0 if settings.device == "cpu" else torch.cuda.device_count(),
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=str(folder / "r"),
    )
    return ray


def _join(address: str) -> Any:
    if address.startswith("ray://"):
        raise InvalidRequest(
            f"RAY_ADDRESS: expected host:port, or auto, of a cluster that this host is a node of; "
            f"got {address}, of a Ray client. Run the command on a node of the cluster"
        )
    ray = _import()
    logger.info("joining the Ray cluster at %s", address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as exc:
        raise InvalidRequest(
            f"cannot join the Ray cluster of RAY_ADDRESS={address}: {exc}. Expected one that this "
            "host is a node of (ray start --address=…), of the same Ray and Python, with its token "
            "if it asks for one; or unset RAY_ADDRESS to have Ray started here"
        ) from exc
    return ray


def _device(settings: ServerSettings, ray: Any, is_local: bool) -> str:
    """Choose the device, the same for all, and check that Ray has as many.

    A cluster may grow, and others' work on it ends: there, too few devices are no error.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    replicas, size = settings.replicas or 1, settings.ranks
    gpus = [int(node["Resources"].get("GPU", 0)) for node in nodes]
    if settings.device == "cpu" or (settings.device == "auto" and not any(gpus)):
        device, places = "cpu", sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
        needs, has = "a CPU each", f"{places} CPUs"
    else:
        device, places = "cuda", sum(count // size for count in gpus)
        needs, has = f"{size} GPU(s) of one host each", f"{gpus} GPUs on its hosts"
    if places < replicas:
        words = f"{replicas} replicas need {needs}; Ray has {has}"
        if is_local:
            raise InvalidRequest(
                f"{words}. Start fewer with --replicas, or on the CPU with --device cpu"
            )
        logger.warning("%s: the others wait until it has more", words)
    if not is_local and not settings.tokens() and not settings.insecure:
        wide = [each["NodeManagerAddress"] for each in nodes]
        wide = [each for each in wide if not is_loopback(each)]
        if wide:
            raise InvalidRequest(
                f"the servers would listen on their nodes' addresses ({', '.join(wide[:3])}), "
                "which let other hosts in, and no token is set. Run\n"
                "  export EAGLE3_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(16))')"
                "\nand give trainers the same variable; or add --insecure on a network of your own"
            )
    return device


def _actor(settings: ServerSettings, ray: Any, device: str) -> Any:
    for module in (children, replica_actor):
        with suppress(ValueError):
            ray.cloudpickle.register_pickle_by_value(module)
    return ray.remote(replica_actor.Replica).options(
        num_cpus=1 if device == "cpu" else 0,
        num_gpus=0 if device == "cpu" else settings.ranks,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy="SPREAD",
    )
