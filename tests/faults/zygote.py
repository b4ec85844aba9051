"""A process that has imported everything, and forks a server in a moment whenever it is told to.

Reads a JSON object a line: `port`, `seed` of the model, `settings`, and maybe `die`: the stage in
which the server kills itself, and after how many supervised requests; or `die_of`: the token id
that it does not survive. Answers with the pid.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import torch
from tests.conftest import _build_model
from tests.servers import is_comparison

import eagle3_server.serve as serving
from eagle3_server import ServerSettings, TransformersTarget
from eagle3_server.copying import HostCopier


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Dying:
    """Counts a server's requests, and kills it in a stage of one."""

    def __init__(self, stage: str | None, after: int, of_token: int | None) -> None:
        self.stage, self.after, self.of_token, self.count = stage, after, of_token, 0
        self.app: Any = None
        serving.create_app = self.create_app  # type: ignore[assignment]
        to_host = HostCopier.to_host

        def copy(copier: HostCopier, result: Any) -> Any:
            copied = to_host(copier, result)
            self.at("copy")
            return copied

        HostCopier.to_host = copy  # type: ignore[method-assign]

    def at(self, stage: str) -> None:
        if stage == self.stage and self.count > self.after:
            die()

    def supervise(self, target: TransformersTarget, job: Any) -> Any:
        # Neither the warm-up nor a comparison of servers.
        is_batch = job.rows != "all" and not is_comparison(target, job)
        self.count += is_batch and job.exact
        if is_batch and self.of_token is not None and bool((job.input_ids == self.of_token).any()):
            die()
        if self.stage == "queue" and self.count > self.after:
            service = self.app.state.service
            for _ in range(1000):  # until another request waits
                if len(service._compute):
                    die()
                time.sleep(0.01)
        result = TransformersTarget.supervise(target, job)
        self.at("compute")
        return result

    def create_app(self, *args: Any, **kwargs: Any) -> Any:
        from eagle3_server.app import create_app

        self.app = app = create_app(*args, **kwargs)
        inner = app.router

        class Router:
            def __getattr__(_self, name: str) -> Any:
                return getattr(inner, name)

            async def __call__(_self, scope: Any, receive: Any, send: Any) -> None:
                async def sending(message: Any) -> None:
                    await send(message)
                    if scope.get("path") == "/v1/supervision":
                        self.at("send")

                await inner(scope, receive, sending)

        app.router = Router()
        return app


def run(port: int, seed: int, settings: Any, stage: str | None, after: int, of: int | None) -> int:
    torch.set_num_threads(2)
    dying = Dying(stage, after, of)

    class Target(TransformersTarget):
        def supervise(self, job: Any) -> Any:
            return dying.supervise(self, job)

    serving.load_target = lambda _settings: Target(
        _build_model("llama", seed=seed), model_id="tiny"
    )
    return serving.serve(ServerSettings(model="tiny", port=port, **settings))


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    print("ready", flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            os.close(0)
            code = 1
            try:
                stage, after = told.get("die") or (None, 0)
                code = run(
                    told["port"], told.get("seed", 0), told.get("settings", {}), stage, after,
                    told.get("die_of"),
                )  # fmt: skip
            except BaseException:
                traceback.print_exc()  # into its log
            finally:
                os._exit(code)
        print(pid, flush=True)


main()
