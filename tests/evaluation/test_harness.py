"""lm-evaluation-harness: the log-likelihoods and texts of its own Hugging Face adapter, on the same small weights."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'fastformer[harness]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from fastformer.data import BPETokenizer, CharTokenizer
from fastformer.evaluation import perplexity
from fastformer.evaluation.harness import FastformerLM
from fastformer.models import GPT2Config, GPT2LMHeadModel

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "a question: what is that? an answer: it is a cat\n",
] * 20
PAIRS = [
    ("the cat", " sat on the mat"),
    ("the cat sat on the", " log"),
    ("", "a question"),  # no context: the end of text stands before it
    ("a question: what is that? ", "an answer"),  # the space goes to the continuation
    ("the dog sat on " * 12, " the mat and the log"),  # longer than the context: cut from the left
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, the Hugging Face adapter) around the same weights and tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = BPETokenizer.train(CORPUS, 290)
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=end, eos_token_id=end))
    # Trained a little, so that greedy answers are words and stop strings occur.
    ids = torch.tensor(tokenizer.encode("".join(CORPUS))[: 48 * 12]).view(12, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save(directory)
    theirs = HFLM(
        pretrained=transformers.GPT2LMHeadModel.from_pretrained(directory).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        batch_size=2,
        device="cpu",
        # With its cache, a request whose context is another's context and continuation but one token gets that other's
        # first position (lm-eval 0.4.13).
        logits_cache=False,
    )
    return FastformerLM(str(directory), batch_size=3), theirs


def instances(kind, arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def test_loglikelihood(pair):
    ours, theirs = pair
    requests = instances("loglikelihood", PAIRS)
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5)


def test_greedy_is_what_generate_writes(pair):
    """Of two continuations, the one that greedy decoding writes is marked, the other is not."""
    ours, theirs = pair
    ids = torch.tensor([ours.tok_encode("the cat")])
    new = ours.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    other = [*new[:-1], (new[-1] + 1) % 256]
    requests = [(None, ids[0].tolist(), tokens) for tokens in (new, other)]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(requests)] == [True, False]
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_rolling_loglikelihood(pair):
    """A text shorter than the context, one several times as long, and none."""
    ours, theirs = pair
    requests = instances("loglikelihood_rolling", [("the cat sat",), (" ".join(CORPUS[:6]),), ("",)])
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(wanted, rel=1e-5)
    assert wanted[1] < wanted[0] < 0


def test_generate_until(pair):
    ours, theirs = pair
    options = [{"until": ["\n", "zz"], "max_gen_toks": 12}, {"until": "e", "max_gen_toks": 20}]
    contexts = ["the cat", "a question: what", "the", "on the mat and the dog sat on the log " * 4]
    requests = instances("generate_until", [(text, dict(given)) for text in contexts for given in options])
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 3 and not any("e" in text for text in found[1::2])


def test_rolling_loglikelihood_is_the_perplexity(pair):
    """Of texts within the context: both read the end-of-text token before the first one."""
    ours, _ = pair
    metric = perplexity(ours.model, CORPUS[:2], ours.tokenizer, prefix_token_id=ours.prefix_token_id)
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in CORPUS[:2]]))
    assert metric.rows()[:, 0] == pytest.approx([-value for value in found], rel=1e-6)


def test_it_is_registered():
    assert get_model("fastformer") is FastformerLM


def test_bad_input(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match="tokenizer: is needed"):
        FastformerLM(ours.model)
    with pytest.raises(ValueError, match="tokenizer: has no end-of-text token"):
        small = GPT2LMHeadModel(
            GPT2Config(vocab_size=26, n_positions=8, n_embd=8, n_layer=1, n_head=1, eos_token_id=None)
        )
        FastformerLM(small, CharTokenizer("abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(ValueError, match="context: got 100, expected 1 to the model's 48 positions"):
        FastformerLM(ours.model, ours.tokenizer, max_length=100)
    with pytest.raises(ValueError, match="max_gen_toks: got 48, expected less than the context of 48"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 48})]))
