"""Actions that a language model writes: its text, token by token, is the action.

π(a | s) is the product of its tokens' probabilities after the state's text, so the policy-gradient algorithms here
apply as they are; an environment's step is one text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.collators import pad_rows
from ..data.tokenizers import check_tokenizer, encode
from ..generation.decoding import generate
from .observations import Observations


class GeneratedTextPolicy(nn.Module):
    """A causal language model as an actor; as a critic a linear layer on its hidden state at the prompt's last token.

    In the place of :class:`.policies.ActorCritic`. Actions are token rows ``(B, L)``, -1 after the end.

    Args:
        observations: texts, without choices (``max_choices=0``).
        model: a causal language model; what is to be learnt has gradients (all of it, or LoRA's adapters).
        tokenizer: its tokenizer; ``eos_token_id`` ends an action.
        max_new_tokens: L.
        temperature: the policy is softmax(logits / temperature).
        prompt: around the observation, ``{}`` in its place.
    """

    texts = None

    def __init__(
        self,
        observations: Observations,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        prompt: str = "{}",
    ) -> None:
        super().__init__()
        if not observations.is_text or observations.chooses:
            raise ValueError(f"observations: those of {observations.name} are no texts, or come with choices")
        for name, value, valid in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("temperature", temperature, temperature > 0),
        ):
            if not valid:
                raise ValueError(f"{name}: got {value}, expected above 0")
        if "{}" not in prompt:
            raise ValueError(f"prompt: got {prompt!r}, expected a text with {{}}")
        check_tokenizer(model, tokenizer)
        self.observations, self.model, self.tokenizer = observations, model, tokenizer
        self.max_new_tokens, self.temperature, self.prompt = max_new_tokens, temperature, prompt
        self.end: int = tokenizer.eos_token_id
        config: Any = model.config
        self.value_head = nn.Linear(int(config.hidden_size), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.to(next(model.parameters()).device)
        self.train(False)

    def train(self, mode: bool = True) -> GeneratedTextPolicy:
        """Stays without dropout: the ratio to the policy that acted would be noise."""
        return super().train(False)

    def act(self, rows: Tensor, *, greedy: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """The likeliest tokens, one by one, or drawn ones, ``(N, L)`` int64, -1 after the end."""
        ids, real = self._prompts(rows)
        options: dict[str, Any] = {"do_sample": not greedy}
        if not greedy:
            noise = torch.Generator(ids.device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
            options |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0, "generator": noise}
        out = generate(
            self.model,
            ids,
            attention_mask=real,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end,
            pad_token_id=self.end,
            **options,
        )
        written = out[:, ids.shape[1] :]
        written = nn.functional.pad(written, (0, self.max_new_tokens - written.shape[1]), value=self.end)
        ended = (written == self.end).cumsum(1)
        return written.masked_fill((ended > 1) | ((ended == 1) & (written != self.end)), -1)

    def evaluate(self, rows: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a | s), a sum over the tokens, and the mean entropy of a token, ``(B,)`` each."""
        ids, real = self._prompts(rows)
        there = actions >= 0
        whole = torch.cat([ids, actions.clamp_min(0)], 1)
        mask = torch.cat([real, there.long()], 1)
        length = actions.shape[1]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self.model(input_ids=whole, attention_mask=mask, position_ids=positions).logits[:, -length - 1 : -1]
        log_probs = torch.log_softmax(logits.float() / self.temperature, -1)
        chosen = log_probs.gather(2, actions.clamp_min(0)[:, :, None])[:, :, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return (chosen * there).sum(1), (entropy * there).sum(1) / there.sum(1)

    def values(self, rows: Tensor) -> Tensor:
        """``(B, 1)`` -> ``(B,)``."""
        ids, real = self._prompts(rows)
        positions = (real.cumsum(1) - 1).clamp_min(0)
        hidden = self.model(
            input_ids=ids, attention_mask=real, position_ids=positions, output_hidden_states=True
        ).hidden_states[-1][:, -1]
        return self.value_head(hidden.float())[:, 0]

    def for_environment(self, actions: Tensor, rows: Tensor) -> list[Any]:
        """Token rows as texts."""
        kept = [[token for token in row if token not in (-1, self.end)] for row in actions.tolist()]
        return [self.tokenizer.decode(row) for row in kept]

    def forget(self) -> None:
        """Nothing is kept between steps of the optimiser."""

    def _prompts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask ``(B, S)``, padded on the left; the last tokens where the context is too short."""
        config: Any = self.model.config
        room = (getattr(config, "max_position_embeddings", None) or 1 << 30) - self.max_new_tokens
        texts = [self.prompt.replace("{}", self.observations.texts.texts[n]) for n in rows[:, 0].tolist()]
        ids = [(encode(self.tokenizer, text) or [self.end])[-room:] for text in texts]
        padded = pad_rows([row[::-1] for row in ids], self.end)[:, ::-1].copy()
        real = pad_rows([[1] * len(row) for row in ids], 0)[:, ::-1].copy()
        device = self.value_head.weight.device
        return torch.from_numpy(padded).to(device), torch.from_numpy(real).to(device)
