"""What GPT-2 and Llama have in common: padding, the cache, losses of parts of a batch, lower precision, copies."""

import copy
import pickle

import pytest
import torch

from fastformer.models import KVCache
from tests.models import llama_pairs, pairs
from tests.models.parity import assert_as_accurate, gradients, labels_of

LENGTH = 17
FAMILIES = {"GPT-2": pairs, "Llama": llama_pairs}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def ours_of(family, dtype=torch.float64, **changes):
    return family.ours_of(family.theirs_of(dtype=dtype, **changes))


def padding(side):
    """A mask of three texts, the second of which is 11 tokens long, and the positions of its real tokens."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, slice(0, 6) if side == "left" else slice(11, LENGTH)] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    """Logits at real tokens are transformers', and those of the text alone; padding has no gradient to the others."""
    theirs = family.theirs_of(dtype=torch.float64)
    ours = family.ours_of(theirs)
    tokens, (mask, positions) = family.ids(), padding(side)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    real = mask.bool()
    logits = ours(**inputs).logits
    torch.testing.assert_close(logits[real], theirs(**inputs).logits[real], rtol=0, atol=1e-11)
    torch.testing.assert_close(logits[1][real[1]], ours(tokens[1:2, real[1]]).logits[0], rtol=0, atol=1e-11)
    assert torch.isfinite(logits).all()
    labels = tokens.masked_fill(~real, -100)
    if side == "left":  # the last padding would predict the first token, from nothing
        labels[1, 6] = -100
    mine, my_gradients = gradients(ours, labels=labels, **inputs)
    peers, their_gradients = gradients(theirs, labels=labels, **inputs)
    torch.testing.assert_close(mine.loss, peers.loss.double(), rtol=1e-6, atol=0)
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(my_gradients[key], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (pairs, {}),
        *((llama_pairs, llama_pairs.CONFIGS[name]) for name in ("grouped heads", "biases", "llama3")),
    ],
    ids=["GPT-2", "Llama", "Llama with biases", "Llama 3"],
)
def test_a_cache_changes_nothing(family, changes):
    ours = ours_of(family, **changes)
    tokens, key_heads = family.ids(), getattr(ours.config, "num_key_value_heads", 4)
    wanted = ours(tokens, use_cache=False)
    assert wanted.past_key_values is None
    with torch.no_grad():
        for cache in (KVCache(2, LENGTH), KVCache(2), None):
            found = []
            for start, end in ((0, 5), (5, 6), (6, LENGTH)):  # a prompt, one token, several tokens at once
                output = ours(tokens[:, start:end], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits)
            torch.testing.assert_close(torch.cat(found, 1), wanted.logits, rtol=0, atol=1e-12)
            assert cache.get_seq_length() == LENGTH and cache.keys[0].shape[1] == key_heads  # not repeated
            cache.crop(4)
            again = ours(tokens[:, 4:], past_key_values=cache).logits
            torch.testing.assert_close(again, wanted.logits[:, 4:], rtol=0, atol=1e-12)
        assert ours(tokens).past_key_values is not None  # the configuration's default, as in transformers
    assert ours(tokens).past_key_values is None  # not while gradients are recorded


@every_family
def test_a_cache_with_left_padding(family):
    ours = ours_of(family)
    tokens, (mask, positions) = family.ids(), padding("left")
    wanted = ours(tokens, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad():
        cache, found = KVCache(2), []
        for start, end in ((0, 9), (9, 10), (10, LENGTH)):
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            found.append(ours(tokens[:, start:end], past_key_values=cache, **part).logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-12)


@every_family
def test_gradients_flow_through_a_cache(family):
    ours = ours_of(family)
    tokens = family.ids()
    loss = ours(tokens, use_cache=False).logits[:, 9:].square().sum()
    wanted = torch.autograd.grad(loss, list(ours.parameters()))
    cache = KVCache(2, LENGTH)
    ours(tokens[:, :9], past_key_values=cache)
    loss = ours(tokens[:, 9:], past_key_values=cache).logits.square().sum()
    for mine, gradient in zip(torch.autograd.grad(loss, list(ours.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-11)


@every_family
def test_a_full_cache_says_so(family):
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit into a cache of 16"):
        ours_of(family)(family.ids(), past_key_values=KVCache(2, 16))


@every_family
def test_reordering_a_cache(family):
    ours = ours_of(family)
    tokens, order = family.ids(), torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = ours(tokens[:, :9]).past_key_values
        cache.reorder(order)
        found = ours(tokens[order, 9:], past_key_values=cache).logits
        torch.testing.assert_close(found, ours(tokens[order]).logits[:, 9:], rtol=0, atol=1e-12)


# ---- losses, precision, copies ---------------------------------------------------------------------------------------


@every_family
def test_num_items_in_batch_makes_accumulation_exact(family):
    ours = ours_of(family)
    tokens, labels = family.ids(4), labels_of(family.ids(4))
    counted = (labels[:, 1:] != -100).sum()
    whole, wanted = gradients(ours, input_ids=tokens, labels=labels)
    wanted = {k: g.clone() for k, g in wanted.items()}
    ours.zero_grad()
    parts = [
        ours(tokens[part], labels=labels[part], num_items_in_batch=counted).loss for part in (slice(0, 1), slice(1, 4))
    ]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole.loss, rtol=1e-13, atol=0)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(family, dtype):
    theirs, inputs = family.theirs_of(dtype=torch.float64), {"input_ids": family.ids(), "labels": family.ids()}
    cls = type(family.ours_of(theirs))
    assert_as_accurate(theirs, cls, inputs, dtype)
    assert_as_accurate(theirs, cls, inputs, dtype, ("loss",))
    output = family.ours_of(theirs.to(dtype))(**inputs)
    assert output.loss.dtype == torch.float32 and output.logits.dtype == dtype


@every_family
def test_autocast(family):
    """Half-precision matmuls beside a float32 residual stream, as transformers does it."""
    exact = family.theirs_of(dtype=torch.float64)
    theirs = copy.deepcopy(exact).float()
    inputs = {"input_ids": family.ids(), "labels": family.ids()}
    results = [gradients(exact, **inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        results += [gradients(model, **inputs) for model in (theirs, family.ours_of(theirs))]
    for what in ("loss", *results[0][1]):
        wanted, peers, mine = (
            (output[what] if what == "loss" else grads[what]).detach().double() for output, grads in results
        )
        error, peer_error = ((x - wanted).norm().item() for x in (mine, peers))
        assert error <= 2 * peer_error + 1e-3 * wanted.norm().item(), f"{what}: error {error:.3g}, {peer_error:.3g}"


@every_family
def test_deepcopy_and_pickle_keep_the_tie(family):
    ours = ours_of(family)
    wanted = ours(family.ids()).logits
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.lm_head.weight is twin.get_input_embeddings().weight
        assert torch.equal(twin(family.ids()).logits, wanted)
