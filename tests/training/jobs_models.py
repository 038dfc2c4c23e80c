"""Every model whole, split and sharded over ranks, in float64, on the same batch; see jobs.py."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastformer.models import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from fastformer.nn._joined import JoinedLayers
from fastformer.training import ParallelConfig
from fastformer.training.distributed import connect
from fastformer.training.objectives import model_loss
from fastformer.training.tensor_parallel import tensor_parallel
from tests.training.jobs import Traffic, launch

V = 13  # shared by two ranks as 7 and 6, by four as 4, 4, 4 and 1
PAD = 9


def models():
    gpt2 = GPT2Config(vocab_size=V, n_positions=8, n_embd=16, n_layer=2, n_head=4)
    bert = BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    t5 = {"vocab_size": V, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    t5 |= {"decoder_start_token_id": 0}
    llama = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=8,
    )
    scored = LlamaConfig.from_dict({**llama.to_dict(), "pad_token_id": PAD})
    return {
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
        "bert": lambda: BertForMaskedLM(bert),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**t5)),  # tied, two layers in the feed-forward
        "t5 gated": lambda: T5ForConditionalGeneration(
            T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        "llama": lambda: LlamaForCausalLM(llama),
        "classifier": lambda: LlamaForSequenceClassification(scored),
    }


def make(name):
    torch.manual_seed(0)
    model = models()[name]().double().eval()
    with torch.no_grad():  # biases are made as zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def make_batch(name):
    ids = torch.arange(16).mul(5).remainder(V).reshape(2, 8)
    labels = ids.roll(1, 1).clone()
    labels[0, :3] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    if name == "classifier":
        ids, labels = ids.masked_fill(mask == 0, PAD), torch.tensor([1, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compare(names):
    """Of each model the errors of loss, logits and gradients, relative to the largest value."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    for name in names:
        whole, batch = make(name), make_batch(name)
        split = copy.deepcopy(whole)
        pieces = tensor_parallel(split, mesh)
        with Traffic() as traffic:
            loss = model_loss(split, batch)
            loss.backward()
        expected = model_loss(whole, batch)
        expected.backward()
        gradients = {n: p.grad for n, p in split.named_parameters()}
        for n, (how, size) in pieces.items():
            if n in gradients:
                gradients[n] = how.gather(gradients[n], mesh, size)
        errors = {n: error(gradients[n], p.grad) for n, p in whole.named_parameters()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if name.startswith("t5"):
            inputs["decoder_input_ids"] = batch["input_ids"]
        with torch.no_grad():
            logits = error(split(**inputs).logits, whole(**inputs).logits)
        joined = [m for m in split.modules() if isinstance(m, JoinedLayers)]
        parameters = [sum(p.numel() for p in m.parameters()) for m in (split, whole)]
        results[name] = {
            "loss": error(loss, expected),
            "logits": logits,
            "gradients": errors,
            "traffic": traffic.calls,
            "share": parameters[0] / parameters[1],
            "joined": all(m.joined_output(torch.zeros(1, 1, 16).double()) is not None for m in joined),
        }
    dist.destroy_process_group()
    return results


def sharded(names):
    """The same of models sharded by fsdp: the errors of loss and gradients, and of what is put together again."""
    results = {}
    with connect(ParallelConfig("fsdp"), "cpu") as parallel:
        for name in names:
            whole, batch = make(name), make_batch(name)
            model = copy.deepcopy(whole)
            called = parallel.prepare(model, torch.device("cpu"))
            loss = model_loss(called, batch)
            loss.backward()
            expected = model_loss(whole, batch)
            expected.backward()
            gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
            gathered = parallel.weights(model)
            results[name] = {
                "loss": error(loss, expected),
                "gradients": {n: error(gradients[n], p.grad) for n, p in whole.named_parameters()},
                "state": [k for k, v in whole.state_dict().items() if parallel.writes and not gathered[k].equal(v)],
                "called": type(model).__name__ == type(whole).__name__,
            }
    return results


def error(ours, expected):
    # A key's bias is the same for all of a query's scores: its gradient is nothing but rounding.
    return float((ours - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-4))


def dropout():
    """Two steps with dropout: the loss, what all ranks have, and the numbers drawn in a split layer and after it."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=8, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.3, attn_pdrop=0.3)
    )
    tensor_parallel(model, mesh)
    drawn = []
    attention = model.transformer.h[0].attn
    inner = attention.forward.method
    attention.forward.method = lambda *args: (drawn.append(torch.rand(())), inner(*args))[1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model_loss(model, make_batch("gpt2"))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    result = {
        "losses": losses,
        "norm": model.transformer.ln_f.weight.detach().clone(),
        "bias": model.transformer.h[0].mlp.c_proj.bias.detach().clone(),
        "inside": float(drawn[0]),
        "outside": float(torch.rand(())),
    }
    dist.destroy_process_group()
    return result


def run(out):
    everything = tuple(models())
    return {
        "2 ranks": launch(2, compare, everything),
        "4 ranks": launch(4, compare, everything),
        "sharded": launch(2, sharded, everything),
        "dropout": launch(2, dropout),
    }
