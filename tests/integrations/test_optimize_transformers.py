"""fastformer.optimize on models of transformers: the same numbers, the same modules, and everything around them."""

import copy
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import fastformer
from fastformer import functional
from fastformer.backends import matmul
from fastformer.integrations.optimize import optimize
from tests.integrations.families import FAMILIES, batch_of, exact_of, make, run
from tests.nn.comparison import assert_as_accurate

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family):
    exact = exact_of(make(family))
    theirs = make(family)
    ours = copy.deepcopy(theirs)
    report = optimize(ours)
    assert FAMILIES[family][2] <= {swapped.type for swapped in report.swapped}
    assert ours.config._attn_implementation == "fastformer" and theirs.config._attn_implementation == "sdpa"
    batch = batch_of(family)
    wanted, peers, mine = (run(model, batch) for model in (exact, theirs, ours))
    assert mine.keys() == peers.keys() == wanted.keys()
    largest = max(value.abs().max().item() for name, value in wanted.items() if name != "output")
    for name in wanted:
        if wanted[name].abs().max() < 1e-9 * largest:  # of a key's bias, which cancels in the softmax: roundings alone
            assert mine[name].abs().max() < 1e-6 * largest, name
        else:
            assert_as_accurate(name, mine[name], peers[name], wanted[name])

    double = exact_of(make(family))
    for module in double.modules():
        module.__dict__.pop("forward", None)
    optimize(double)
    for name, value in run(double, batch).items():
        scale = max(wanted[name].abs().max().item(), 1.0)
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=1e-11 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


# The calls of fused functions in one forward pass of two layers (of an encoder and a decoder, for T5).
CALLS = {
    "gpt2": {"add_layer_norm": 2, "layer_norm": 3, "feed_forward": 2, "attention": 2, "linear": 4},
    "bert": {"transformer_embedding": 1, "add_layer_norm": 4, "feed_forward": 2, "bias_activation": 1, "attention": 2},
    "t5": {"rms_norm": 12, "feed_forward": 4, "attention": 6},
    "t5 gated": {"rms_norm": 12, "gated_feed_forward": 4, "attention": 6},
    "llama": {"add_rms_norm": 2, "rms_norm": 3, "rotary_embedding": 2, "gated_feed_forward": 2, "attention": 2},
    "qwen2": {"add_rms_norm": 2, "rms_norm": 3, "rotary_embedding": 2, "gated_feed_forward": 2, "attention": 2},
    "gemma": {"add_rms_norm": 2, "rms_norm": 3, "rotary_embedding": 2, "gated_feed_forward": 2, "attention": 2},
    "phi3": {"add_rms_norm": 2, "rms_norm": 3, "rotary_embedding": 2, "gated_feed_forward": 2, "attention": 2},
    "gpt_neox": {"layer_norm": 5, "feed_forward": 2, "rotary_embedding": 2, "attention": 2},
    "roberta": {"transformer_embedding": 0, "embedding": 3, "add_layer_norm": 4, "feed_forward": 2, "attention": 2},
    "distilbert": {"add_layer_norm": 4, "feed_forward": 2, "attention": 2},
    "bart": {"add_layer_norm": 5, "feed_forward": 2, "attention": 3},
    "mbart": {"add_layer_norm": 3, "feed_forward": 2, "attention": 3},
    "whisper": {"add_layer_norm": 3, "feed_forward": 2, "attention": 3},
    "vit": {"add_layer_norm": 2, "layer_norm": 3, "feed_forward": 2, "attention": 2},
    "clip": {"add_layer_norm": 2, "layer_norm": 4, "feed_forward": 2, "attention": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_functions_run(family, monkeypatch):
    monkeypatch.setattr(matmul, "CONVERTED", frozenset())  # else linear layers are swapped, too
    calls = Counter()

    def counted(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in {name for counts in CALLS.values() for name in counts}:
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    # imported by name there
    monkeypatch.setattr("fastformer.integrations.transformers_attention.attention", functional.attention)
    model = make(family)
    optimize(model)
    model(**batch_of(family))
    assert {name: calls[name] for name in CALLS[family]} == CALLS[family]


# t5's relu is not among them: a rounding turns it on or off, and with it a gradient
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5 gated", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(family, dtype):
    theirs = make(family, dtype)
    exact, ours = exact_of(theirs), copy.deepcopy(theirs)
    optimize(ours)
    batch = batch_of(family)
    wanted, peers, mine = (run(model, batch) for model in (exact, theirs, ours))
    for name in wanted:
        error, peer = ((x[name].double() - wanted[name]).norm().item() for x in (mine, peers))
        tiny = 2 * torch.finfo(dtype).eps * wanted[name].norm().item()
        assert error <= 2 * peer + tiny, f"{name}: error {error:.3g}, transformers' {peer:.3g}"


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5 gated", "llama"])
def test_autocast(family):
    theirs = make(family)
    exact, ours = exact_of(theirs), copy.deepcopy(theirs)
    optimize(ours)
    batch = batch_of(family)
    with torch.autocast("cpu", torch.bfloat16):
        peers, mine = run(theirs, batch), run(ours, batch)
    wanted = run(exact, batch)
    for name in wanted:
        assert mine[name].dtype == peers[name].dtype
        error, peer = ((x[name].double() - wanted[name]).norm().item() for x in (mine, peers))
        tiny = 2 * torch.finfo(torch.bfloat16).eps * wanted[name].norm().item()
        assert error <= 2 * peer + tiny, f"{name}: error {error:.3g}, transformers' {peer:.3g}"


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "llama", "vit"])
def test_the_loss_and_a_training_step_of_an_optimizer_made_before(family):
    models, losses = [make(family), make(family)], []
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    optimize(models[1])
    batch = batch_of(family)
    batch.pop("decoder_input_ids", None)
    labels = (
        torch.tensor([0, 1]) if family == "vit" else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    )
    for model, optimizer in zip(models, optimizers, strict=True):
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)


def test_the_loss_divides_by_the_number_of_items_in_all_batches():
    theirs, ours = make("llama"), make("llama")
    optimize(ours)
    batch = batch_of("llama")
    for items in (7, torch.tensor(7)):
        losses = [m(**batch, labels=batch["input_ids"], num_items_in_batch=items).loss for m in (theirs, ours)]
        torch.testing.assert_close(losses[1], losses[0])
    assert type(losses[1].grad_fn).__name__ == type(losses[0].grad_fn).__name__ == "DivBackward0"


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_every_module_fire_as_before(family):
    """Fused forwards read modules instead of calling them; with hooks they are called, each as often as before."""
    theirs, ours = make(family), make(family)
    optimize(ours)
    calls = []
    for model in (theirs, ours):
        seen = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Dropout):
                module.register_forward_hook(lambda m, i, o, name=name, seen=seen: seen.append(name))
        with torch.no_grad():
            model(**batch_of(family))
        calls.append(seen)
    assert calls[1] == calls[0]


@pytest.mark.parametrize("family, path", [
    ("gpt2", "transformer.h.0.mlp.c_proj"),
    ("bert", "bert.encoder.layer.0.intermediate.dense"),
    ("bert", "bert.embeddings.word_embeddings"),
    ("t5", "encoder.block.0.layer.1.DenseReluDense.wi"),
    ("llama", "model.layers.0.mlp.up_proj"),
    ("llama", "model.layers.1.post_attention_layernorm"),
])  # fmt: skip
def test_replaced_submodules_are_called(family, path):
    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.5

    theirs, ours = make(family), make(family)
    optimize(ours)
    for model in (theirs, ours):
        model.set_submodule(path, Adapter(model.get_submodule(path)))
    wanted, mine = run(theirs, batch_of(family)), run(ours, batch_of(family))
    for name in wanted:
        torch.testing.assert_close(mine[name], wanted[name], rtol=1e-3, atol=1e-3)


def vars_of(model):
    return {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "llama"])
def test_undo_restores_everything(family):
    model = make(family)
    batch = batch_of(family)
    before, out = vars_of(model), run(model, batch)
    report = optimize(model)
    assert vars_of(model) != before
    report.undo()
    assert vars_of(model) == before and model.config._attn_implementation == "sdpa"
    after = run(model, batch)
    assert all(torch.equal(after[name], out[name]) for name in out)
    optimize(model)
    twin = pickle.loads(pickle.dumps(model))
    for optimized in (model, twin):
        fastformer.restore(optimized)
        assert vars_of(optimized) == before
        assert torch.equal(run(optimized, batch)["output"], out["output"])


def test_idempotent():
    model = make("llama")
    first = optimize(model)
    types = vars_of(model)
    second = optimize(model)
    assert not second.swapped and vars_of(model) == types
    settings = [swapped for swapped in first.swapped if " of " in swapped.type]
    assert {swapped.type for swapped in settings} == {"attention of LlamaForCausalLM", "loss of LlamaForCausalLM"}
    assert second.already == len(first.swapped) - len(settings)
    second.undo()
    assert vars_of(model) == types  # what an earlier call did is not its to undo


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_copies_stay_optimized(family):
    model = make(family)
    optimize(model)
    batch = batch_of(family)
    wanted = run(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(value, wanted[name]) for name, value in run(twin, batch).items())
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_unpickled_in_another_process(tmp_path):
    model, batch = make("gpt2"), batch_of("gpt2")
    optimize(model)
    with torch.no_grad():
        torch.save((model, batch, model(**batch).logits), tmp_path / "model.pt")
    script = """
import sys, torch
model, batch, wanted = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits, wanted)
assert model.config._attn_implementation == "fastformer"
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, cwd=ROOT)


def test_attention_chosen_since_is_kept():
    model = make("llama")
    optimize(model)
    model.set_attn_implementation("eager")
    fastformer.restore(model)
    assert model.config._attn_implementation == "eager"


def test_state_and_saved_files_are_as_before(tmp_path):
    model = make("t5")
    before = [(name, value.data_ptr()) for name, value in model.state_dict().items()]
    parameters = list(model.parameters())
    optimize(model)
    assert [(name, value.data_ptr()) for name, value in model.state_dict().items()] == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight is model.shared.weight  # tied
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "fastformer" not in text and json.loads(text)["architectures"] == ["T5ForConditionalGeneration"]
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(again) is transformers.T5ForConditionalGeneration
    wanted, found = run(model, batch_of("t5")), run(again, batch_of("t5"))
    torch.testing.assert_close(found["output"], wanted["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama", "bart"])
def test_generates_the_same(family):
    theirs, ours = make(family), make(family)
    optimize(ours)
    batch = batch_of(family)
    batch.pop("decoder_input_ids", None)
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    texts = [m.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (theirs, ours)]
    assert torch.equal(*texts)


def test_roberta_gathers_once_where_nothing_is_learned(monkeypatch):
    """The kernel has no padding row for positions, whose gradient would have to stay zero."""
    theirs, ours = make("roberta"), make("roberta")
    optimize(ours)
    calls, original = [], functional.transformer_embedding
    monkeypatch.setattr(functional, "transformer_embedding", lambda *a, **k: calls.append(1) or original(*a, **k))
    batch = batch_of("roberta")
    batch["input_ids"][1, 6:] = 1  # padding, whose position is the table's padding row
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4)
    assert calls == [1]
    run(ours, batch)
    assert calls == [1] and not ours.roberta.embeddings.position_embeddings.weight.grad[1].any()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hidden_states(family):
    theirs, ours = make(family), make(family)
    optimize(ours)
    first, second = (m(**batch_of(family), output_hidden_states=True).hidden_states for m in (theirs, ours))
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing():
    model = make("llama").train()
    optimize(model)
    wanted = run(model, batch_of("llama"))
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    found = run(model, batch_of("llama"))
    assert len(calls) == 2  # once more in backward
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "llama", "vit", "phi3", "bart", "whisper"])
def test_dropout_drops_while_training_only(family):
    model = make(family, dropout=0.3).train()
    optimize(model)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(model, batch_of(family)))
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert not torch.equal(outputs[0]["output"], outputs[2]["output"])
    assert all(value.isfinite().all() for value in outputs[0].values())
    model.eval()
    torch.testing.assert_close(
        run(model, batch_of(family))["output"], run(make(family), batch_of(family))["output"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiles_without_a_break(family):
    model = make(family)
    optimize(model)
    batch = batch_of(family)
    with torch.no_grad():
        wanted = model(**batch).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# ---- what is left ----------------------------------------------------------------------------------------------------


def test_attention_that_may_have_to_return_weights_is_left():
    model = make("bert")
    model.set_attn_implementation("eager")
    report = optimize(model)
    assert model.config._attn_implementation == "eager"
    reasons = [left.reason for left in report.left if left.type == "attention of BertForMaskedLM"]
    assert len(reasons) == 1 and reasons[0].startswith('its attn_implementation is "eager"')
    assert model(**batch_of("bert"), output_attentions=True).attentions[0].shape == (2, 4, 9, 9)


def test_models_inside_of_a_model():
    """Two towers of one's own, one of them a composite of two configurations."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**small, "image_size": 8, "patch_size": 4}
    text = {**small, "vocab_size": 61, "max_position_embeddings": 40, "eos_token_id": 2}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    towers = torch.nn.ModuleDict({"image": clip, "text": make("bert")})
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": batch_of("bert")["input_ids"]}
    with torch.no_grad():
        wanted = clip(**batch).logits_per_image
        report = optimize(towers)
        torch.testing.assert_close(clip(**batch).logits_per_image, wanted, rtol=1e-4, atol=1e-4)
    attention = {swapped.name for swapped in report.swapped if swapped.type.startswith("attention")}
    configurations = [clip.config, clip.config.vision_config, clip.config.text_config, towers["text"].config]
    assert attention == {"image", "text"}
    assert [config._attn_implementation for config in configurations] == ["fastformer"] * 4
    report.undo()
    assert [config._attn_implementation for config in configurations] == ["sdpa"] * 4


def test_an_edited_class_is_not_proved(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    class Renamed(LlamaRMSNorm):
        pass

    class Edited(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model = torch.nn.Sequential(Renamed(8), Edited(8))
    x = torch.randn(3, 8)
    wanted = model(x)
    report = optimize(model)
    assert [(s.name, s.type) for s in report.swapped] == [("0", "Renamed")]
    assert [(left.name, left.type) for left in report.left] == [("1", "Edited")]
    torch.testing.assert_close(model(x), wanted)

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    patched = make("llama")
    assert "LlamaMLP" not in {swapped.type for swapped in optimize(patched).swapped}


def test_parameters_of_another_dtype_than_the_activations():
    """T5 keeps wo in float32 beside float16, and a norm may stay in float32: the original code promotes as it did."""
    theirs = make("t5", torch.bfloat16)
    for name, module in theirs.named_modules():
        if name.endswith(".wo") or name in ("decoder.final_layer_norm", "lm_head"):
            module.float()
    ours = copy.deepcopy(theirs)
    optimize(ours)
    batch = batch_of("t5")
    wanted, found = run(theirs, batch)["output"], run(ours, batch)["output"]
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_an_activation_without_a_kernel_is_left(monkeypatch):
    monkeypatch.setattr(matmul, "CONVERTED", frozenset())
    from transformers.models.clip.modeling_clip import CLIPMLP

    model = CLIPMLP(transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))
    report = optimize(model)
    assert not report.swapped
    assert (report.left[0].type, report.left[0].reason) == (
        "CLIPMLP",
        "there is no fused kernel for its activation, QuickGELUActivation",
    )
