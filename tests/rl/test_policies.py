"""Scores and values have the shapes, masks and gradients they should; texts are embedded once."""

import pytest
import torch

pytest.importorskip("gymnasium", reason="gymnasium is not installed")

from fastformer.models import GPT2Config, GPT2LMHeadModel, GPT2Model
from fastformer.rl import (
    ActorCritic,
    EncodedTexts,
    Environments,
    GeneratedTextPolicy,
    LanguageModelEncoder,
    PolicyConfig,
    QNetwork,
    TextTable,
    WordHashes,
)
from fastformer.rl.dqn import copy_of
from tests.rl.toys import Chooser, Identity, Recall

SMALL = PolicyConfig(hidden=(16,), heads=2)


class Letters:
    """A tokenizer of a to z and space; 0 ends."""

    vocab_size, eos_token_id = 28, 0

    def encode(self, text):
        return [1 + " abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text]

    def decode(self, ids):
        return "".join(" abcdefghijklmnopqrstuvwxyz"[i - 1] for i in ids)


def small_model(cls=GPT2LMHeadModel):
    torch.manual_seed(0)
    return cls(
        GPT2Config(vocab_size=28, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def test_an_even_start_without_values():
    environments = Environments(Identity, 4)
    policy = ActorCritic(environments.observations, environments.action_space, SMALL)
    rows = environments.reset()
    log_probs, entropy = policy.evaluate(rows, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(log_probs.exp(), torch.full((4,), 1 / 3), rtol=0, atol=0.02)
    assert entropy.min() > 1.09 and not policy.values(rows).any()


def test_drawn_actions_have_the_policys_probabilities():
    environments = Environments(Identity, 1)
    policy = ActorCritic(environments.observations, environments.action_space, SMALL)
    with torch.no_grad():
        policy.head.layer.weight.zero_()
        policy.head.layer.bias.copy_(torch.tensor([0.1, 0.2, 0.7]).log())
    rows = environments.reset().repeat(20_000, 1)
    drawn = policy.act(rows, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(drawn) / 20_000, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.01)
    assert (policy.act(rows[:5], greedy=True) == 2).all()


def test_choices_that_are_not_there_have_no_odds_and_no_gradient():
    environments = Environments(Chooser, 6, observation_options={"max_choices": 4})
    rows = environments.reset()
    for policy in (
        ActorCritic(environments.observations, environments.action_space, SMALL),
        QNetwork(environments.observations, environments.action_space, SMALL, dueling=True),
    ):
        scores = policy.scores(rows) if isinstance(policy, ActorCritic) else policy(rows)
        assert ((scores == -torch.inf) == (rows[:, 1:] < 0)).all()
    policy = ActorCritic(environments.observations, environments.action_space, SMALL)
    log_probs, entropy = policy.evaluate(rows, torch.zeros(6, dtype=torch.int64))
    (log_probs.sum() + entropy.sum()).backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    chosen = policy.for_environment(torch.zeros(6, dtype=torch.int64), rows)
    assert all(text in ("take the red one", "take the green one", "take the blue one") for text in chosen)


def test_order_of_choices_does_not_matter_to_their_scores():
    environments = Environments(Chooser, 1)
    policy = QNetwork(environments.observations, environments.action_space, SMALL)
    rows = environments.reset()
    turned = rows.clone()
    turned[:, 1:3] = rows[:, 1:3].flip(1)
    torch.testing.assert_close(policy(rows)[:, :2], policy(turned)[:, :2].flip(1))


def test_history_reads_what_there_is():
    environments = Environments(Recall, 2, observation_options={"history": 3})
    policy = ActorCritic(environments.observations, environments.action_space, SMALL)
    rows = environments.reset()
    other = rows.clone()
    other[:, 0, :-1] = 7.0  # before the episode
    torch.testing.assert_close(policy.actor(rows), policy.actor(other))
    other[:, -1, :-1] = 7.0
    assert not torch.allclose(policy.actor(rows), policy.actor(other))


class Counting(WordHashes):
    seen = 0

    def forward(self, texts):
        self.seen += len(texts)
        return super().forward(texts)


def test_a_text_is_embedded_once():
    table = TextTable()
    numbers = torch.tensor(
        [[table.number("a red door"), table.number("a blue door")], [table.number("a red door"), -1]]
    )
    texts = EncodedTexts(table, Counting(1024))
    vectors = texts(numbers)
    assert vectors.shape == (2, 2, 1024) and torch.equal(vectors[0, 0], vectors[1, 0]) and not vectors[1, 1].any()
    texts(numbers)
    assert texts.encoder.seen == 2
    assert vectors[0, 0] @ vectors[0, 1] > 0.1  # a word in common


def test_a_trained_language_model_gets_gradients_and_forgets():
    table = TextTable()
    numbers = torch.tensor([table.number("go east"), -1, table.number("take the key")])
    encoder = LanguageModelEncoder(small_model(GPT2Model), Letters(), trained=True)
    texts = EncodedTexts(table, encoder)
    vectors = texts(numbers)
    vectors.square().sum(1)[0].backward()
    (vectors := texts(numbers))[:, 0].sum().backward()
    assert encoder.model.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(texts(numbers), vectors.detach())
        encoder.model.ln_f.bias.add_(torch.randn(16))
        stale = texts(numbers)
        texts.forget()
        assert not torch.allclose(texts(numbers), stale)


def test_a_frozen_language_model_is_shared_with_the_target_network():
    environments = Environments(Chooser, 2)
    policy = QNetwork(environments.observations, environments.action_space, SMALL)
    environments.reset()
    target = copy_of(policy)
    assert target.texts is policy.texts and target.body is not policy.body
    assert torch.equal(policy(environments.current), target(environments.current))
    assert not any(p.requires_grad for p in target.parameters()) and all(p.requires_grad for p in policy.parameters())


def test_generated_texts_are_scored_as_they_were_drawn():
    environments = Environments(Chooser, 3, observation_options={"max_choices": 0})
    rows = environments.reset()
    policy = GeneratedTextPolicy(environments.observations, small_model(), Letters(), max_new_tokens=5)
    actions = policy.act(rows, generator=torch.Generator().manual_seed(1))
    assert actions.shape == (3, 5)
    log_probs, entropy = policy.evaluate(rows, actions)
    for i, row in enumerate(actions):  # one by one, without padding
        kept = [t for t in row.tolist() if t >= 0]
        prompt = Letters().encode(environments.observations.texts.texts[rows[i, 0]])
        logits = policy.model(input_ids=torch.tensor([prompt + kept])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(len(kept)), kept].sum()
        torch.testing.assert_close(log_probs[i], wanted, rtol=1e-4, atol=1e-4)
    assert entropy.min() > 0 and policy.values(rows).shape == (3,)
    step = environments.step(policy.for_environment(actions, rows))
    assert step.observations.shape == (3, 1)


def test_settings_are_named():
    environments = Environments(Chooser, 1)
    with pytest.raises(ValueError, match="come with choices"):
        GeneratedTextPolicy(environments.observations, small_model(), Letters())
    with pytest.raises(ValueError, match="train_encoder"):
        QNetwork(environments.observations, environments.action_space, PolicyConfig(train_encoder=True))
    with pytest.raises(ValueError, match="history, normalise"):
        Environments(Chooser, 1, observation_options={"history": 2})
