"""From observations to scores of actions and to values.

    body     numbers -> MLP; their last n -> GPT-2 blocks; texts -> a text encoder and an MLP
    head     a score per action of a list, or f(state) · g(choice) for texts to choose from (DRRN, He et al. 2016,
             "Deep reinforcement learning with a natural language action space", equation 2)

:class:`ActorCritic` serves REINFORCE, A2C and PPO, :class:`QNetwork` DQN. Rows of observations are those of
:class:`.observations.Observations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.gpt2 import GPT2Config, GPT2Model
from ..training.config import _check
from .observations import Observations
from .text_encoders import EncodedTexts, make_encoder

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class PolicyConfig:
    """What the agent sees, and its network."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Between them."""
    shared: bool = False
    """Actor and critic share all but their last layers."""
    normalise: bool = False
    """Observations of numbers by their running mean and deviation."""
    history: int = 1
    """Observations that the policy sees; above 1 a transformer reads them."""
    layers: int = 1
    """Its blocks."""
    heads: int = 2
    """Its heads; they divide the first of hidden, its width."""
    text_encoder: str = "words"
    """Of observations that are texts: words (hashed), or a model directory: its mean hidden state."""
    train_encoder: bool = False
    """Train the language model with the policy."""
    max_choices: int = 32
    """Most texts there are to choose from, where an action is one of them."""

    def __post_init__(self) -> None:
        _check(
            "policy",
            self,
            ("hidden", "one or more widths of at least 1", bool(self.hidden) and min(self.hidden) >= 1),
            ("activation", "tanh or relu", self.activation in ACTIVATIONS),
            ("history", "at least 1", self.history >= 1),
            ("layers", "at least 1", self.layers >= 1),
            ("heads", f"a divisor of hidden[0] = {self.hidden[0]}", self.hidden[0] % max(1, self.heads) == 0),
            ("max_choices", "at least 1", self.max_choices >= 1),
        )


class HistoryBody(nn.Module):
    """GPT-2's blocks (pre-norm, causal) over the last n observations; the newest one's output.

    A window of observations is kept rather than of keys and values: positions count from the oldest in it, which moves.
    """

    def __init__(self, features: int, history: int, config: PolicyConfig) -> None:
        super().__init__()
        self.project = nn.Linear(features + 1, config.hidden[0])
        shape = GPT2Config(
            vocab_size=1,
            n_positions=history,
            n_embd=config.hidden[0],
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        self.blocks = GPT2Model(shape)
        self.size = config.hidden[0]

    def forward(self, windows: Tensor) -> Tensor:
        """``(B, n, D + 1)`` -> ``(B, size)``."""
        output = self.blocks(inputs_embeds=self.project(windows), attention_mask=windows[:, :, -1].long())
        return output.last_hidden_state[:, -1]


class TextBody(nn.Module):
    """An MLP of the text's vector, which has length 1 and is scaled to numbers of about 1, as layers are made for."""

    def __init__(self, texts: EncodedTexts, config: PolicyConfig) -> None:
        super().__init__()
        self.texts = texts
        self.layers = mlp(texts.size, config)
        self.scale = math.sqrt(texts.size)
        self.size = config.hidden[-1]

    def forward(self, rows: Tensor) -> Tensor:
        """``(B, 1 + C)`` -> ``(B, size)``."""
        return self.layers(self.scale * self.texts(rows[:, 0]))


class NumberBody(nn.Sequential):
    """An MLP."""

    def __init__(self, features: int, config: PolicyConfig) -> None:
        super().__init__(*mlp(features, config))
        self.size = config.hidden[-1]


class ActionHead(nn.Module):
    """A score for each of ``actions``."""

    def __init__(self, size: int, actions: int, gain: float) -> None:
        super().__init__()
        self.layer = _orthogonal(nn.Linear(size, actions), gain)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """features ``(B, F)`` -> ``(B, A)``."""
        return self.layer(features)


class ChoiceHead(nn.Module):
    """f(state) · g(choice) / √F, and -inf where there is no choice. g is an MLP of the choice's vector."""

    def __init__(self, size: int, texts: EncodedTexts, config: PolicyConfig) -> None:
        super().__init__()
        self.texts = texts
        self.layers = mlp(texts.size, config)
        self.scale = math.sqrt(texts.size)
        self.match = _orthogonal(nn.Linear(config.hidden[-1], size), 1.0)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """features ``(B, F)``, rows ``(B, 1 + C)`` -> ``(B, C)``."""
        choices = self.match(self.layers(self.scale * self.texts(rows[:, 1:])))
        scores = torch.einsum("bf,bcf->bc", features, choices) / math.sqrt(features.shape[1])
        return scores.masked_fill(rows[:, 1:] < 0, -math.inf)


class Policy(nn.Module):
    """What both kinds have in common: the text encoder they share, and actions as the environment takes them."""

    def __init__(self, observations: Observations, action_space: Any, config: PolicyConfig) -> None:
        super().__init__()
        self.observations, self.config = observations, config
        self.chooses = observations.chooses
        self.texts: EncodedTexts | None = None
        if observations.is_text:
            encoder = make_encoder(config.text_encoder, trained=config.train_encoder)
            self.texts = EncodedTexts(observations.texts, encoder)
        if self.chooses:
            self.actions, self.first = observations.max_choices, 0
        elif not hasattr(action_space, "n") or not hasattr(action_space, "start"):
            raise ValueError(
                f"environment: {observations.name} has actions {action_space}, expected Discrete, or Text with "
                "info['choices']"
            )
        else:
            self.actions, self.first = int(action_space.n), int(action_space.start)

    def make_body(self) -> nn.Module:
        """What this policy's observations are read by."""
        if self.texts is not None:
            return TextBody(self.texts, self.config)
        if self.observations.history > 1:
            return HistoryBody(self.observations.size, self.observations.history, self.config)
        return NumberBody(self.observations.size, self.config)

    def make_head(self, size: int, gain: float) -> nn.Module:
        """A score for each action."""
        if self.chooses:
            assert self.texts is not None
            return ChoiceHead(size, self.texts, self.config)
        return ActionHead(size, self.actions, gain)

    def for_environment(self, actions: Tensor, rows: Tensor) -> list[Any]:
        """Actions ``(N,)`` as :meth:`.environments.Environments.step` takes them."""
        if not self.chooses:
            return (actions + self.first).tolist()
        chosen = rows.gather(1, 1 + actions[:, None].to(rows.device))[:, 0].tolist()
        return [self.observations.texts.texts[number] for number in chosen]

    def forget(self) -> None:
        """After a step of the optimiser, :meth:`.text_encoders.EncodedTexts.forget`."""
        if self.texts is not None:
            self.texts.forget()


class ActorCritic(Policy):
    """π(a | s) and V(s).

    The actor's last layer starts near zero, so that the first policy is close to even (Andrychowicz et al. 2021, "What
    matters in on-policy reinforcement learning", section 3.2), the critic's at zero: without rewards there is no error.
    """

    def __init__(self, observations: Observations, action_space: Any, config: PolicyConfig) -> None:
        super().__init__(observations, action_space, config)
        self.actor = self.make_body()
        self.critic = self.actor if config.shared else self.make_body()
        self.head = self.make_head(self.actor.size, 0.01)  # type: ignore[arg-type]
        self.value_head = nn.Linear(self.critic.size, 1)  # type: ignore[arg-type]
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def scores(self, rows: Tensor) -> Tensor:
        """``(B, …)`` -> logits ``(B, A)``."""
        return self.head(self.actor(rows), rows)

    def values(self, rows: Tensor) -> Tensor:
        """``(B, …)`` -> ``(B,)``."""
        return self.value_head(self.critic(rows))[:, 0]

    def act(self, rows: Tensor, *, greedy: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """The likeliest action, or one drawn, ``(N,)`` int64."""
        scores = self.scores(rows)
        if greedy:
            return scores.argmax(1)
        # The largest of logits plus Gumbel noise is a draw from their softmax, in two operations.
        noise = torch.rand(scores.shape, generator=generator).clamp_min(1e-38).to(scores.device)
        return (scores - (-noise.log()).log()).argmax(1)

    def evaluate(self, rows: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a | s) and the entropy of π(· | s), ``(B,)`` each."""
        log_probs = F.log_softmax(self.scores(rows), 1)
        chosen = log_probs.gather(1, actions[:, None])[:, 0]
        return chosen, -(log_probs.exp() * log_probs.masked_fill(log_probs == -math.inf, 0.0)).sum(1)


class QNetwork(Policy):
    """Q(s, a).

    Args:
        dueling: Q = V + A − mean A, the mean over the actions there are (Wang et al. 2016, equation 9).
    """

    def __init__(
        self, observations: Observations, action_space: Any, config: PolicyConfig, dueling: bool = False
    ) -> None:
        super().__init__(observations, action_space, config)
        self.body = self.make_body()
        self.head = self.make_head(self.body.size, 1.0)  # type: ignore[arg-type]
        self.value_head = _orthogonal(nn.Linear(self.body.size, 1), 1.0) if dueling else None  # type: ignore[arg-type]

    def forward(self, rows: Tensor) -> Tensor:
        """``(B, …)`` -> ``(B, A)``, -inf for an action that is not there."""
        features = self.body(rows)
        scores = self.head(features, rows)
        if self.value_head is None:
            return scores
        there = torch.isfinite(scores)
        mean = scores.masked_fill(~there, 0.0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
        return self.value_head(features) + scores - mean

    def act(self, rows: Tensor, *, greedy: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """The action of the highest Q, ``(N,)`` int64; not greedy, one drawn evenly from those there are."""
        scores = self(rows)
        if greedy:
            return scores.argmax(1)
        return torch.multinomial(torch.isfinite(scores).float().cpu(), 1, generator=generator)[:, 0]


def mlp(features: int, config: PolicyConfig) -> nn.Sequential:
    """Linear layers of the widths ``config.hidden``, an activation after each."""
    layers: list[nn.Module] = []
    for size in config.hidden:
        layers += [_orthogonal(nn.Linear(features, size), math.sqrt(2)), ACTIVATIONS[config.activation]()]
        features = size
    return nn.Sequential(*layers)


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    """Saxe et al. 2014: keeps the scale of what passes through."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
