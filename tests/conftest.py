"""What all suites share: tiny real targets and their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Before torch loads it: threads that spin while they wait make a busy machine five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings
from tests.pages import ROOT, run_by
from torch import Tensor, nn

pytest_plugins = ["tests.servers", "tests.oracle"]  # their fixtures are for all suites

torch.set_num_threads(2)  # equal bits need equal thread counts

# `make test` is the same every time; `make soak` looks elsewhere each time, for longer.
settings.register_profile("every-time", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=50_000, derandomize=False, deadline=None)
settings.load_profile("every-time")

# Every dimension of a family differs from its others and from B and T of `batch_of`: a transposed
# axis fails. V is no multiple of 8, so a mask over it does not fill its last byte.
BATCH_SIZE, SEQUENCE_LENGTH = 3, 10
COMMON = {"initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 7,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 131,
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 9,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 157,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 7, "n_head": 6, "n_inner": 80, "vocab_size": 131}
        | {"n_positions": 16},
    ),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 6, "ffn_dim": 80}
        | {"word_embed_proj_dim": 48, "vocab_size": 131, "max_position_embeddings": 16},
    ),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 6, "vocab_size": 131},
    ),
    "mpt": ("MptForCausalLM", {"d_model": 48, "n_layers": 7, "n_heads": 6, "vocab_size": 131}),
}
# What families do to their head's output, strong enough to show.
FAMILIES["gemma2"] = (
    "Gemma2ForCausalLM",
    FAMILIES["llama"][1] | {"final_logit_softcapping": 2.0, "sliding_window": 8},
)
FAMILIES["cohere"] = (
    "CohereForCausalLM",
    {name: value for name, value in FAMILIES["llama"][1].items() if name != "head_dim"}
    | {"logit_scale": 0.3, "tie_word_embeddings": False},
)
FAMILIES["granite"] = ("GraniteForCausalLM", FAMILIES["llama"][1] | {"logits_scaling": 3.0})


def _build_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    class_name, dimensions = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model: nn.Module = model_class(model_class.config_class(**COMMON | dimensions))
    return model.to(dtype).eval()


_shared_model = lru_cache(_build_model)

LONGEST = (
    "tests/benchmarks/test_benchmarks.py",
    "tests/containers/test_image.py",
    "tests/test_ten_minutes.py",
    "tests/families/test_families.py",
    "tests/release/test_installed.py",
    "tests/peer/test_nemo_recipe.py",
)
"""Modules whose slow tests take a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, or one process is busy with it when all others are done."""
    position = {name: number for number, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: (
            position.get(item.path.relative_to(ROOT).as_posix(), len(LONGEST))
            if item.get_closest_marker("slow")
            else len(LONGEST)
        )
    )


@pytest.fixture(autouse=True)
def _no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the developer's shell must not reach a test."""
    for name in list(os.environ):
        if name.startswith("EAGLE3_"):
            monkeypatch.delenv(name)


@pytest.fixture
def documented(request: pytest.FixtureRequest) -> list[str]:
    """The blocks of the pages that say that this test runs them."""
    file = request.path.relative_to(ROOT).as_posix()
    return run_by(f"{file}::{request.function.__name__}")


@pytest.fixture(scope="session")
def build_model() -> Callable[..., nn.Module]:
    """`build_model(family, dtype, seed)`: a model of the test's own, to change as it likes."""
    return _build_model


@pytest.fixture(params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float32


@pytest.fixture
def model(family: str, dtype: torch.dtype) -> nn.Module:
    """A tiny random model of `family` in `dtype`; shared, so only read it."""
    return _shared_model(family, dtype)


# --- inputs ---


@dataclass(frozen=True)
class Inputs:
    """One batch as a trainer has it."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.input_ids, self.attention_mask, self.loss_mask))


@pytest.fixture
def batch_of() -> Callable[..., Inputs]:
    """`batch_of(vocab_size, lengths, left=..., seed=...)`: random ids, padded with id 0."""

    def build(
        vocab_size: int,
        lengths: tuple[int, ...] = (10, 7, 4),
        *,
        left: bool = False,
        seed: int = 0,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        columns = torch.arange(width).expand(len(lengths), width)
        columns = columns.flip(1) if left else columns
        attention_mask = (columns < torch.tensor(lengths)[:, None]).long()
        input_ids = torch.randint(1, vocab_size, attention_mask.shape, generator=generator)
        prompt = torch.rand(attention_mask.shape, generator=generator) < 0.2
        return Inputs(input_ids * attention_mask, attention_mask, attention_mask * ~prompt)

    return build


@pytest.fixture
def mapping() -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """`mapping(ids, vocab_size)`: the arguments of `set_vocab_mapping`."""

    def build(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[ids] = True
        return ids, mask

    return build


@pytest.fixture
def frequency_ordered() -> Callable[..., Tensor]:
    """`frequency_ordered(vocab_size, size, seed)`: distinct ids in no numeric order."""

    def build(vocab_size: int, size: int, seed: int = 5) -> Tensor:
        return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:size]

    return build
