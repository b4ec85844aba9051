"""`eagle3-remote verify`: whether what a server supervises is right, on a text and its tokenizer.

A target expects what follows in ordinary text. So without a copy of it, the distributions that a
server sends tell of shifts, mappings and tokenizers that are wrong; with a copy, of layers too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eagle3_client.backend import RemoteEagle3Backend
from eagle3_client.preflight_report import Check
from eagle3_client.verify_report import VerifyReport
from eagle3_client.verify_served import Served, ask, ask_position_mask, kl, places
from eagle3_client.verify_server import MASK_REMEDY, failure, self_checks
from eagle3_schemas import ModelInfo, shift_left_with_zero
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error
from eagle3_schemas.tokenizer import tokenizer_digest

if TYPE_CHECKING:
    from eagle3_client.verify_local import LocalTarget

ROWS, LENGTH = 4, 128
_FEWEST_TOKENS = 48
_OFFSETS = (-2, -1, 0, 1, 2)
_SUM_TOLERANCE = 1e-3
_HOLE_EVERY = 3  # tokens
_MAY_TURN = 0.01  # of the positions
_NATS = 1.0  # what a right answer has to be better by
_SAME_TOP = 0.99  # of the positions
_SHIFTED_TOP = 0.9  # the same, of rows shifted back: those at the ends are lost
_SAME_REPLICA = 0.02  # mean KL, nats: other kernels and devices stay far below


def verify(
    backends: Sequence[tuple[str, RemoteEagle3Backend]],
    tokenizer: Any,
    text: str,
    load: Callable[[str], LocalTarget] | None = None,
    aux_layer_ids: tuple[int, ...] | None = None,
) -> list[VerifyReport]:
    """Verify servers of one target; the first that answers is what others are compared with.

    A server that cannot be asked, or answers what the client refuses, has a report that says so.

    Args:
        backends: each server's URL, and a backend of it alone with `rows="loss_mask"`, encoding
            `probs`. Their draft vocab is set here.
        tokenizer: transformers' tokenizer of the target.
        text: ordinary text of a kind that the target knows, a few hundred words.
        load: returns a copy of the target in the dtype named, to compare with.
        aux_layer_ids: those that the backends were built with, if any.

    Raises:
        InvalidRequest: the text has too few tokens, or the copy cannot be used.
    """
    input_ids = _tokens(tokenizer, text)
    reports: list[VerifyReport] = []
    first: Served | None = None
    local: LocalTarget | None = None
    for url, backend in backends:
        started = time.monotonic()
        checks: dict[str, Check] = {}
        served, step = None, "reachable"
        try:
            info = backend.model_info()
            step = "self_check"
            checks |= self_checks(backend)
            checks["tokenizer"] = _tokenizer(tokenizer, info, int(input_ids.max()))
            if checks["tokenizer"].status != "failed":
                step = "batch"
                served = ask(backend, info, input_ids, aux_layer_ids or info.aux_layer_ids or ())
                checks |= {
                    "mapping": _mapping(served), "text": _text(served), "row_sums": _sums(served),
                }  # fmt: skip
                step = "position_mask"
                checks[step] = _position_mask(backend, served, checks["mapping"])
        except RemoteEagle3Error as exc:
            checks |= failure(step, exc)
        if served is not None:
            if load is not None:
                local = local or load(served.info.dtype)
                checks |= local.compare(served)
            if first is not None:
                checks["replica"] = _replica(served, first)
        first = first or served
        reports.append(VerifyReport(url, checks, time.monotonic() - started))
    return reports


def _tokenizer(tokenizer: Any, info: ModelInfo, largest_id: int) -> Check:
    if largest_id >= info.vocab_size:
        return Check(
            "failed",
            f"it makes token ids up to {largest_id} of the text, and the target has "
            f"{info.vocab_size:,}",
            "tokenize the training data with the target's own tokenizer, or serve the right target",
        )
    own = tokenizer_digest(tokenizer)
    if info.tokenizer_digest is None:
        return Check("unknown", "the served checkpoint has none; the text will tell")
    if own == info.tokenizer_digest:
        return Check("ok", "numbers tokens as the server's does")
    return Check(
        "failed",
        f"it numbers tokens otherwise than the one beside the served weights ({own[:12]}…, there "
        f"{info.tokenizer_digest[:12]}…)",
        "tokenize the training data with the target's own tokenizer, or serve the right target",
    )


def _tokens(tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, verbose=False)["input_ids"][: ROWS * LENGTH]
    if len(ids) < _FEWEST_TOKENS:
        raise InvalidRequest(
            f"the text has {len(ids)} tokens, and {_FEWEST_TOKENS} are needed; give more of it"
        )
    rows = max(len(ids) // LENGTH, 1)
    length = len(ids) // rows
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _sums(served: Served) -> Check:
    """Ask whether each supervised row is a distribution."""
    rows = served.target_probs[:, :-1]  # nothing follows the last
    sums = rows.double().sum(-1)
    is_one = ((sums - 1).abs() <= _SUM_TOLERANCE) & (rows >= 0).all(-1)  # false for NaN
    wrong, count = int((~is_one).sum()), is_one.numel()
    worst = float((sums - 1).abs().max())
    values = {"largest_difference": worst, "rows": count}
    if not wrong:
        return Check("ok", f"{count} rows of target_probs sum to 1, to {worst:.1e}", None, values)
    example = float(sums[~is_one][0])
    return Check(
        "failed",
        f"{wrong} of {count} rows of target_probs are no distributions (one sums to {example:.3g}, "
        "not to 1)",
        "the loss would weigh positions wrongly: do not train on it, and report this",
        values,
    )


def _position_mask(backend: RemoteEagle3Backend, served: Served, mapping: Check) -> Check:
    """Ask whether position_mask heeds a loss mask that does not mark every token.

    Raises:
        RemoteEagle3Error: as `ask`; the client refuses marks outside the loss mask.
    """
    if mapping.status == "failed":
        return Check("skipped", "where every token is supervised, the mapping failed")
    loss_mask = torch.ones_like(served.input_ids)
    loss_mask[:, ::_HOLE_EVERY] = 0
    got = ask_position_mask(backend, served, loss_mask)
    supervised = shift_left_with_zero(loss_mask).bool()
    expected = supervised & torch.isin(served.argmax, served.selected_token_ids)
    outside = int((got & ~supervised).sum())
    wrong, count = int((got ^ expected).sum()), int(supervised.sum())
    values = {"wrong": wrong, "outside": outside, "supervised": count}
    # A head that runs for fewer rows may round otherwise, and turn logits that are equal in 16 bit.
    allowed = 0 if served.info.dtype == "float32" else _MAY_TURN * count
    if not outside and wrong <= allowed:
        words = f"heeds a loss mask with holes ({count} positions), and the draft vocab"
        return Check("ok", words, None, values)
    return Check(
        "failed",
        f"with a loss mask that has holes, position_mask is wrong at {wrong} positions, {outside} "
        f"of them outside the {count} that the shifted loss mask marks",
        MASK_REMEDY,
        values,
    )


def _mapping(served: Served) -> Check:
    """Compare the distributions' top ids with the argmax over the whole vocab."""
    in_vocab = torch.isin(served.argmax, served.selected_token_ids)
    in_vocab[:, -1] = False  # nothing follows
    if not torch.equal(in_vocab, served.position_mask):
        wrong = int((in_vocab ^ served.position_mask).sum())
        return Check(
            "failed",
            f"position_mask is wrong at {wrong} of {in_vocab.numel()} positions: it does not mark "
            "where the target's argmax is in the draft vocab",
            "the server's draft vocab is another set of ids than was registered, or its rows are "
            "shifted: restart it, and report this",
        )
    where = in_vocab.nonzero(as_tuple=True)
    columns = places(served)[served.argmax[where]][:, None]

    def share_of_top(by: int) -> float:
        rows = served.target_probs.roll(by, dims=1)[where]
        of_argmax = rows.gather(-1, columns)[:, 0]
        is_top = of_argmax >= 0.98 * rows.amax(-1)  # in bfloat16 the two largest are often equal
        return float(is_top.float().mean()) if len(rows) else 1.0

    share = share_of_top(0)
    values = {"same_top": share, "positions": len(columns)}
    if share >= _SAME_TOP:
        return Check(
            "ok", f"draft-vocab ids are numbered as registered ({share:.1%})", None, values
        )
    for by in (-1, 1):
        if share_of_top(by) >= _SHIFTED_TOP:
            return Check(
                "failed",
                f"the distributions' rows are shifted by {by:+d} against the target's argmax",
                "supervision would be wrong at every position: do not train on it, and report this",
                values,
            )
    return Check(
        "failed",
        f"the distributions' top id is the target's argmax at {share:.1%} of {len(columns)} rows: "
        "their columns are another order of the draft vocab than was registered (a permuted "
        "mapping)",
        "compare the order of selected_token_ids on both sides; a sort on the way does this",
        values,
    )


def _log_likelihoods(served: Served) -> dict[int, float]:
    """Return the mean ln p of the token that stands k further than the one to be predicted.

    Column t is of the token at t + 2: `target_probs` are shifted, and predict what follows.
    """
    place = places(served)
    length = served.input_ids.shape[1]
    columns = torch.arange(2, length - 4)
    found = {}
    for k in _OFFSETS:
        follows = place[served.input_ids[:, columns + 2 + k]]
        p = served.target_probs[:, columns].gather(-1, follows[..., None])
        found[k] = float(p.clamp_min(1e-9).log().mean())
    return found


def _text(served: Served) -> Check:
    """Ask whether the distributions have their mass on the tokens that really follow."""
    scores = _log_likelihoods(served)
    chance = -math.log(len(served.selected_token_ids))
    best = max(scores, key=scores.__getitem__)
    perplexity = math.exp(-scores[0])
    values = {"perplexity": perplexity, "draft_vocab_size": len(served.selected_token_ids)}
    values |= {f"perplexity_{k:+d}": math.exp(-score) for k, score in scores.items() if k}
    if scores[best] < chance + _NATS:
        return Check(
            "failed",
            f"the tokens that follow have no mass: perplexity {perplexity:,.0f} in a draft vocab "
            f"of {len(served.selected_token_ids):,}, whatever shift is assumed",
            "another tokenizer than the target's, another vocabulary, broken weights, or a text "
            "that the target cannot know",
            values,
        )
    if best != 0 and scores[best] > scores[0] + _NATS:
        return Check(
            "failed",
            f"the distributions are of the token {abs(best)} {'after' if best > 0 else 'before'} "
            f"the one they stand for (shifted by {best:+d}): perplexity "
            f"{math.exp(-scores[best]):,.1f} there, {perplexity:,.0f} where it belongs",
            "supervision would be wrong at every position: do not train on it, and report this",
            values,
        )
    return Check(
        "ok", f"the tokens that follow have perplexity {perplexity:,.1f} of "
        f"{len(served.selected_token_ids):,}", None, values,
    )  # fmt: skip


def _replica(served: Served, first: Served) -> Check:
    if served.input_ids.shape != first.input_ids.shape or len(served.selected_token_ids) != len(
        first.selected_token_ids
    ):
        distance = math.inf
    else:
        rows = slice(None), slice(0, served.input_ids.shape[1] - 1)
        distance = kl(first.target_probs[rows], served.target_probs[rows])
    values = {"kl": distance, "fingerprint": served.info.fingerprint}
    same_name = served.info.fingerprint == first.info.fingerprint
    if distance <= _SAME_REPLICA and same_name:
        return Check("ok", f"computes what the first server does (KL {distance:.1e})", None, values)
    named = "names the same target" if same_name else "names another target"
    return Check(
        "failed",
        f"is no replica of the first server: it {named}, and its distributions are {distance:.2g} "
        "nats (KL) away",
        "serve the same checkpoint, revision and dtype everywhere",
        values,
    )
