"""A module of ours beside torch's: same weights, same inputs; outputs and every gradient against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_accurate(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, *, roundings: int = 8) -> None:
    """|ours - exact| <= 2 |theirs - exact| + a few roundings of the largest value."""
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, torch {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, torch {theirs.dtype}"
    if exact.numel() == 0:
        return
    lost = exact.isnan()  # the mean over no target, say
    assert torch.equal(ours.isnan(), lost), f"{name}: NaN in other places than torch"
    ours, theirs, exact = (x.masked_fill(lost, 0) for x in (ours, theirs, exact))
    if ours.dtype == torch.float64:  # torch's own error counts as 0 there; the difference is in the order of additions
        tiny = 1e-12 * max(exact.abs().max().item(), 1.0)
    else:
        tiny = roundings * torch.finfo(ours.dtype).eps * max(exact.abs().max().item(), 1e-3)
    mine, peers = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
    assert mine <= 2 * peers + tiny, f"{name}: error {mine:.3g}, torch's {peers:.3g}"


def compare(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    inputs: Sequence[Tensor],
    call: Callable[..., Tensor] = lambda module, *inputs: module(*inputs),
    *,
    roundings: int = 8,
) -> None:
    """Loads theirs into ours, runs ``call(module, *inputs)`` on both and on a float64 copy, compares all there is."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    exact = copy.deepcopy(theirs).double()
    results = []
    upstream = None
    # Of a float64 module the copy is torch's own result already.
    same = all(x.dtype == torch.float64 for x in (*theirs.state_dict().values(), *inputs) if x.is_floating_point())
    for module, double in ((exact, True), *(() if same else ((theirs, False),)), (ours, False)):
        module.zero_grad()
        leaves = [x.double() if double and x.is_floating_point() else x for x in inputs]
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in leaves]
        out = call(module, *leaves)
        if upstream is None:
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        out.backward(upstream.to(out.dtype))
        found = {"output": out.detach()}
        found |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
        found |= {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append(found)
    wanted, torchs, mine = results[0], results[-2], results[-1]
    assert mine.keys() == torchs.keys() == wanted.keys()
    for name in wanted:
        assert_as_accurate(name, mine[name], torchs[name], wanted[name], roundings=roundings)


def assert_drop_in(make_ours: Callable[[], torch.nn.Module], make_theirs: Callable[[], torch.nn.Module]) -> None:
    """Same initial values from the same seed, same state_dict both ways, survives deepcopy and pickle."""
    import pickle

    torch.manual_seed(3)
    ours = make_ours()
    torch.manual_seed(3)
    theirs = make_theirs()
    state, peers = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(peers)
    for name, value in peers.items():
        assert torch.equal(state[name], value), f"{name}: other initial values than torch"
    ours.load_state_dict(peers, strict=True)
    theirs.load_state_dict(state, strict=True)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and repr(twin) == repr(ours)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), ours.parameters(), strict=True))
