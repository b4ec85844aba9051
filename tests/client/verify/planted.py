"""A target of which one thing is wrong, and the text that it has learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from eagle3_client.verify_report import VerifyReport
from eagle3_schemas import DraftVocab
from eagle3_schemas.supervision import pack_bits, unpack_bits
from eagle3_server import TransformersTarget

TEXT = "the cat sat on my mat, which is big; a dog ran up. " * 12


def tokenizer_of(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path)


class Planted(TransformersTarget):
    """A target of which one thing is wrong."""

    error = ""

    def supervise(self, job: Any) -> Any:
        if self.error.startswith("layers"):
            by = int(self.error.removeprefix("layers"))
            job = replace(job, aux_layer_ids=tuple(i + by for i in job.aux_layer_ids))
        if self.error == "permuted":
            ids = job.draft_vocab.selected_token_ids
            job = replace(job, draft_vocab=DraftVocab.from_ids(ids.sort().values))
        if self.error == "loss mask":
            job = replace(job, loss_mask=job.loss_mask.roll(1, dims=1))
        loss_mask = job.loss_mask
        if self.error.startswith(("shift", "rows")):
            job = replace(job, loss_mask=torch.ones_like(loss_mask))
        result = super().supervise(job)
        if self.error in ("halved", "negative", "nan"):
            probs = result.tensors["target_probs"]
            probs *= 0.5 if self.error == "halved" else 1
            if self.error == "negative":
                probs[0, :2] += torch.tensor([1.0, -1.0])
            if self.error == "nan":
                probs[0, 0] = torch.nan
        if self.error == "thinned":
            mask = unpack_bits(result.tensors["position_mask"], job.input_ids.shape)
            result.tensors["position_mask"] = pack_bits(mask & job.loss_mask)
        if self.error.startswith(("shift", "rows")):
            by = int(self.error.removeprefix("shift").removeprefix("rows"))
            shape = job.input_ids.shape
            probs = result.tensors["target_probs"]
            rows = probs.view(shape[0], shape[1] - 1, -1)
            result.tensors["target_probs"] = rows.roll(-by, dims=1)[loss_mask[:, 1:]]
        if self.error.startswith("shift"):
            mask = unpack_bits(result.tensors["position_mask"], shape)
            mask[:, :-1] = mask[:, :-1].roll(-by, dims=1) & loss_mask[:, 1:]
            result.tensors["position_mask"] = pack_bits(mask)
        if self.error == "mask":
            result.tensors["position_mask"] = result.tensors["position_mask"] ^ 1
        return result

    def capture(self, job: Any) -> Any:
        result = super().capture(job)
        if self.error.startswith("shift") and "argmax" in result.tensors:
            by = int(self.error.removeprefix("shift"))
            rows = result.tensors["argmax"].view(job.input_ids.shape[0], -1)
            result.tensors["argmax"] = rows.roll(-by, dims=1).flatten()
        return result


def failed(report: VerifyReport) -> dict[str, str]:
    return {n: c.detail for n, c in report.checks.items() if c.status == "failed"}
