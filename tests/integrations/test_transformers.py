"""attn_implementation="fastformer" beside transformers' "eager": logits, losses, every gradient, and generation."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import transformers

import fastformer
from fastformer.integrations import transformers as integration
from fastformer.integrations import transformers_attention, transformers_mask
from tests.integrations.transformers_models import (
    DECODERS,
    MODELS,
    VOCAB,
    exact_softmax,
    inputs_of,
    model_of,
    padding,
    results,
    tokens,
)
from tests.nn.comparison import assert_as_accurate

OURS = integration.NAME


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    with fastformer.strict():
        yield
    integration.unregister()


@pytest.fixture
def calls(monkeypatch):
    """What attention's functions were called with: (name, keyword arguments)."""
    made = []
    for name in ("attention", "attention_varlen", "decode_attention"):
        function = getattr(transformers_attention, name)
        monkeypatch.setattr(
            transformers_attention, name, lambda *a, f=function, n=name, **k: made.append((n, k)) or f(*a, **k)
        )
    return made


@pytest.fixture
def tables(monkeypatch):
    """A list that gets an entry whenever a mask is stored as a table."""
    made = []
    make = transformers_mask.masking.sdpa_mask
    monkeypatch.setattr(transformers_mask.masking, "sdpa_mask", lambda **k: made.append(k) or make(**k))
    return made


def assert_same(ours, theirs, rtol=1e-9, atol=1e-11):
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


LAYERS = {name: 6 if name.startswith(("T5", "Whisper")) else 2 for name in MODELS}  # of attention


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_float64(name, side, calls):
    model = model_of(name)
    inputs, real = inputs_of(name, side)
    with exact_softmax():
        theirs = results(model, "eager", inputs, real)
    assert not calls
    assert_same(results(model, OURS, inputs, real), theirs)
    assert len(calls) == LAYERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_as_accurate_as_eager_in_float32(name):
    model = model_of(name, torch.float32)
    with exact_softmax():
        wanted = results(copy.deepcopy(model).double(), "eager", *inputs_of(name, "left", torch.float64))
    inputs, real = inputs_of(name, "left", torch.float32)
    theirs, ours = (results(model, implementation, inputs, real) for implementation in ("eager", OURS))
    assert ours.keys() == theirs.keys() == wanted.keys()
    for what in wanted:
        assert_as_accurate(what, ours[what], theirs[what], wanted[what].double())


@pytest.mark.parametrize("name", MODELS)
def test_as_accurate_as_eager_in_bfloat16(name):
    """In half precision single numbers of a model are chaotic: one unit of a ReLU may flip. All together are not."""
    model = model_of(name, torch.bfloat16)
    inputs, real = inputs_of(name, "left", torch.bfloat16)
    doubled = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    with exact_softmax():
        wanted = results(copy.deepcopy(model).double(), "eager", doubled, real)
    theirs, ours = (results(model, implementation, inputs, real) for implementation in ("eager", OURS))
    for names in (["logits"], sorted(wanted.keys() - {"logits", "loss"})):
        mine, peers = (
            sum((found[n].double() - wanted[n].double()).square().sum().item() for n in names) ** 0.5
            for found in (ours, theirs)
        )
        assert all(ours[n].dtype == torch.bfloat16 for n in names) and mine <= 2 * peers


# ---- masks that are never stored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", MODELS)
def test_no_table_is_made(name, side, calls, tables):
    model = model_of(name, torch.float32)
    results(model, OURS, *inputs_of(name, side, torch.float32))
    assert bool(tables) == (name == "Llama 4")
    for _, options in calls:
        assert (options["attn_mask"] is not None) == (name == "Llama 4")


def test_flags_reach_the_kernel(calls):
    for name in ("Llama", "Mistral", "Gemma 2", "BERT"):
        results(model_of(name, torch.float32), OURS, *inputs_of(name, "left", torch.float32))
    causal, windows, caps = ([k[what] for _, k in calls] for what in ("causal", "window", "softcap"))
    assert causal == [True] * 6 + [False] * 2
    assert windows == [(-1, -1)] * 2 + [(4, 0)] * 2 + [(4, 0), (-1, -1)] + [(-1, -1)] * 2
    assert caps == [0.0] * 4 + [2.0] * 2 + [0.0] * 2
    assert all(torch.equal(k["key_padding_mask"], padding("left") == 0) for _, k in calls)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "GPT-NeoX"])  # plain, a window, softcap, no groups
def test_packed_documents(name, calls, tables):
    """Positions that start again begin a document: the same numbers as each document alone, and no table."""
    model = model_of(name)
    ids, lengths = tokens(2, 17), ([9, 8], [3, 12, 2])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs, real = {"input_ids": ids, "position_ids": positions, "use_cache": False}, torch.ones(2, 17) == 1
    with exact_softmax():
        theirs = results(model, "eager", inputs, real)
    tables.clear()
    assert_same(results(model, OURS, inputs, real), theirs)
    assert [n for n, _ in calls] == ["attention_varlen"] * 2 and not tables
    with torch.no_grad():
        packed = model(**inputs).logits
        for row, row_lengths in enumerate(lengths):
            for document, logits in zip(ids[row].split(row_lengths), packed[row].split(row_lengths), strict=True):
                torch.testing.assert_close(model(document[None]).logits[0], logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "gpt-oss"])  # plain, a window, sinks
def test_bounds_given_by_name(name, calls, tables):
    """flash attention's arguments, as DataCollatorWithFlattening makes them, with and without positions."""
    model = model_of(name)
    model.set_attn_implementation(OURS)
    ids, lengths = tokens(1, 17), [9, 2, 6]
    bounds = torch.tensor([0, 9, 11, 17])
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        wanted = torch.cat([model(document, use_cache=False).logits for document in ids.split(lengths, dim=1)], dim=1)
        calls.clear(), tables.clear()
        # without positions the rotary ones count on: distances are the same, rounded in float32
        for more, rtol, atol in (({"position_ids": positions}, 1e-9, 1e-11), ({}, 1e-5, 1e-6)):
            found = model(ids, use_cache=False, **more, **given).logits
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    assert [n for n, _ in calls] == ["attention_varlen"] * 4 and not tables


def test_masks_of_the_users_own(calls):
    """Four dimensions, of either kind, are taken as they are."""
    model = model_of("Llama")
    visible = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    visible |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(3, 1, 11, 11, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    real = torch.ones(3, 11, dtype=torch.bool)
    with exact_softmax():
        theirs = results(model, "eager", {"input_ids": tokens(), "attention_mask": added}, real)
    for mask in (visible, added, added.float()):
        assert_same(results(model, OURS, {"input_ids": tokens(), "attention_mask": mask}, real), theirs)
    assert [k["attn_mask"] is None for _, k in calls] == [False] * 2 + [True] * 4


def test_a_decoder_asked_to_look_both_ways(calls):
    model = model_of("Llama")
    for side in (None, "right"):
        inputs, real = inputs_of("Llama", side)
        with exact_softmax():
            theirs = results(model, "eager", inputs | {"is_causal": False}, real)
        assert_same(results(model, OURS, inputs | {"is_causal": False}, real), theirs)
    assert not any(k["causal"] for _, k in calls)


def test_rows_that_see_nothing_are_finite():
    model = model_of("Llama", torch.float32)
    inputs, _ = inputs_of("Llama", "left", torch.float32)
    everything = results(model, OURS, inputs, torch.ones(3, 11, dtype=torch.bool))
    assert all(t.isfinite().all() for t in everything.values())


# ---- generation ------------------------------------------------------------------------------------------------------

STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral", "Gemma 2", "gpt-oss", "T5", "Whisper"])
def test_generate(name, strategy, calls):
    model = model_of(name)
    inputs, _ = inputs_of(name, "left")
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | STRATEGIES[strategy]
    with exact_softmax():
        theirs = model.generate(**inputs, **options)
    assert not calls
    model.set_attn_implementation(OURS)
    assert torch.equal(model.generate(**inputs, **options), theirs)
    # T5 has a bias, Whisper no padding, Mistral's window has left it behind, and a static cache's mask is a table.
    other = name in ("T5", "Whisper") or (name == "Mistral" and strategy != "no cache") or "static" in strategy
    assert calls[-1][0] == ("attention" if other else "decode_attention")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_in_pieces(name, cache, calls):
    """Several queries against a cache that has keys already: positions are aligned at the last key."""
    model = model_of(name)
    model.set_attn_implementation(OURS)
    ids, mask = tokens(), padding("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        kept = transformers.DynamicCache(config=model.config)
        if cache == "static":
            kept = transformers.StaticCache(config=model.config, max_cache_len=14)
        begin = 0
        for n in (5, 3, 1, 1, 1):
            piece = slice(begin, begin := begin + n)
            out = model(
                ids[:, piece],
                attention_mask=mask[:, :begin],
                position_ids=positions[:, piece],
                past_key_values=kept,
                use_cache=True,
            )
            real = mask[:, piece].bool()
            torch.testing.assert_close(out.logits[real], whole[:, piece][real], rtol=1e-6, atol=1e-7)
            assert out.logits[real].isfinite().all()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_dropout_repeats_with_its_seed(name):
    changes = {"BERT": {"attention_probs_dropout_prob": 0.3}, "Llama": {"attention_dropout": 0.3}}
    model = model_of(name, **changes.get(name, {"dropout_rate": 0.3})).train()
    inputs, real = inputs_of(name, "right")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(results(model, OURS, inputs, real))
    assert_same(runs[0], runs[1], rtol=0, atol=0)
    assert not torch.allclose(runs[0]["logits"], runs[2]["logits"])
    model.eval()
    with exact_softmax():
        assert_same(results(model, OURS, inputs, real), results(model, "eager", inputs, real))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Mistral", "T5"])
def test_gradient_checkpointing(name, reentrant):
    model = model_of(name).train()
    inputs, real = inputs_of(name, "left")
    wanted = results(model, OURS, inputs, real)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(results(model, OURS, inputs, real), wanted)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "BERT", "T5"])  # Qwen3's norms leave q and k in float32
def test_autocast(name, calls):
    model = model_of(name, torch.float32)
    inputs, real = inputs_of(name, "left", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (results(model, implementation, inputs, real) for implementation in ("sdpa", OURS))
    assert calls and ours["logits"].dtype == theirs["logits"].dtype
    torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name, side", [("Llama", None), ("Mistral", "left")])
def test_compiled(name, side):
    model = model_of(name, torch.float32, num_hidden_layers=1)
    inputs, real = inputs_of(name, side, torch.float32)
    wanted = results(model, OURS, inputs, real)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, OURS, inputs, real), wanted, rtol=1e-4, atol=1e-5)


def test_a_described_mask_goes_into_a_compiled_call():
    """As generate gives it to a compiled model: one graph for all paddings."""
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 6, 8)
    layer, graphs = torch.nn.Module(), torch._dynamo.testing.CompileCounter()
    call = lambda mask: transformers_attention.attention_forward(layer, q, k, k, mask)[0]  # noqa: E731
    compiled = torch.compile(call, backend=graphs, fullgraph=True)
    for seed in range(3):
        visible = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask = transformers_mask.attention_mask(2, 4, 6, 2, 0, attention_mask=visible)
        torch.testing.assert_close(compiled(mask), call(mask))
    assert graphs.frame_count == 1


def test_a_compiled_layer_with_a_learned_bias():
    layer = model_of("T5", torch.float32).encoder.block[0].layer[0].SelfAttention
    layer.config._attn_implementation = OURS
    mask, x = padding("left")[:, None, None, :].bool(), torch.randn(3, 11, 32)
    gradients = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        call(x, mask=mask)[0].sin().sum().backward()
        gradients.append({n: p.grad for n, p in layer.named_parameters()})
        layer.zero_grad(set_to_none=True)
    assert gradients[0]["relative_attention_bias.weight"].any()
    assert_same(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_inference_mode():
    model = model_of("Mistral")
    inputs, real = inputs_of("Mistral", "left")
    wanted = results(model, OURS, inputs, real)["logits"]
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits[real], wanted, rtol=0, atol=0)


# ---- models of several parts, loading, and what is refused -----------------------------------------------------------


def test_each_part_has_its_own(calls):
    text = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": VOCAB, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=text | {"image_size": 12, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager").double().eval()
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    inputs = {"input_ids": tokens(), "attention_mask": padding("right"), "pixel_values": pixels}
    with exact_softmax(), torch.no_grad():
        wanted = model(**inputs).logits_per_image
        for parts, layers in (({"text_config": OURS, "vision_config": "eager"}, 2), (OURS, 4)):
            calls.clear()
            model.set_attn_implementation(parts)
            torch.testing.assert_close(model(**inputs).logits_per_image, wanted, rtol=1e-9, atol=1e-11)
            assert len(calls) == layers and sum(k["causal"] for _, k in calls) == 2


def test_from_pretrained(tmp_path, calls):
    saved = model_of("Llama", torch.float32)
    saved.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=OURS)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, saved(tokens()).logits)
    assert len(calls) == 2


def test_weights_are_not_computed():
    model = model_of("BERT", torch.float32)
    model.set_attn_implementation(OURS)
    transformers_attention._warned.clear()
    with pytest.warns(UserWarning, match="fastformer: output_attentions=True gives None"):
        model.bert.encoder.layer[0].attention.self(torch.randn(1, 4, 32), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_wide_heads_run_sdpa(calls):
    model = model_of("Llama", torch.float32, hidden_size=64, num_attention_heads=2, head_dim=264)
    inputs, real = inputs_of("Llama", "left", torch.float32)
    wanted = results(model, "sdpa", inputs, real)
    with pytest.raises(fastformer.UnsupportedError, match="head_dim over 256"):
        results(model, OURS, inputs, real)
    with fastformer.strict(False), pytest.warns(UserWarning, match="head_dim over 256"):
        assert_same(results(model, OURS, inputs, real), wanted, rtol=0, atol=0)
    assert not calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_keeps_what_it_can_keep(calls):
    """torch.jit.trace would record our kernels' results as constants."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    call = lambda q, k: transformers_attention.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)[0]  # noqa: E731
    with fastformer.strict(False), pytest.warns(UserWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(call, (q, k), check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(2 * q, k + 1), call(2 * q, k + 1))


def test_what_cannot_be_done_is_said():
    layer = torch.nn.Module()
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    forward = transformers_attention.attention_forward
    with pytest.raises(ValueError, match="attention_mask: None does not say where 3 causal queries"):
        forward(layer, q, k, k, None)
    with pytest.raises(ValueError, match=r"indices: .*does not know it"):
        forward(layer, q, k, k, None, indices=torch.zeros(1))
    with pytest.raises(ValueError, match=r"attention_mask: shape \(1, 1, 4, 5\)"):
        forward(layer, q, k, k, transformers_mask.attention_mask(1, 4, 5, q_offset=1))
    with pytest.raises(TypeError, match=r"attention_mask: dtype torch\.int64"):
        forward(layer, q, k, k, torch.ones(1, 1, 3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="position_bias: cannot be given together with cu_seq_lens_q"):
        bounds = {"cu_seq_lens_q": torch.tensor([0, 3]), "cu_seq_lens_k": torch.tensor([0, 5])}
        forward(layer, q, k, k, None, is_causal=False, position_bias=torch.zeros(1, 2, 3, 5), **bounds)
    with pytest.raises(ValueError, match="s_aux: no implementation"):
        wide = torch.randn(1, 2, 3, 300)
        forward(layer, wide, wide, wide, None, s_aux=torch.zeros(2))


BLOOM = {"hidden_size": 32, "n_layer": 1, "n_head": 4}


@pytest.mark.parametrize(
    "name, fields, compiled",
    [
        ("Bloom", BLOOM, False),  # adds the mask to its scores
        ("Bloom", BLOOM, True),
        ("BigBirdPegasus", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, False),  # only its decoder asks
    ],
)
def test_a_model_that_would_ask_for_a_mask_only(name, fields, compiled):
    cls = getattr(transformers, f"{name}ForCausalLM")
    model = cls._from_config(cls.config_class(vocab_size=VOCAB, **fields), attn_implementation=OURS)
    with pytest.raises(ValueError, match=rf"attn_implementation: models of a {name}Config have no other attention"):
        (torch.compile(model, backend="eager") if compiled else model)(tokens())


def test_registering_twice_and_unregistering():
    integration.register()
    model = model_of("Llama", torch.float32)
    model.set_attn_implementation(OURS)
    integration.unregister()
    integration.unregister()
    with pytest.raises(KeyError, match="fastformer"):
        model(tokens())
    with pytest.raises(ValueError, match="fastformer"):
        model_of("GPT-2", torch.float32).set_attn_implementation(OURS)
    integration.register()
    model(tokens())


def test_importing_fastformer_imports_no_transformers():
    program = (
        "import sys, fastformer, fastformer.nn, fastformer.models\n"
        "from fastformer.integrations import transformers as integration\n"
        "assert not any(name.split('.')[0] == 'transformers' for name in sys.modules)\n"
        "sys.modules['transformers'] = None\n"
        "integration.unregister()\n"
        "try:\n"
        "    integration.register()\n"
        "except ImportError as error:\n"
        "    assert 'needs transformers 5.4 or newer' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr(transformers_mask.masking, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=rf"needs transformers 5.4 or newer, and {transformers.__version__}"):
        integration.register()
