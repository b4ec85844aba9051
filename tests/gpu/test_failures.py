"""A GPU without memory, and one that is lost: real errors of CUDA, not ones that a test raises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.conftest import wide_llama
from tests.gpu.test_streams import V, all_equal, batch_number, beside, parts

from eagle3_client import RemoteEagle3Error
from eagle3_server import ServerSettings, TransformersTarget

pytestmark = pytest.mark.gpu
MIB = 1 << 20
LOST = """
import sys, torch
import eagle3_server.serve as module
from eagle3_server import ServerSettings, TransformersTarget
from tests.gpu.conftest import wide_llama

class Lost(TransformersTarget):
    def supervise(self, job):
        if int(job.input_ids[0, 0]) == 13:
            table = torch.zeros(2, device="cuda")
            table[torch.tensor([5], device="cuda")]  # a device-side assert
        return super().supervise(job)

module.load_target = lambda settings: Lost(wide_llama(), model_id="lost")
sys.exit(module.serve(ServerSettings(model="lost", port=0)))
"""


def leave_room(nbytes: int) -> None:
    """Let this process allocate so much more than it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)


def test_out_of_memory_lowers_the_limit_at_the_warm_up_and_a_request_alone_fails_later(
    cuda: torch.device, serve: Any, connect: Any, frequency_ordered: Any, caplog: Any
) -> None:
    target = TransformersTarget(wide_llama(), model_id="tight")
    leave_room(400 * MIB)
    bridge = serve(lambda: target, max_tokens_per_request=1 << 18)  # loaded as it starts
    connect(bridge).wait_until_ready(60)
    info = connect(bridge).model_info()
    assert "max_tokens_per_request is lowered to" in caplog.text
    limit = info.limits.max_tokens_per_request
    assert 1024 < limit < 1 << 18
    ids = frequency_ordered(V, 1024)
    backend = connect(bridge, ids, device=cuda, exact=True, encoding="probs", retry_for_s=1)
    ones = torch.ones(limit // 256, 256, dtype=torch.long)
    leave_room(8 * MIB)  # less than its logits take
    with pytest.raises(RemoteEagle3Error, match=r"(?s)out of memory|no memory") as caught:
        backend.generate_batch(ones, ones, ones)
    assert "max_tokens_per_request" in str(caught.value)
    leave_room(4096 * MIB)
    answer = backend.generate_batch(*batch_number(3))
    all_equal([parts(answer)], [beside(target._model, ids, batch_number(3))])


def test_a_lost_device_ends_the_server_and_its_request_is_not_answered(
    cuda: torch.device, connect: Any, frequency_ordered: Any
) -> None:
    ambient = {k: v for k, v in os.environ.items() if not k.startswith("EAGLE3_")}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", LOST], stderr=subprocess.PIPE, text=True, env=ambient, cwd=root
    )
    try:
        said = ""
        for line in process.stderr or ():
            said += line
            if "trainers use" in line:
                break
        url = said.split()[-1]
        backend = connect(urls=url, draft_ids=frequency_ordered(V, 1024), retry_for_s=3)
        good = batch_number(1)
        backend.generate_batch(*good)
        bad = good[0].clone()
        bad[0, 0] = 13
        with pytest.raises(RemoteEagle3Error):
            backend.generate_batch(bad, *good[1:])
        assert process.wait(60) == 1
        assert "device-side assert" in (process.stderr or sys.stdin).read()
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_serve_on_a_gpu_is_bfloat16_and_ends_cleanly(
    cuda: torch.device, checkpoint: Path, tmp_path: Path, connect: Any, batch_of: Any,
    frequency_ordered: Any,
) -> None:  # fmt: skip
    """The command itself, its defaults, and what it says of the device."""
    import transformers

    command = [sys.executable, "-m", "eagle3_client.cli", "serve", str(checkpoint), "--port", "0"]
    ambient = {k: v for k, v in os.environ.items() if not k.startswith("EAGLE3_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ambient)
    try:
        said = ""
        for line in process.stderr or ():
            said += line
            if "trainers use" in line:
                break
        url, ids, inputs = said.split()[-1], frequency_ordered(131, 53), batch_of(131)
        backend = connect(urls=url, draft_ids=ids, device=cuda, exact=True)
        answer = backend.generate_batch(*inputs)
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
        all_equal([parts(answer)], [beside(model.to(cuda).eval(), ids, tuple(inputs))])
        info = backend.model_info()
        assert (info.dtype, info.deterministic) == ("bfloat16", True)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_settings_take_the_gpu_by_themselves(cuda: torch.device, checkpoint: Path) -> None:
    from eagle3_server.loading import load_target

    described = load_target(ServerSettings(model=str(checkpoint))).describe()
    assert (described.device, described.dtype) == ("cuda:0", "bfloat16")
