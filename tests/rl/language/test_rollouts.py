"""Rollouts and log-probabilities: what was sampled, with which probability, where it ended; empty ones too."""

import pytest
import torch

from fastformer.data import CharTokenizer
from fastformer.models import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from fastformer.rl.language import roll_out, token_log_probs
from fastformer.rl.language.policy import PolicyWithValue, Reference, SamplingModel
from fastformer.rl.language.preferences import end_token, prompt_text
from fastformer.training import LoraConfig, add_lora
from tests.rl.language.small import CHARACTERS, save_base

PROMPTS = [[3, 11], [4, 5, 6, 11], [7]]
END = CHARACTERS.index("\n")
TOKENIZER = CharTokenizer(CHARACTERS)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return GPT2LMHeadModel.from_pretrained(save_base(tmp_path_factory.mktemp("base")))


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(len(CHARACTERS), num_key_value_heads=2, initializer_range=0.3, **shape))


def rolled(model, **changes):
    return roll_out(
        model, TOKENIZER, PROMPTS, **{"group_size": 5, "max_new_tokens": 9, "end": END, "temperature": 0.7} | changes
    )


def exact(model, ids, mask, temperature):
    """Log-probabilities from whole logits, a row at a time and without padding."""
    found = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for row, (tokens, marked) in enumerate(zip(ids, mask)):
        length = int(marked.nonzero().max()) + 1
        table = (model(tokens[None, :length]).logits[0] / temperature).log_softmax(-1)
        scored = table[:-1].gather(1, tokens[1:length, None])[:, 0]
        found[row, : length - 1] = scored * marked[1:length]
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_the_log_probabilities_of_what_was_sampled(name, gpt2):
    model = gpt2 if name == "gpt2" else llama()
    rollouts = rolled(model)
    batch = rollouts.batch()
    ids, mask = batch["input_ids"], batch["completion_mask"]
    assert [r[:2] for r in rollouts.prompt_ids[:5]] == [[3, 11]] * 5 and len(ids) == 15
    assert mask.sum(1).tolist() == rollouts.lengths.tolist()
    expected = exact(model, ids, mask, 0.7)
    torch.testing.assert_close(token_log_probs(model, ids, mask, 0.7)[0], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        batch["sampling_log_probs"], expected, atol=2e-5, rtol=1e-4
    )  # with left padding, a cache
    again, other = rolled(model), rolled(model, seed=1)
    assert again.completion_ids == rollouts.completion_ids != other.completion_ids
    one = rolled(model, batch_size=5)
    assert len(one.completion_ids) == 15


def test_an_end_a_limit_and_an_empty_completion(gpt2):
    ended = [i for i, ids in enumerate(rolled(gpt2, seed=5).completion_ids) if ids[-1] == END]
    rollouts = rolled(gpt2, seed=5)
    assert ended and rollouts.truncated.tolist() == [i not in ended for i in range(15)]
    assert all(len(rollouts.completion_ids[i]) == 9 for i in range(15) if i not in ended)
    assert all("\n" not in text for text in rollouts.completions)

    class AlwaysEnds(GPT2LMHeadModel):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits[..., END] += 100.0
            return output

    model = AlwaysEnds(gpt2.config)
    rollouts = rolled(model)
    assert rollouts.completions == [""] * 15 and rollouts.lengths.eq(1).all() and not rollouts.truncated.any()
    batch = rollouts.batch()
    assert batch["completion_mask"].sum(1).eq(1).all()  # the end token is a choice, and is trained on
    assert torch.isfinite(batch["sampling_log_probs"]).all()


def test_adapters_the_reference_and_the_copy_that_samples():
    import copy

    model = llama()
    plain = copy.deepcopy(model)
    before = copy.deepcopy(model)
    policy = add_lora(model, LoraConfig(rank=2, targets=("q_proj", "down_proj", "v_proj")))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    sampler = SamplingModel(policy, plain)
    rollouts = rolled(sampler.current())
    batch = rollouts.batch()
    ids, mask = batch["input_ids"], batch["completion_mask"]
    ours, _ = token_log_probs(policy, ids, mask, 0.7)
    torch.testing.assert_close(batch["sampling_log_probs"], ours.detach(), atol=1e-4, rtol=1e-3)
    reference = Reference(policy).log_probs(ids, mask, 0.7)
    torch.testing.assert_close(reference, token_log_probs(before, ids, mask, 0.7)[0].detach(), atol=2e-5, rtol=1e-4)
    assert (reference - ours).abs().max() > 0.01
    ours.sum().backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if p.requires_grad)
    valued = PolicyWithValue(policy)
    log_probs, values = token_log_probs(valued, ids, mask, 0.7)
    torch.testing.assert_close(log_probs, ours)
    assert values.shape == log_probs.shape and values.eq(0).all()


def test_the_gradient_of_log_probabilities(gpt2):
    batch = rolled(gpt2).batch()
    ids, mask = batch["input_ids"], batch["completion_mask"]
    weight = torch.randn(ids.shape[0], ids.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    gradients = []
    for log_probs in (token_log_probs(gpt2, ids, mask, 0.7)[0], exact(gpt2, ids, mask, 0.7)):
        gpt2.zero_grad()
        (log_probs * weight).sum().backward()
        gradients.append([p.grad.clone() for p in gpt2.parameters()])
    gpt2.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_prompts_and_ends():
    assert prompt_text("1+1", TOKENIZER, "{}=") == "1+1="
    assert prompt_text("1", TOKENIZER, system="s", chat=True) == "System: s\nUser: 1\nAssistant: "
    assert end_token(TOKENIZER, "\n") == END
    with pytest.raises(ValueError, match=r"rollout\.end: the tokenizer has no end of text"):
        end_token(TOKENIZER)
    with pytest.raises(ValueError, match=r"rollout\.end: 'ab' is 2 tokens"):
        end_token(TOKENIZER, "ab")


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts: expected at least one"),
        ([[1], []], {}, "prompts: expected at least one, of one token or more each"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ([[1]], {"temperature": 0.0, "group_size": 2}, "temperature: got 0.0"),
    ],
)
def test_bad_input(prompts, changes, message, gpt2):
    with pytest.raises(ValueError, match=message):
        roll_out(gpt2, TOKENIZER, prompts, end=END, **changes)
