"""A model split by tensor parallel over 2 and 4 processes, or sharded over 2, is the whole one, in float64."""

import pytest
import torch

from fastformer.models import GPT2Config, GPT2Model
from fastformer.training.tensor_parallel import tensor_parallel
from tests.training.jobs import results_of

MODELS = ("gpt2", "bert", "t5", "t5 gated", "llama")
T5 = {"t5", "t5 gated"}
HIDDEN = 2 * 8 * 16 * 8  # bytes of batch, length and width in float64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of("models", tmp_path_factory)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [*MODELS, "classifier"])
def test_loss_logits_and_gradients_are_the_whole_models(results, ranks, name):
    for of_rank in (result[name] for result in results[f"{ranks} ranks"]):
        assert of_rank["loss"] < 1e-14 and of_rank["logits"] < 1e-14
        wrong = {n: e for n, e in of_rank["gradients"].items() if not e < 1e-13}
        assert not wrong


@pytest.mark.parametrize("name", [*MODELS, "classifier"])
def test_sharded_loss_gradients_and_weights_are_the_whole_models(results, name):
    for of_rank in (result[name] for result in results["sharded"]):
        assert of_rank["loss"] < 1e-14
        assert not {n: e for n, e in of_rank["gradients"].items() if not e < 1e-13}
        assert of_rank["state"] == [] and of_rank["called"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_two_reductions_of_the_stream_per_sublayer_and_none_of_logits(results, ranks, name):
    for of_rank in (result[name] for result in results[f"{ranks} ranks"]):
        sizes = [size for operation, size in of_rank["traffic"] if operation == "allreduce_"]
        assert len(sizes) == len(of_rank["traffic"])
        sublayers = 2 * 2 + 2 * 3 if name in T5 else 2 * 2
        crosses = 2 if name in T5 else 0  # the gradient of the encoder's output, per layer of the decoder
        embeddings = 2 if name in T5 else 1
        assert sizes.count(HIDDEN) == 2 * sublayers + crosses + embeddings
        others = [size for size in sizes if size != HIDDEN]  # of the loss, and the gradient of the head's input
        assert len(others) == 3 and max(others) < HIDDEN
        assert others[0] + others[1] <= 3 * 8 * 16  # three numbers per token


def test_each_rank_has_its_share_as_the_kernels_like_it(results):
    for ranks in (2, 4):
        for name in MODELS:
            share = [result[name]["share"] for result in results[f"{ranks} ranks"]]
            # Norms and the biases behind the sums are everyone's.
            assert all(1 / ranks - 0.03 < s < 1 / ranks + 0.12 for s in share), (name, share)
            assert all(result[name]["joined"] for result in results[f"{ranks} ranks"]), name


def test_dropout_differs_within_split_layers_and_nowhere_else(results):
    a, b = results["dropout"]
    assert a["inside"] != b["inside"] and a["outside"] == b["outside"]
    assert a["losses"] == b["losses"] and a["losses"][0] != a["losses"][1]
    assert torch.equal(a["norm"], b["norm"]) and torch.equal(a["bias"], b["bias"])


class FourRanks:
    """Of a mesh what is looked at before anything is sent."""

    def size(self):
        return 4


@pytest.mark.parametrize(
    "model, message",
    [
        (torch.nn.Linear(4, 4), "no layer of Linear has a tensor parallel plan; these have: BertLayer, GPT2Attention"),
        (GPT2Model(GPT2Config(vocab_size=8, n_embd=12, n_head=6, n_layer=1)), "4 ranks cannot share GPT2Attention's "),
        (
            GPT2Model(GPT2Config(vocab_size=8, n_embd=12, n_head=4, n_layer=1, n_inner=10)),
            "4 ranks cannot share the 10 inputs of GPT2MLP's c_proj",
        ),
        (
            GPT2Model(GPT2Config(vocab_size=9, n_embd=12, n_head=4, n_layer=1)),  # three ranks have them all
            "4 ranks cannot share a vocabulary of 9 tokens",
        ),
    ],
)
def test_what_cannot_be_shared_is_said_before_anything_is_changed(model, message):
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        tensor_parallel(model, FourRanks())
    assert before == {name: p.shape for name, p in model.named_parameters()}
