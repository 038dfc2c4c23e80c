"""fastformer.nn.CrossEntropyLoss and LinearCrossEntropyLoss beside torch's own."""

import pytest
import torch

from fastformer import nn
from tests.nn.comparison import assert_drop_in, compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"label_smoothing": 0.1}, {"weighted": True}, {"weighted": True, "label_smoothing": 0.3}, {"ignore_index": 2}],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [
        (9, 37),  # tokens x classes
        (37,),  # one sample, no batch
        (2, 37, 3, 2),  # classes in the second of four dimensions
    ],
)
def test_matches_torch(shape, arguments, reduction, dtype):
    torch.manual_seed(0)
    arguments = dict(arguments)
    if arguments.pop("weighted", False):
        arguments["weight"] = torch.rand(37, dtype=dtype)
    target = torch.randint(37, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if "ignore_index" in arguments and target.dim():
        target.view(-1)[::2] = arguments["ignore_index"]
    ours, theirs = (m.CrossEntropyLoss(reduction=reduction, **arguments) for m in (nn, torch.nn))
    compare(ours, theirs, [3 * torch.randn(shape, dtype=dtype), target])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_as_targets(reduction):
    torch.manual_seed(0)
    target = torch.randn(5, 11).softmax(1)
    ours, theirs = (m.CrossEntropyLoss(reduction=reduction, label_smoothing=0.2) for m in (nn, torch.nn))
    compare(ours, theirs, [torch.randn(5, 11)], lambda module, x: module(x, target.to(x.dtype)))


def test_z_loss():
    logits, target = torch.randn(5, 11), torch.randint(11, (5,))
    wanted = torch.nn.CrossEntropyLoss()(logits, target) + 0.1 * logits.logsumexp(1).square().mean()
    torch.testing.assert_close(nn.CrossEntropyLoss(z_loss=0.1)(logits, target), wanted)


def test_is_a_drop_in():
    weight = torch.rand(5)
    assert_drop_in(lambda: nn.CrossEntropyLoss(weight), lambda: torch.nn.CrossEntropyLoss(weight))


def test_ignored_targets_have_no_gradient():
    logits = torch.randn(4, 6, requires_grad=True)
    nn.CrossEntropyLoss()(logits, torch.tensor([1, -100, 3, -100])).backward()
    assert torch.equal(logits.grad[1::2], torch.zeros(2, 6))
    assert logits.grad[0::2].abs().min() > 0


def test_bad_input_is_named():
    loss = nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="target"):
        loss(torch.randn(3, 5), torch.tensor([1, 2, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="target"):
        loss(torch.randn(3, 5), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="weight"):
        nn.CrossEntropyLoss(torch.rand(4))(torch.randn(3, 5), torch.tensor([1, 2, 3]))


in_torch = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has LinearCrossEntropyLoss from 2.13 on"
)


@in_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": True, "label_smoothing": 0.1},
        {"weighted": True, "ignore_index": 2},
        {"bias": True, "out_features": (3, 2), "weighted": True},
        {"options": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [(), (9,), (130,)], ids=str)
def test_linear_matches_torch(rows, arguments, reduction, dtype):
    torch.manual_seed(0)
    arguments = dict(arguments)
    if arguments.get("out_features") and not rows:
        pytest.skip("several positions a row need rows")
    if arguments.pop("weighted", False):
        arguments["weight"] = torch.rand(37, dtype=dtype)
    if arguments.pop("options", False):
        arguments["options"] = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    target = torch.randint(37, (*rows, *arguments.get("out_features", ())))
    ours, theirs = (
        m.LinearCrossEntropyLoss(24, 37, reduction=reduction, dtype=dtype, **arguments) for m in (nn, torch.nn)
    )
    compare(ours, theirs, [3 * torch.randn(*rows, 24, dtype=dtype), target])


@in_torch
@pytest.mark.parametrize("arguments", [{}, {"bias": True, "out_features": (3,), "label_smoothing": 0.1}], ids=str)
def test_linear_is_a_drop_in(arguments):
    weight = torch.rand(5)
    assert_drop_in(*((lambda m=m: m.LinearCrossEntropyLoss(4, 5, weight=weight, **arguments)) for m in (nn, torch.nn)))


def test_linear_adds_the_z_loss():
    loss, plain = (nn.LinearCrossEntropyLoss(4, 5, z_loss=z, reduction="none") for z in (0.1, 0.0))
    loss.load_state_dict(plain.state_dict())
    x, target = torch.randn(6, 4), torch.arange(6) % 5
    added = 0.1 * loss.linear(x).logsumexp(1).square()
    torch.testing.assert_close(loss(x, target), plain(x, target) + added)


def test_linear_names_bad_input():
    with pytest.raises(ValueError, match=r"weight: shape \(4,\) is not \(5,\)"):
        nn.LinearCrossEntropyLoss(3, 5, weight=torch.rand(4))
    with pytest.raises(ValueError, match="label_smoothing: 2"):
        nn.LinearCrossEntropyLoss(3, 5, label_smoothing=2)
    with pytest.raises(ValueError, match="linear_weight: 3 input features"):
        nn.LinearCrossEntropyLoss(3, 5)(torch.randn(2, 4), torch.tensor([0, 1]))
