"""32,768 tokens in one row: memory grows with the tokens, not with tokens by vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
LENGTH, VOCAB_SIZE, HIDDEN_SIZE, LAYERS = 32_768, 32_000, 64, 6

SCRIPT = """
import json, re, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from eagle3_schemas import DraftVocab
from eagle3_server import TransformersTarget
from eagle3_server.copying import HostCopier
from eagle3_server.engine import SupervisionJob

length, vocab_size, hidden_size, layers = map(int, sys.argv[1:])
torch.manual_seed(0)
target = TransformersTarget(LlamaForCausalLM(LlamaConfig(
    vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=128,
    num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=length,
)), model_id="tiny")
vocab = DraftVocab.from_ids(torch.arange(1000).flip(0))

def supervise(tokens, seq_lens=None):
    ones = torch.ones(1, tokens, dtype=torch.bool)
    ids = torch.randint(vocab_size, (1, tokens))
    job = SupervisionJob(
        input_ids=ids, attention_mask=ones, loss_mask=ones, aux_layer_ids=(1, 2, 3),
        draft_vocab=vocab, encoding="hidden", rows="loss_mask", aux_dtype="model", exact=False,
        seq_lens=seq_lens,
    )
    result = HostCopier(torch.device("cpu")).to_host(target.supervise(job))
    return sum(tensor.nbytes for tensor in result.tensors.values())

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def grown(*arguments):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    nbytes = supervise(*arguments)
    return {"peak": status("VmHWM") - before, "answer": nbytes}

supervise(512)
print(json.dumps({
    "row": grown(length),
    "packed": grown(length, torch.full((1, 64), length // 64)),
}))
"""


def test_a_row_of_32k_tokens_takes_a_few_times_its_hidden_states() -> None:
    sizes = [str(n) for n in (LENGTH, VOCAB_SIZE, HIDDEN_SIZE, LAYERS)]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sizes],
        capture_output=True, text=True, timeout=280, cwd=REPOSITORY,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    print(found)
    states = LENGTH * HIDDEN_SIZE * 4
    for one in found.values():
        assert one["answer"] > 3 * states  # three layers, and the head's input
        # The head's tiles, the layers' states and what a layer works with: not T x V, which is
        # 500 times as much.
        assert one["peak"] < 64 * 2**20 + 40 * states, one
