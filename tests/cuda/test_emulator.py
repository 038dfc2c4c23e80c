"""The emulator runs right kernels right in every order of threads, and does not let wrong ones pass.

The kernels are in tests/cuda/kernels; each takes a number of a planted mistake, 0 for none.
"""

import ctypes
import shutil

import pytest
import torch

from fastformer.backends.cuda import emulation, resources
from tests.cuda.orders import KERNELS, MODES, Kernels

pytestmark = pytest.mark.skipif(not shutil.which(emulation.compiler()[0]), reason="the emulator needs a C++ compiler")


@pytest.fixture(scope="module")
def kernels():
    return Kernels()


def outcomes(kernels, run, expected):
    """What happened in each mode: ``None`` if the result was right, else the emulator's message or "wrong"."""
    found = {}
    for order, completion in MODES:
        assert kernels.configure(order.encode(), completion.encode(), 1)
        status, result = run()
        right = status == 0 and torch.allclose(result, expected, rtol=1e-4, atol=1e-3)
        found[order, completion] = None if right else kernels.error() if status else "wrong"
    return found


def assert_right(found):
    assert set(found.values()) == {None}, found


def assert_caught(found, message=None):
    """In some mode; with the given words where the emulator itself can tell."""
    caught = [text for text in found.values() if text]
    assert caught, "no order of threads gave a wrong result"
    if message:
        assert any(message in text for text in caught), caught


# ---- barriers, shuffles, shared memory -------------------------------------------------------------------------------


def basics(kernels, kernel, bug, size, out):
    x = torch.arange(size, dtype=torch.float32)

    def run():
        y = torch.full((out,), float("nan"))
        return kernels.run_basics(kernel, bug, x.data_ptr(), y.data_ptr()), y

    return x, run


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (0, None),
        (1, "wrong"),  # no __syncthreads
        (2, "deadlock: 224 threads wait at __syncthreads"),  # a warp has left
        (3, "wrong"),  # shared memory before it is written: poison, not zeros or the last block's values
    ],
)
def test_block_barrier(kernels, bug, message):
    x, run = basics(kernels, 0, bug, 768, 768)
    found = outcomes(kernels, run, x.view(3, 256).flip(1).reshape(-1))
    assert_caught(found, message) if bug else assert_right(found)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (0, None),
        (1, "deadlock: 48 threads wait at shuffle"),
        (2, "which mask"),  # the lane read from does not take part
        (3, "another lane"),  # two masks for one shuffle
    ],
)
def test_warp_shuffles(kernels, bug, message):
    x, run = basics(kernels, 1, bug, 128, 128)
    found = outcomes(kernels, run, x.view(4, 32).sum(1).repeat_interleave(32))
    assert_caught(found, message) if bug else assert_right(found)


def test_shuffle_variants(kernels):
    lane = torch.arange(32)
    ballot = sum(1 << i for i in range(0, 32, 3)) % 1024
    expected = [lane // 8 * 8 + 2, (lane - 3).where(lane >= 3, lane), (lane + 3).where(lane % 16 + 3 < 16, lane)]
    expected.append((lane ^ 1) + ballot)
    for which, values in enumerate(expected):
        _, run = basics(kernels, 2, which, 32, 32)
        assert_right(outcomes(kernels, run, values.float()))


def test_atomics_and_a_ragged_block(kernels):
    _, run = basics(kernels, 3, 0, 100, 1)
    assert_right(outcomes(kernels, run, torch.tensor([50.0])))


@pytest.mark.parametrize(("bug", "message"), [(0, "233472 bytes of shared memory"), (1, "block (1025, 1, 1)")])
def test_launch_limits(kernels, bug, message):
    _, run = basics(kernels, 4, bug, 64, 64)
    assert_caught(outcomes(kernels, run, torch.zeros(64)), message)


def test_the_message_names_kernel_and_block(kernels):
    _, run = basics(kernels, 0, 2, 768, 768)
    kernels.configure(b"reversed", b"at_once", 1)
    assert run()[0] == 3  # FF_DEVICE_ERROR
    assert kernels.error().startswith("reverse: emulator: block (2, 0, 0): deadlock")
    assert not kernels.configure(b"sideways", b"at_once", 1)


# ---- Ampere ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gemm_sm80(kernels, dtype):
    found, _ = gemm_sm80(kernels, 0, dtype)
    assert_right(found)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, None),  # copies not waited for
        (2, None),  # the other threads' copies not waited for
        (3, None),  # a stage refilled while it is read
        (4, "without waiting for its cp.async copies"),
    ],
)
def test_gemm_sm80_mistakes(kernels, bug, message):
    found, _ = gemm_sm80(kernels, bug, torch.bfloat16)
    assert_caught(found, message)


def gemm_sm80(kernels, bug, dtype):
    m, n, k = 64, 128, 128
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)

    def run():
        c = torch.full((m, n), float("nan"))
        arguments = bug, dtype == torch.bfloat16, a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k
        return kernels.run_gemm_sm80(*arguments), c

    return outcomes(kernels, run, a.float() @ b.float()), run


# ---- Hopper ----------------------------------------------------------------------------------------------------------


def gemm_sm90(kernels, bug, m=64, n=64, k=320):
    torch.manual_seed(0)
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()

    def run():
        c = torch.full((m, n), float("nan"))
        return kernels.run_gemm_sm90(bug, a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k), c

    return outcomes(kernels, run, a.float() @ b.float().T)


@pytest.mark.parametrize(
    "sizes",
    [
        (64, 64, 320),  # more steps than stages: every barrier goes through several phases
        (100, 70, 72),  # rows and columns beyond the tensor: zeros come in, nothing goes out
    ],
    ids=str,
)
def test_gemm_sm90(kernels, sizes):
    assert_right(gemm_sm90(kernels, 0, *sizes))
    assert kernels.late_operations() > 0  # the last mode did put operations off


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, None),  # a stage read before it is full
        (2, None),  # a stage released before the products have read it
        (3, None),  # accumulators read before the products are done
        (4, "wait at an mbarrier"),  # an arrival expected that never comes
        (5, None),  # half the bytes announced
        (6, "without a wgmma_fence"),
        (7, None),  # one warp releases the stage for four
        (8, None),  # a stage refilled while it is read
    ],
)
def test_gemm_sm90_mistakes(kernels, bug, message):
    assert_caught(gemm_sm90(kernels, bug), message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("layout", "n"),
    [
        (layout, n)
        for layout in ("K-K", "K-N", "M-K", "M-N", "registers-K", "registers-N")
        for n in (64, 96, 128, 256)  # 96: a panel and a half
        if n <= 128 or layout[0] != "r"
    ],
)
def test_wgmma_layouts(kernels, layout, n, dtype):
    index = ["K-K", "K-N", "M-K", "M-N", "registers-K", "registers-N"].index(layout)
    torch.manual_seed(0)
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, n).to(dtype)
    a_given = a.T.contiguous() if layout.startswith("M") else a
    b_given = b if layout.endswith("N") else b.T.contiguous()
    d = torch.full((64, n), float("nan"))
    kernels.configure(b"shuffled", b"late", 1)
    arguments = index, dtype == torch.bfloat16, n, a_given.data_ptr(), b_given.data_ptr(), d.data_ptr()
    assert kernels.run_product(*arguments) == 0, kernels.error()
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (0, None),
        (1, None),  # shared memory overwritten before the copy has read it
        (2, "without waiting for its bulk copies"),
        (3, None),  # no barrier between the warp that writes and the one that stores
    ],
)
def test_bulk_store_and_reduction(kernels, bug, message):
    rows = 20  # the last box reaches beyond the tensor
    torch.manual_seed(0)
    x = torch.randn(24, 64).bfloat16()

    def run():
        y = torch.full((rows + 4, 64), -1.0).bfloat16()
        sums = torch.zeros(64)
        status = kernels.run_bulk(bug, x.data_ptr(), y.data_ptr(), sums.data_ptr(), rows)
        return status, torch.cat([y.float(), sums[None]])

    expected = torch.cat([x[:rows].float(), torch.full((4, 64), -1.0), torch.full((1, 64), 3.0)])
    found = outcomes(kernels, run, expected)
    assert_caught(found, message) if bug else assert_right(found)


# ---- clusters --------------------------------------------------------------------------------------------------------


def clusters(kernels, kernel, bug, cluster, blocks=None):
    blocks = blocks or 2 * cluster
    x = torch.arange(32 * blocks, dtype=torch.float32)

    def run():
        y = torch.full((32 * blocks,), float("nan"))
        return kernels.run_cluster(kernel, bug, cluster, blocks, x.data_ptr(), y.data_ptr()), y

    return x, run


@pytest.mark.parametrize("cluster", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", ["pushed", "pulled"])
def test_clusters(kernels, kernel, cluster):
    x, run = clusters(kernels, kernel == "pulled", 0, cluster)
    if kernel == "pushed":
        expected = x.view(2, -1).sum(1).repeat_interleave(32 * cluster)
    else:
        expected = x.view(2, cluster, 32).roll(-1, 1).reshape(-1)
    assert_right(outcomes(kernels, run, expected))


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, "which has not started"),
        (2, "wrong"),  # a buffer written again while another block reads it
        (3, "wrong"),  # no barrier
        (4, "twice without waiting"),
    ],
)
def test_mistakes_in_pushing(kernels, bug, message):
    x, run = clusters(kernels, 0, bug, 4)
    assert_caught(outcomes(kernels, run, x.view(2, -1).sum(1).repeat_interleave(128)), message)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, "of the cluster, which has ended"),  # shared memory is gone with its block
        (2, "block 4 of a cluster of 4"),
        (3, "without having arrived"),
    ],
)
def test_mistakes_in_pulling(kernels, bug, message):
    x, run = clusters(kernels, 1, bug, 4)
    assert_caught(outcomes(kernels, run, x.view(2, 4, 32).roll(-1, 1).reshape(-1)), message)


def test_a_cluster_does_not_wait_for_threads_that_have_ended(kernels):
    x, run = clusters(kernels, 2, 0, 4)
    assert_right(outcomes(kernels, run, x))
    x, run = clusters(kernels, 2, 1, 4)
    assert_caught(
        outcomes(kernels, run, x), "31 threads wait at __syncthreads (first: thread 1 of block 0 of the cluster)"
    )


def test_cluster_launch_limits(kernels):
    """16 blocks need a kernel that allows them, which launch_clusters sees to."""
    x, run = clusters(kernels, 1, 0, 16)
    assert_right(outcomes(kernels, run, x.view(2, 16, 32).roll(-1, 1).reshape(-1)))
    for cluster, blocks in ((4, 6), (17, 17)):
        x, run = clusters(kernels, 1, 0, cluster, blocks)
        message = f"clusters of {cluster} blocks (at most 16) in a grid of ({blocks}, 1, 1)"
        assert_caught(outcomes(kernels, run, x), message)


# ---- the same files for a GPU ----------------------------------------------------------------------------------------


@pytest.mark.skipif(resources.find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("name", "arch"), [("gemm_sm80", "80"), ("gemm_sm90", "90a"), ("sm90_pieces", "90a"), ("cluster", "90a")]
)
def test_primitives_assemble(name, arch):
    """The PTX of every primitive is valid and none of the products is serialised."""
    assert not resources.problems(resources.compile_kernels(KERNELS / f"{name}.cu", [arch]))


# ---- the pieces ------------------------------------------------------------------------------------------------------


def test_a_stack_switch_without_assembler(tmp_path):
    """The portable fibers (ucontext) give the same results."""
    library = Kernels(flags="-DFF_EMULATION_UCONTEXT", files=("basics.cu",))
    x, run = basics(library, 0, 0, 768, 768)
    assert_right(outcomes(library, run, x.view(3, 256).flip(1).reshape(-1)))


def test_argument_types_are_declared():
    """ctypes would pass a pointer as a 32-bit int where it is not told otherwise."""
    assert Kernels().run_bulk.argtypes[1] is ctypes.c_void_p
