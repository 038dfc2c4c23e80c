"""Beam search: the continuation of highest probability, as far as ``num_beams`` hypotheses a prompt can find it.

    score(y) = log p(y | prompt) / len(y) ** length_penalty

Each step scores every next token of every running hypothesis of a prompt together and keeps the best; those that end
are put aside under their score, and the rest run on. All prompts advance together, as tensors. The rules (candidates
per step, when to stop, what fills short texts) are those of ``transformers``, so its results come out.

The prompt's keys and values are the same for all its hypotheses and never move; those of the new tokens follow their
hypothesis in place, and only where it changed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Decoder
from .outputs import GenerateOutput
from .processors import Processor
from .sampling import Noise
from .stopping import Stopping

NEVER = -1.0e9  # the score of what may not be chosen


@dataclass
class BeamSearch:
    """The settings of one search; :meth:`__call__` runs it.

    Args:
        num_beams: running hypotheses per prompt.
        num_return_sequences: how many of the best to return.
        length_penalty, early_stopping: see :class:`fastformer.models.GenerationConfig`.
        processors: change the log-probabilities ``(B * num_beams, V)`` of a step before they are added up.
        stopping: ends a hypothesis.
        noise: draws the candidates without replacement instead of taking the best; None does not.
        fill_token: fills texts that ended before the longest.
        keep_scores, keep_logits: collect those of every step.
        check_every: steps from one question whether all is found to the next.
    """

    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    processors: Sequence[Processor]
    stopping: Stopping
    noise: Noise | None
    fill_token: int
    keep_scores: bool
    keep_logits: bool
    check_every: int

    def __call__(self, decoder: Decoder, prompts: Tensor, mask: Tensor | None, limit: int) -> GenerateOutput:
        """prompts and mask ``(B, S)``, at most ``limit`` tokens in all."""
        beams, (batch, length), device = self.num_beams, prompts.shape, prompts.device
        first_row = torch.arange(0, batch * beams, beams, device=device)[:, None]
        # (B * beams, limit) tokens and, for each new one, the row it was predicted from.
        tokens = prompts.new_full((batch * beams, limit), self.fill_token)
        tokens[:, :length] = prompts.repeat_interleave(beams, 0)
        origins = torch.full((batch * beams, limit - length), -1, device=device)
        done_tokens, done_origins = (t.clone().view(batch, beams, -1) for t in (tokens, origins))
        # At first all hypotheses of a prompt are the same: only one may go on.
        running = torch.full((batch, beams), NEVER, device=device)
        running[:, 0] = 0
        done_scores = torch.full((batch, beams), NEVER, device=device)
        is_done = torch.zeros(batch, beams, dtype=torch.bool, device=device)
        hopeful = torch.ones(batch, 1, dtype=torch.bool, device=device)  # a better hypothesis may still come
        finished = torch.zeros((), dtype=torch.bool, device=device)
        steps = torch.zeros((), dtype=torch.int64, device=device)  # those before it was finished
        scores: list[Tensor] = []
        logits: list[Tensor] = []
        last = tokens[:, length - 1]

        for position in range(length, limit):
            new = position + 1 - length
            step = decoder.prefill(prompts, mask, beams) if new == 1 else decoder.step(last)
            step = step.float()
            if self.keep_logits:
                logits.append(step)
            log_p = torch.log_softmax(step, 1)
            for processor in self.processors:
                log_p = processor(tokens[:, :position], log_p)
            if self.keep_scores:
                scores.append(log_p)
            vocab_size = log_p.shape[1]
            total = (log_p.view(batch, beams, vocab_size) + running[:, :, None]).flatten(1)
            candidate, flat = self._best(total)
            parent, token = first_row + flat // vocab_size, flat % vocab_size
            ends = self._ends(tokens, parent, token, position, position + 1 == limit, scores)

            # Only what is among the best num_beams is ever put aside; the other candidates keep the search going.
            allowed = ends & hopeful & ~(is_done.all(1, keepdim=True) & (self.early_stopping is True))
            allowed[:, beams:] = False
            if device.type != "cpu" or bool(allowed.any()):
                score = torch.where(allowed, candidate / new**self.length_penalty, 2 * NEVER)
                done_scores, order = torch.cat((done_scores, score), 1).topk(beams)
                is_done = torch.cat((is_done, allowed), 1).gather(1, order)
                grown, grown_origins = tokens[parent], origins[parent]
                grown[:, :, position], grown_origins[:, :, new - 1] = token, parent
                done_tokens = _chosen(done_tokens, grown, order)
                done_origins = _chosen(done_origins, grown_origins, order)

            running, order = (candidate + ends * NEVER).topk(beams)
            rows = parent.gather(1, order).flatten()
            tokens[:, length:position] = tokens[rows, length:position]
            tokens[:, position] = last = token.gather(1, order).flatten()
            origins[:, : new - 1] = origins[rows, : new - 1]
            origins[:, new - 1] = rows

            steps += ~finished
            hopeful = hopeful & self._may_improve(running, done_scores, is_done, new, limit - length)
            finished = finished | ~hopeful.any() | ends.all() | (is_done.all() & (self.early_stopping is True))
            if (new - 1) % self.check_every == 0 and bool(finished):
                break
            if position + 1 < limit:
                decoder.reorder(rows)

        keep = slice(None, self.num_return_sequences)
        found, found_origins = done_tokens[:, keep].flatten(0, 1), done_origins[:, keep].flatten(0, 1)
        longest = int((found_origins >= 0).sum(1).max()) if limit > length else 0
        needed = int(steps) if self.check_every > 1 else None
        return GenerateOutput(
            sequences=found[:, : length + longest],
            sequences_scores=done_scores[:, keep].flatten() if self.keep_scores else None,
            scores=tuple(scores[:needed]) if self.keep_scores else None,
            logits=tuple(logits[:needed]) if self.keep_logits else None,
            beam_indices=found_origins[:, :longest],
        )

    def _best(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates (scores, indices into beams * V), each ``(B, C)``: enough that num_beams of them do not end."""
        count = min(max(2, 1 + len(self.stopping.end_tokens)) * self.num_beams, total.shape[1])
        if self.noise is None:
            return total.topk(count)
        probability = torch.softmax(total, 1)
        rows = (len(total) * self.num_beams, -1)
        race = probability / self.noise(None, probability.view(rows)).view_as(probability)
        index = race.topk(count)[1]
        return total.gather(1, index), index

    def _ends(
        self, tokens: Tensor, parent: Tensor, token: Tensor, position: int, is_last: bool, scores: list[Tensor]
    ) -> Tensor:
        """Which candidates ``(B, C)`` end with this token."""
        if is_last:
            return torch.ones_like(token, dtype=torch.bool)
        if not self.stopping.looks_back:
            return self.stopping.is_end(token)
        texts = torch.cat((tokens[parent.flatten(), :position], token.view(-1, 1)), 1)
        return self.stopping(texts, tuple(scores) if self.keep_scores else None).view_as(token)

    def _may_improve(self, running: Tensor, done_scores: Tensor, is_done: Tensor, new: int, most: int) -> Tensor:
        """Whether the best running hypothesis of a prompt could still beat its worst finished one, bool ``(B, 1)``.

        "never" assumes the length that favours it most, otherwise the present one is taken.
        """
        length = most if self.early_stopping == "never" and self.length_penalty > 0 else new
        best = running[:, :1] / length**self.length_penalty
        worst = torch.where(is_done, done_scores.amin(1, keepdim=True), NEVER)
        return (best > worst).any(1, keepdim=True)


def _chosen(kept: Tensor, grown: Tensor, order: Tensor) -> Tensor:
    """Rows ``order (B, K)`` of the kept ``(B, K, N)`` and grown ``(B, C, N)`` texts together."""
    both = torch.cat((kept, grown), 1)
    return both.gather(1, order[:, :, None].expand(-1, -1, both.shape[2]))
