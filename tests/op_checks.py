"""Checks of one backend's file against the float64 reference, shared by the tests of the backends."""

import torch

from fastformer.backends.reference import activation as reference_activation
from fastformer.backends.reference import embedding as reference_embedding
from fastformer.backends.reference import rotary as reference_rotary
from tests.triton.accuracy import check, check_all, double


def check_activation(kernels, x, bias, up, up_bias, dout, kind, dropout_p=0.0, seed=0):
    """Forward, backward and the output computed once more in backward."""
    inputs = x, bias, up, up_bias
    arguments = [
        (op, (*(double(*inputs) if exact else inputs), kind, dropout_p, seed))
        for op, exact in ((kernels, False), (reference_activation, False), (reference_activation, True))
    ]
    outputs = [op.forward(*a) for op, a in arguments]
    check("out", *outputs)
    needs = bias is not None, up_bias is not None
    again = [torch.empty_like(out) for out in outputs]
    gradients = [
        op.backward(dout.to(a[0].dtype), *a, *needs, None, None, out) for (op, a), out in zip(arguments, again)
    ]
    # A sum's rounding is of the sums on the way, at most that of the terms' sizes; a term's is at least dout's.
    dx, dup, *_ = gradients[2]
    terms = {"dbias": dx, "dup_bias": dup}
    sizes = {n: torch.maximum(d.abs(), dout.double().abs()).sum(0) for n, d in terms.items() if d is not None}
    check_all("dx dup dbias dup_bias", *gradients, dx=dout, dup=dout, **sizes)
    check("out again", *again)


def check_embedding(kernels, tables, rows, dout, *, scale=1.0, norm=None, dropout_p=0.0, needs=None):
    """``norm``: (weight, bias) to normalise with, else None."""
    weight, bias = norm or (None, None)
    options = (scale, norm is not None)
    results = []
    for op, exact in ((kernels, False), (reference_embedding, False), (reference_embedding, True)):
        t, w, b, d = tables, weight, bias, dout
        if exact:
            t, (w, b, d) = tuple(t._replace(weight=t.weight.double()) for t in tables), double(weight, bias, dout)
        out, mean, rstd = op.forward(t, (rows,), *options, w, b, 1e-5, dropout_p, 5)
        parameters = (w is not None, b is not None, d.dtype if w is None else w.dtype)
        wanted = needs or (True,) * len(tables)
        grads, dw, db = op.backward(d, t, *options, w, mean, rstd, dropout_p, 5, wanted, *parameters)
        results.append((out, mean, rstd, dw, db, *grads))
    names = "out mean rstd dweight dbias" + "".join(f" table{i}" for i in range(len(tables)))
    summand = torch.cat([t.weight.flatten() for t in tables] + [dout.flatten()])  # what all are sums of
    check_all(names, *results, **dict.fromkeys(names.split(), summand))


def check_rotary(kernels, q, k, cos, sin, ids=None, offset=0, batch_offset=0, interleaved=False, inplace=False):
    """Forward and its gradient, which is the inverse."""
    for inverse in (False, True):
        options = (ids, offset, batch_offset, interleaved, inverse)
        theirs = reference_rotary.forward(q, k, cos, sin, *options, False)
        exact = reference_rotary.forward(*double(q, k, cos, sin), *options, False)
        inputs = tuple(None if x is None else x.clone() for x in (q, k)) if inplace else (q, k)
        ours = kernels.forward(*inputs, cos, sin, *options, inplace)
        for name, x, o, t, e in zip(("q", "k"), (q, k), ours, theirs, exact, strict=True):
            check(name, o, t, e, x)
        assert not inplace or ours[0] is inputs[0]
