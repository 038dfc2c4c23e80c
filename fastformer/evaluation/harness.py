"""lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness) on this library's models.

    from fastformer.evaluation.harness import FastformerLM
    lm_eval.simple_evaluate(model=FastformerLM(model, tokenizer), tasks=["lambada_openai"])

The harness asks three things: the log-likelihood of a continuation after a context, and whether greedy decoding would
write it; the log-likelihood of a whole text; a continuation up to a stop string. What a context and a continuation are
in tokens, and where a long text is cut, is the harness's own code, so answers agree with its Hugging Face adapter's.
Logits are made at the continuation's positions alone, and for whole texts not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import functional
from ..data import load_tokenizer
from ..data.collators import IGNORED, pad_rows
from ..data.tokenizers import check_tokenizer, encode
from ..extras import require
from ..generation.decoding import evaluating, generate
from ..generation.text import decode, to_text
from ..models import from_pretrained
from ..models.losses import in_float32
from .inputs import check_causal, context_of
from .perplexity import hidden_states, token_losses

_api = require("lm_eval.api.model", "lm-evaluation-harness", "harness")
_registry = require("lm_eval.api.registry", "lm-evaluation-harness", "harness")
_utils = require("lm_eval.utils", "lm-evaluation-harness", "harness")
_requests = require("lm_eval.models.utils", "lm-evaluation-harness", "harness")

ROWS = 1024  # positions whose logits exist at a time


@_registry.register_model("fastformer")
class FastformerLM(_api.TemplateLM):
    """A causal language model for ``lm_eval``.

    Args:
        model: of this library (or of ``transformers``), or the directory of a checkpoint.
        tokenizer: None reads the checkpoint's.
        batch_size: requests at a time.
        max_length: tokens of context; None takes the model's positions.
        add_bos_token: encode with the tokenizer's special tokens, where a model was trained with a first token.
        device: for a checkpoint: where to load it.
        dtype: for a checkpoint: None keeps its own.

    Raises:
        ValueError: a model that is not causal, a tokenizer of another model or without an end token.
    """

    backend = "causal"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool = False,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            tokenizer = load_tokenizer(Path(model)) if tokenizer is None else tokenizer
            model = from_pretrained(model, dtype=dtype, device=device)
        if tokenizer is None:
            raise ValueError("tokenizer: is needed beside a model that is loaded already")
        check_causal(model)
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8  # "auto" is for a GPU's memory
        self.max_length = context_of(model, max_length)
        self.add_bos_token = add_bos_token
        self._device = next(model.parameters()).device
        found = (getattr(owner, "eos_token_id", None) for owner in (tokenizer, model.config))
        end = next((token for token in found if token is not None), None)
        if end is None:
            raise ValueError("tokenizer: has no end-of-text token, which the harness puts before a text")
        self._end = int(end[0] if isinstance(end, Sequence) else end)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return self._end if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return type(self.tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of ``string``."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return encode(self.tokenizer, string, add_special_tokens=special)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(sum of log p, whether each token is the likeliest) for (texts, context ids, continuation ids)."""
        answers: list[Any] = [None] * len(requests)
        for places in self._batches([len(context) + len(rest) for _, context, rest in requests]):
            windows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in places]
            lengths = [len(requests[i][2]) for i in places]
            ids, targets = self._tensors(windows, lengths)
            losses, greedy = self._scored(ids, targets)
            for place, length, row_losses, row_greedy in zip(places, lengths, losses, greedy):
                answers[place] = (-sum(row_losses), all(row_greedy) and len(row_greedy) == length)
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, every token of it scored once."""
        pieces: list[tuple[int, list[int], int]] = []
        for index, request in enumerate(requests):
            cut = _utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, rest in map(_utils.make_disjoint_window, cut):
                pieces.append((index, context + rest, len(rest)))
        totals = [0.0] * len(requests)
        for places in self._batches([len(ids) for _, ids, _ in pieces]):
            ids, targets = self._tensors([pieces[i][1] for i in places], [pieces[i][2] for i in places])
            with torch.no_grad(), evaluating(self.model):
                sums = token_losses(self.model, ids, targets).double().sum(dim=1).tolist()
            for place, nats in zip(places, sums):
                totals[pieces[place][0]] -= nats
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to a stop string; greedy unless the request says otherwise."""
        answers: list[Any] = [None] * len(requests)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        end = decode(self.tokenizer, [self._end], skip_special_tokens=False)
        for group in groups.values():
            options = _requests.normalize_gen_kwargs(requests[group[0]].args[1], 256)
            stop = _requests.handle_stop_sequences(options.pop("until", None), eos=end or None)
            new = options.pop("max_gen_toks")
            if new >= self.max_length:
                raise ValueError(f"max_gen_toks: got {new}, expected less than the context of {self.max_length} tokens")
            if not options.get("do_sample"):
                options.pop("temperature", None)
            for places in self._batches([len(prompts[i]) for i in group]):
                chosen = [group[place] for place in places]
                rows = [prompts[i][-(self.max_length - new) :] for i in chosen]
                for i, text in zip(chosen, self._written(rows, new, stop, options)):
                    answers[i] = _requests.postprocess_generated_text(text, stop, None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _written(self, rows: list[list[int]], new: int, stop: list[str], options: dict[str, Any]) -> list[str]:
        ids = pad_rows([row[::-1] for row in rows], self._end)[:, ::-1].copy()
        real = pad_rows([[1] * len(row) for row in rows], 0)[:, ::-1].copy()
        out = generate(
            self.model,
            torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(real).to(self._device),
            tokenizer=self.tokenizer,
            max_new_tokens=new,
            stop_strings=stop or None,
            eos_token_id=self._end,
            pad_token_id=self._end,
            **{"do_sample": False, **options},
        )
        return to_text(out[:, ids.shape[1] :], self.tokenizer, eos_token_id=self._end)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices, the longest first: little padding, and what does not fit into memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def _tensors(self, windows: Iterable[list[int]], scored: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets ``(B, S)``, of which the last ``scored`` count; padding at the right."""
        pairs = [(w[:-1], [IGNORED] * (len(w) - 1 - n) + w[-min(n, len(w) - 1) :]) for w, n in zip(windows, scored)]
        ids, targets = (pad_rows([pair[i] for pair in pairs], fill) for i, fill in ((0, 0), (1, IGNORED)))
        return torch.from_numpy(ids).to(self._device), torch.from_numpy(targets).to(self._device)

    def _scored(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[list[list[float]], list[list[bool]]]:
        """Of each row's targets the losses, and whether they are the likeliest tokens."""
        chosen = targets != IGNORED
        wanted = targets[chosen]
        with torch.no_grad(), evaluating(self.model):
            hidden = hidden_states(self.model, ids)
            if hidden is None:
                rows, head = self.model(ids, use_cache=False).logits[chosen], torch.nn.Identity()
            else:
                rows, head = hidden[chosen], self.model.get_output_embeddings()
            losses, greedy = [], []
            for part, target in zip(rows.split(ROWS), wanted.split(ROWS)):
                logits = in_float32(head(part))
                losses += functional.cross_entropy(logits, target, reduction="none").double().tolist()
                greedy += (logits.argmax(dim=-1) == target).tolist()
        ends = chosen.sum(dim=1).cumsum(0).tolist()
        cuts = list(zip([0, *ends[:-1]], ends))
        return [losses[a:b] for a, b in cuts], [greedy[a:b] for a, b in cuts]
