"""Tensor parallel models: each of N ranks computes its share of every layer's heads and hidden units.

    x -> [x W1_r] -> [act] -> [.. W2_r] -> sum over ranks + b2        W1 split by columns, W2 by rows

(Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.) The residual stream is the same on all ranks, so a sublayer
needs one all-reduce forward, of its output, and one backward, of the gradient of its input. The token embedding and the
output layer are split by rows of the vocabulary; the loss needs each rank's logits and three numbers per token.

What is split are sublayers, not operations: parameters become the rank's own smaller tensors and a module computes with
fewer heads, by the same kernels as before. DTensor says how a parameter is cut up and put together; no kernel sees one.
A plan is a line per sublayer below; the models know nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .. import functional
from ..models.bert import BertLayer
from ..models.conv1d import Conv1D
from ..models.gpt2 import GPT2MLP, GPT2Attention
from ..models.llama import LlamaAttention
from ..models.t5_layers import T5Attention, T5DenseReluDense
from ..nn import GatedFeedForward
from ..nn._joined import JoinedLayers


@dataclass(frozen=True)
class Sublayer:
    """How one sublayer of a module is split; names are relative to the module.

    Attributes:
        columns: linear layers of which each rank has some outputs.
        rows: the linear layer of which each rank has some inputs, and the whole bias.
        heads: attributes that count heads.
        tables: parameters with a column per head.
        parts: outputs that lie side by side in ``columns``, each of which is split: 3 for q|k|v in one layer.
        enters, leaves: methods whose input all ranks have, and whose output has to be added up over them.
        inputs: how many of the first arguments of ``enters`` are such inputs.
    """

    columns: tuple[str, ...]
    rows: str
    heads: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    parts: int = 1
    enters: str = "forward"
    leaves: str = "forward"
    inputs: int = 1


PLANS: dict[type[nn.Module], tuple[Sublayer, ...]] = {
    GPT2Attention: (Sublayer(("c_attn",), "c_proj", heads=("num_heads",), parts=3),),
    GPT2MLP: (Sublayer(("c_fc",), "c_proj"),),
    LlamaAttention: (Sublayer(("q_proj", "k_proj", "v_proj"), "o_proj", heads=("heads",)),),
    GatedFeedForward: (Sublayer(("gate_proj", "up_proj"), "down_proj"),),
    T5Attention: (
        Sublayer(
            ("q", "k", "v"),
            "o",
            heads=("num_heads", "relative_attention_bias.num_heads"),
            tables=("relative_attention_bias.weight",),
            inputs=2,  # the encoder's output as well
        ),
    ),
    T5DenseReluDense: (Sublayer(("wi", "wi_0", "wi_1"), "wo"),),
    BertLayer: (
        Sublayer(
            tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
            "attention.output.dense",
            heads=("attention.self.num_heads",),
            enters="attention.self.forward",
            leaves="attention.output.dense.forward",
        ),
        Sublayer(("intermediate.dense",), "output.dense", enters="feed_forward", leaves="feed_forward"),
    ),
}


DROPOUT = ("dropout", "dropout_p", "activation_dropout")
"""Attributes of the planned modules that are probabilities."""


class Split(NamedTuple):
    """A parameter cut along ``dim``, in each of the ``parts`` that lie there side by side."""

    dim: int
    parts: int = 1

    def share(self, whole: Tensor, mesh: DeviceMesh) -> Tensor:
        """This rank's piece of ``whole``, contiguous, in memory of its own."""
        whole = whole.detach().unflatten(self.dim, (self.parts, -1))
        piece = distribute_tensor(whole, mesh, [Shard(self.dim + 1)], src_data_rank=None).to_local()
        return piece.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def gather(self, piece: Tensor, mesh: DeviceMesh, size: int) -> Tensor:
        """The tensor, ``size`` long along ``dim``, of which ``piece`` is this rank's."""
        piece = piece.detach().unflatten(self.dim, (self.parts, -1)).contiguous()
        shape = (*piece.shape[: self.dim + 1], size // self.parts, *piece.shape[self.dim + 2 :])
        stride = torch.empty(shape, device="meta").stride()
        placed = DTensor.from_local(
            piece, mesh, [Shard(self.dim + 1)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        return placed.full_tensor().flatten(self.dim, self.dim + 1)


class Piece(NamedTuple):
    """How a parameter was split, and how long it was."""

    split: Split
    size: int


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> dict[str, Piece]:
    """Splits ``model`` in place over the one-dimensional ``mesh``, and says how, by the names in its ``state_dict``.

    ``model(**batch)`` on the same batch then returns on every rank what the whole model would.

    Raises:
        ValueError: no layer of the model has a plan, or heads or hidden units cannot be shared equally.
    """
    layers = [(module, plan) for module in model.modules() for plan in PLANS.get(type(module), ())]
    if not layers:
        planned = ", ".join(sorted(cls.__name__ for cls in PLANS))
        raise ValueError(f"model: no layer of {type(model).__name__} has a tensor parallel plan; these have: {planned}")
    count = mesh.size()
    for module, plan in layers:
        _check(module, plan, count)
    _rows_per_rank(len(model.get_input_embeddings().weight), count)  # type: ignore[operator]
    splits: dict[int, Piece] = {}  # by parameter
    for module, plan in layers:
        _split_sublayer(module, plan, mesh, splits)
    _split_vocabulary(model, mesh, splits)
    return {name: splits[id(p)] for name, p in model.state_dict(keep_vars=True).items() if id(p) in splits}


def _check(module: nn.Module, plan: Sublayer, count: int) -> None:
    for name, number in _attributes(module, plan.heads):
        numbers = number if isinstance(number, tuple) else (number,)
        if any(n % count for n in numbers):
            raise ValueError(
                f"parallel.tensor: {count} ranks cannot share {type(module).__name__}'s {name} = {number} equally"
            )
    if isinstance(module, GatedFeedForward) and module.dropout:
        raise ValueError("model: GatedFeedForward with dropout after its sum has no tensor parallel plan")
    for name, layer in _attributes(module, (plan.rows,)):
        inputs = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
        if inputs % count:
            raise ValueError(
                f"parallel.tensor: {count} ranks cannot share the {inputs} inputs of {type(module).__name__}'s {name}"
            )


def _attributes(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Those of ``names`` that the module has."""
    for name in names:
        path, _, last = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            yield name, getattr(module.get_submodule(path), last)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def _split_sublayer(module: nn.Module, plan: Sublayer, mesh: DeviceMesh, splits: dict[int, Piece]) -> None:
    def replace(owner: nn.Module, name: str, split: Split) -> None:
        whole = owner._parameters.get(name)
        if whole is not None:
            owner._parameters[name] = _piece(whole, split, mesh, splits)

    for _, layer in _attributes(module, plan.columns):
        replace(layer, "weight", Split(1 if isinstance(layer, Conv1D) else 0, plan.parts))
        replace(layer, "bias", Split(0, plan.parts))
    for _, layer in _attributes(module, (plan.rows,)):
        replace(layer, "weight", Split(0 if isinstance(layer, Conv1D) else 1))
    for name in plan.tables:
        if any(_attributes(module, (name,))):
            replace(*_owner(module, name), Split(1))
    count = mesh.size()
    for name, number in list(_attributes(module, plan.heads)):
        shared = tuple(n // count for n in number) if isinstance(number, tuple) else number // count
        setattr(*_owner(module, name), shared)
    for part in module.modules():
        if isinstance(part, JoinedLayers):
            part.join()
    group, rank = mesh.get_group(), mesh.get_local_rank()
    last = module.get_submodule(plan.rows)
    for place in dict.fromkeys((plan.enters, plan.leaves)):
        owner, method = _owner(module, place)
        call = _Shared(
            getattr(owner, method),
            owner,
            group,
            rank,
            inputs=plan.inputs if place == plan.enters else 0,
            last=last if place == plan.leaves else None,
        )
        setattr(owner, method, call)


def _piece(whole: nn.Parameter, split: Split, mesh: DeviceMesh, splits: dict[int, Piece]) -> nn.Parameter:
    piece = nn.Parameter(split.share(whole, mesh), requires_grad=whole.requires_grad)
    splits[id(piece)] = Piece(split, whole.shape[split.dim])
    return piece


# ---- between the ranks -----------------------------------------------------------------------------------------------


class _Enter(torch.autograd.Function):
    """Forward nothing; backward the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return _sum(dout.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Leave(torch.autograd.Function):
    """Forward the sum over the ranks; backward nothing."""

    @staticmethod
    def forward(ctx, x, group):
        return _sum(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, dout):
        return dout, None


def _sum(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


class _Shared:
    """A method of a split sublayer, between its input, which all ranks have, and the sum of their outputs.

    The last linear layer's bias is added after the sum, once. Dropout in here is of this rank's heads or hidden units,
    so it draws numbers of its own, and leaves the generator as all ranks have it.
    """

    def __init__(
        self, method: Callable[..., Any], owner: nn.Module, group: Any, rank: int, inputs: int, last: nn.Module | None
    ) -> None:
        self.method, self.owner, self.group, self.rank = method, owner, group, rank
        self.inputs, self.last = inputs, last
        self.drops = inputs > 0 and _drops(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shared = [
            _Enter.apply(x, self.group) if isinstance(x, Tensor) and x.requires_grad else x for x in args[: self.inputs]
        ]
        bias = None if self.last is None else self.last._parameters.get("bias")
        if bias is not None:
            self.last._parameters["bias"] = None  # type: ignore[union-attr]
        try:
            with self._own_random_numbers():
                out = self.method(*shared, *args[self.inputs :], **kwargs)
        finally:
            if bias is not None:
                self.last._parameters["bias"] = bias  # type: ignore[union-attr]
        if self.last is None:
            return out
        first, *others = out if isinstance(out, tuple) else (out,)
        first = _Leave.apply(first, self.group)
        if bias is not None:
            first = first + bias.to(first.dtype)
        return (first, *others) if isinstance(out, tuple) else first

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        if not (self.drops and self.owner.training):
            yield
            return
        seed = int(torch.randint(1 << 62, ()))
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(seed + self.rank)
            yield


def _drops(module: nn.Module) -> bool:
    """Whether something in ``module`` drops elements in training."""
    for part in module.modules():
        given = [part.p] if isinstance(part, nn.Dropout) else [part.__dict__.get(name) for name in DROPOUT]
        if any(given):
            return True
    return False


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def _rows_per_rank(vocabulary: int, count: int) -> int:
    """Of all ranks but the last, which has the rest."""
    rows = -(-vocabulary // count)
    if rows * (count - 1) >= vocabulary:
        raise ValueError(f"parallel.tensor: {count} ranks cannot share a vocabulary of {vocabulary} tokens")
    return rows


def _split_vocabulary(model: nn.Module, mesh: DeviceMesh, splits: dict[int, Piece]) -> None:
    """Gives each rank some rows of the token embedding and of the output layer, which may be the same."""
    get = getattr(model, "get_output_embeddings", lambda: None)
    table, head = model.get_input_embeddings().weight, get()  # type: ignore[operator]
    shared = {id(table): table}
    if head is not None:
        shared |= {id(p): p for p in head.parameters()}
    pieces = {key: _piece(p, Split(0), mesh, splits) for key, p in shared.items()}
    first = _rows_per_rank(len(table), mesh.size()) * mesh.get_local_rank()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) not in pieces:
                continue
            module._parameters[name] = pieces[id(p)]
            if isinstance(module, nn.Embedding):
                module.forward = _Lookup(module, mesh.get_group(), first)  # type: ignore[method-assign]
    if head is not None:
        whole = _Logits(head, mesh, first, len(table))
        head.forward, head.loss = whole, whole.loss
        model.spread_vocabulary = True  # type: ignore[assignment]


class _Lookup:
    """Rows of an embedding table of which each rank has some."""

    def __init__(self, table: nn.Embedding, group: Any, first: int) -> None:
        self.table, self.group, self.first = table, group, first

    def __call__(self, input: Tensor) -> Tensor:
        weight, padding = self.table.weight, self.table.padding_idx
        row = input - self.first
        elsewhere = (row < 0) | (row >= len(weight))
        rows = functional.embedding(row.masked_fill(elsewhere, 0), weight)
        if padding is not None:  # its row is read, and gets no gradient
            rows = torch.where((input == padding)[..., None], rows.detach(), rows)
        return _Leave.apply(rows.masked_fill(elsewhere[..., None], 0.0), self.group)


class _Logits:
    """The output layer, of which each rank has the logits of some tokens."""

    def __init__(self, head: nn.Module, mesh: DeviceMesh, first: int, vocabulary: int) -> None:
        self.head, self.mesh, self.first, self.vocabulary = head, mesh, first, vocabulary

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden ``(*, E)`` -> ``(*, vocabulary)``: every rank's logits, side by side."""
        return _Gather.apply(self._own(hidden), self.mesh, self.vocabulary, self.first)

    def loss(self, hidden: Tensor, target: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """Mean cross-entropy of rows ``(N, E)`` and targets ``(N)``, -100 not counted; no rank has all logits."""
        logits = self._own(hidden)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        scored = target != -100
        losses = _VocabularyLoss.apply(logits, target, self.first, self.mesh.get_group())
        total = torch.where(scored, losses, 0.0).sum()
        return total / (scored.sum().clamp(min=1) if num_items is None else num_items)

    def _own(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            hidden = _Enter.apply(hidden, self.mesh.get_group())
        return functional.linear(hidden, self.head.weight, self.head.bias)  # type: ignore[arg-type]


class _Gather(torch.autograd.Function):
    """Forward all ranks' last dimensions, side by side; backward this rank's part, as all have the whole gradient."""

    @staticmethod
    def forward(ctx, x, mesh, size, first):
        ctx.place = slice(first, first + x.shape[-1])
        return Split(x.dim() - 1).gather(x, mesh, size)

    @staticmethod
    def backward(ctx, dout):
        return dout[..., ctx.place], None, None, None


class _VocabularyLoss(torch.autograd.Function):
    """-log softmax(logits)[target] of each row, where each rank has some of its columns."""

    @staticmethod
    def forward(ctx, logits, target, first, group):
        columns = logits.shape[1]
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        shifted = logits - largest[:, None]
        place = target - first
        inside = (place >= 0) & (place < columns)
        place = place.clamp(0, columns - 1)
        at = torch.where(inside, shifted.gather(1, place[:, None])[:, 0], 0.0)
        exp = shifted.exp_()
        total, at = _sum(torch.stack([exp.sum(1), at]), group)
        ctx.save_for_backward(exp.div_(total[:, None]), place, inside)
        return total.log() - at

    @staticmethod
    def backward(ctx, dloss):
        probability, place, inside = ctx.saved_tensors
        dlogits = probability * dloss[:, None]
        dlogits.scatter_add_(1, place[:, None], torch.where(inside, -dloss, 0.0)[:, None])
        return dlogits, None, None, None
