"""LoRA on our models beside peft on transformers': the same outputs and gradients, files, and exact merging."""

import copy
import json

import peft
import pytest
import torch
import transformers

from fastformer.models import (
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)
from fastformer.training import OptimizerConfig, make_optimizer, model_loss
from fastformer.training.lora import LoraConfig, add_lora, freeze, load_lora, merge_lora, trainable_parameters
from tests.models import bert_pairs, pairs, t5_pairs
from tests.models.parity import randomised, run, twin_of

VOCAB = 97
LLAMA = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
# Every way a model's fused paths could read around an adapter: attention, feed-forward, embeddings, head.
TARGETS = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "wte", "wpe"),
    "bert": ("query", "value", "dense", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"),
}
CLASSES = {
    "gpt2": GPT2LMHeadModel,
    "bert": BertForSequenceClassification,
    "t5": T5ForConditionalGeneration,
    "llama": LlamaForCausalLM,
}
each_model = pytest.mark.parametrize("name", CLASSES)


def theirs_of(name):
    if name == "gpt2":
        return pairs.theirs_of(dtype=torch.float64, tie_word_embeddings=False)
    if name == "bert":
        return bert_pairs.theirs_of(BertForSequenceClassification)
    if name == "t5":
        return t5_pairs.theirs_of(dtype=torch.float64)
    torch.manual_seed(0)
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))).double()


def ours_of(name):
    return twin_of(theirs_of(name), CLASSES[name])


def batch(name):
    return {"input_ids": IDS, "labels": torch.tensor([0, 1, 1]) if name == "bert" else IDS}


def adapted_pair(name):
    """peft on transformers' model and ours, with the same random adapters (B starts at zero, where errors hide)."""
    theirs = theirs_of(name)
    ours = twin_of(theirs, CLASSES[name])
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS[name]), fan_in_fan_out=name == "gpt2")
    if name == "bert":
        settings.modules_to_save = ["pooler", "classifier"]
    theirs = peft.get_peft_model(theirs, settings)
    ours = add_lora(ours, LoraConfig(rank=4, alpha=6.0, targets=TARGETS[name]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


@each_model
def test_outputs_and_gradients_are_those_of_peft_on_transformers(name):
    theirs, ours = adapted_pair(name)
    plain = ours_of(name)(**batch(name)).logits
    upstream = {}
    wanted, mine = (run(model, batch(name), ("logits",), upstream) for model in (theirs, ours))
    assert mine.keys() == wanted.keys(), "the same parameters are trained, under the same names"
    # transformers' Llama and T5 norms go through float32 in a float64 model.
    tolerance = 2e-5 if name == "llama" else 1e-10
    for key, value in wanted.items():
        scale = max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(
            mine[key], value, rtol=0, atol=tolerance * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert (mine["logits"] - plain).abs().max() > 1e-2, "the adapters say something"
    assert any("lora" in key for key in mine)


@each_model
def test_only_adapters_and_heads_have_gradients_and_optimizer_states(name):
    ours = add_lora(ours_of(name), LoraConfig(rank=2))
    model_loss(ours, batch(name)).backward()
    for key, p in ours.named_parameters():
        trained = "lora_" in key or "modules_to_save" in key
        assert (p.grad is not None) == p.requires_grad == trained, key
    optimizer = make_optimizer(ours, OptimizerConfig())
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    trained, total = trainable_parameters(ours)
    assert held == 2 * trained and trained < total / 5


@each_model
def test_merged_weights_are_exact(name):
    _, ours = adapted_pair(name)
    wanted = ours(**batch(name)).logits
    before = {key: p.clone() for key, p in ours.state_dict().items()}
    layer = next(key for key in before if key.endswith("lora_A.default.weight"))
    layer = layer.removesuffix(".lora_A.default.weight")
    change = before[f"{layer}.lora_B.default.weight"] @ before[f"{layer}.lora_A.default.weight"] * (6.0 / 4)
    expected = before[f"{layer}.base_layer.weight"] + (change.T if name == "gpt2" else change)
    merged = merge_lora(ours)
    assert type(merged) is CLASSES[name] and all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == theirs_of(name).state_dict().keys()
    found = merged.get_parameter(layer.removeprefix("base_model.model.") + ".weight")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(merged(**batch(name)).logits, wanted, rtol=0, atol=1e-12)


@each_model
def test_adapters_pass_through_files_both_ways(name, tmp_path):
    theirs, ours = adapted_pair(name)
    wanted = ours(**batch(name)).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for directory in (tmp_path / "ours", tmp_path / "theirs"):
        again = load_lora(ours_of(name), directory)
        torch.testing.assert_close(again(**batch(name)).logits, wanted, rtol=0, atol=1e-12)
        assert not again.training and not any(p.requires_grad for p in again.parameters())
    known = peft.PeftModel.from_pretrained(theirs_of(name), str(tmp_path / "ours"))
    torch.testing.assert_close(known(**batch(name)).logits, theirs(**batch(name)).logits)
    trainable = load_lora(ours_of(name), tmp_path / "ours", trainable=True)
    assert trainable.training and any(p.requires_grad for p in trainable.parameters())
    # Only what is trained is in the file.
    assert (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size < 200_000


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generating_with_adapters_writes_what_the_merged_model_writes(name):
    """Generation has fused decoders, which read weights; an adapter has to be called there too."""
    _, ours = adapted_pair(name)
    ours = ours.float()
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = ours_of(name).float().generate(IDS, **options)
    written = ours.generate(IDS, **options)
    merged = merge_lora(copy.deepcopy(ours)).generate(IDS, **options)
    assert torch.equal(written, merged) and not torch.equal(written, plain)


def test_all_linear_layers_of_the_blocks():
    ours = add_lora(ours_of("bert"), LoraConfig(rank=2, targets=("all",)))
    adapted = {key.split(".lora_A")[0] for key, _ in ours.named_parameters() if ".lora_A" in key}
    assert len(adapted) == 2 * 6 and all("encoder.layer" in key for key in adapted)
    # Queries and values, as in the paper, where nothing is said.
    ours = add_lora(ours_of("bert"), LoraConfig(rank=2))
    adapted = {key.split(".lora_A")[0].rpartition(".")[2] for key, _ in ours.named_parameters() if ".lora_A" in key}
    assert adapted == {"query", "value"}


def test_the_base_is_named_in_the_file(tmp_path):
    ours = ours_of("gpt2")
    ours.save_pretrained(tmp_path / "base")
    add_lora(ours, LoraConfig(rank=2), base=tmp_path / "base").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base") and written["fan_in_fan_out"]


def test_errors():
    with pytest.raises(ValueError, match=r"lora\.rank: got -1"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match=r"lora\.rank: got 0"):
        add_lora(ours_of("bert"), LoraConfig())
    with pytest.raises(ValueError, match=r"no layer is named qury; did you mean query\?"):
        add_lora(ours_of("bert"), LoraConfig(rank=2, targets=("qury",)))
    with pytest.raises(FileNotFoundError, match=r"no adapter in nowhere"):
        load_lora(ours_of("bert"), "nowhere")
    with pytest.raises(ValueError, match="a model with adapters"):
        merge_lora(ours_of("bert"))


def test_freezing():
    model = ours_of("bert")
    frozen = freeze(model, ("body",))
    assert [k for k, p in model.named_parameters() if p.requires_grad] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    assert "bert.embeddings.word_embeddings.weight" in frozen
    model_loss(model, batch("bert")).backward()
    assert all((p.grad is None) == (key in frozen) for key, p in model.named_parameters())
    model = ours_of("bert")
    assert all(key.startswith("bert.encoder.layer.1.") for key in freeze(model, ("bert.encoder.layer.1",)))
    with pytest.raises(ValueError, match=r"begins with bert\.encoder\.layers; did you mean bert\.encoder\.layer\?"):
        freeze(model, ("bert.encoder.layers",))
    with pytest.raises(ValueError, match="none is left"):
        freeze(twin_of(theirs_of("gpt2"), GPT2LMHeadModel), ("transformer", "lm_head"))
    assert isinstance(ours_of("bert").bert, BertModel)
