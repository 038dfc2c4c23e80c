"""Every kernel of csrc/cuda compiles for sm_80 and sm_90a, keeps its registers and does not serialise wgmma."""

import dataclasses
import os
from pathlib import Path

import pytest

from fastformer.backends.cuda import resources

needs_nvcc = pytest.mark.skipif(resources.find_nvcc() is None, reason="nvcc is not installed")
SOURCES = sorted(resources.CUDA.glob("*.cu"))

# Kernels of each file: forward and backward for (data, parameter) dtypes, one of the ways to cover a row being clusters
# (empty for sm_80); the sum of partial gradients per dtype.
# Attention: 2 dtypes, 4 head dimensions, scores with and without additions; above dimension 128 dk and dv are apart.
EXPECTED = {
    **dict.fromkeys(("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"), (6 + 6) * 5 + 3),
    "softmax": (8 + 5) * 3,  # forward: with and without mask, bias and causal where rows fit in registers
    "activation": 2 * (4 + 1) * 3 + 3,  # each kind in packs, all one by one; the sum of partial gradients
    "rotary": 2 * 2 * 5,
    "embedding": 3 * 3 + 2 * 2 * 3 + 3,  # forward; groups and takers; the sort
    "cross_entropy": 2 * 5 * 3 + 2 * 3 + 3,  # with and without coefficients; backward; scale
    "attention": 0,  # only chooses
    "attention_forward_sm80": 2 * 4 * 2,
    "attention_backward_sm80": 2 * 4 + 2,  # dbias; statistics
    "attention_backward_q_sm80": 2 * 4 * 2 + 1,  # and the sum of partial gradients
    "attention_backward_kv_sm80": 2 * 5 * 2,
    "attention_forward_sm90": 2 * 4 * 2,
    "attention_backward_sm90": 2 * 2 * 2,  # before and after, for two sizes of tiles
    "attention_backward_kv_sm90": 2 * 3 * 2,
    "decode_attention": 2 * 4 + 2,  # and the merge
    "linear_activation_sm90": 2 * 3 * 2 + 2,  # plain, gated, backward, weights either way round; the sum
}


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_fit_in_registers(source):
    kernels = resources.compile_kernels(source)
    resources.BUILD.mkdir(parents=True, exist_ok=True)
    report = resources.BUILD / f"{source.stem}.md"
    report.write_text(resources.table(kernels))
    print(f"\n{resources.table(kernels)}({report})")
    expected = EXPECTED.get(source.stem)
    assert {k.arch for k in kernels} == (set() if expected == 0 else {"sm_80", "sm_90a"})
    if expected is not None:
        assert len(kernels) == expected * 2
    assert not resources.problems(kernels)


SPILLING = """
__global__ void __launch_bounds__(1024) spills(const float* x, float* y, int n) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; i++) v[i] = x[i * n + threadIdx.x];
  for (int r = 0; r < n; r++) {
#pragma unroll
    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i * 7 + 1) % 96] + v[(i * 5 + 3) % 96];
  }
#pragma unroll
  for (int i = 0; i < 96; i++) y[i * n + threadIdx.x] = v[i];
}
"""

# The accumulator of a wgmma is read before the wait: ptxas must serialise.
SERIALISED = """
#include <cstdint>
__global__ void serialised(float* y, uint64_t a, uint64_t b, int n) {
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; i++) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    d[0] *= 2.f;
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = d[i];
}
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "arch", "complaint"),
    [(SPILLING, "80", "spills: "), (SERIALISED, "90a", "serialised its wgmma")],
    ids=["spilling", "serialised"],
)
def test_an_unfit_kernel_is_noticed(code, arch, complaint, tmp_path):
    source = tmp_path / "unfit.cu"
    source.write_text(code)
    (kernel,) = resources.compile_kernels(source, [arch])
    assert [line for line in resources.problems([kernel]) if complaint in line]


LOG = """\
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
insufficient register resources for the wgmma pipeline in the function '_Z3badPf'
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90a'
ptxas info    : Function properties for _Z3badPf
    48 bytes stack frame, 44 bytes spill stores, 88 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


def test_parser():
    good, bad = resources.parse(LOG)
    assert good == resources.Kernel("_Z4goodPf", "sm_80", 32, 0, 0, 1024)
    assert bad == resources.Kernel("_Z3badPf", "sm_90a", 168, 44, 88, 0, serialised=True)
    assert not resources.problems([good])
    assert len(resources.problems([bad])) == 2
    assert "| `_Z3badPf` | sm_90a | 168 | 132 | 0 |" in resources.table([good, bad])


def test_parser_does_not_guess():
    with pytest.raises(ValueError, match="does not say what _Z4goodPf"):
        resources.parse(LOG.replace("spill stores", "spilt"))


def test_a_warning_without_a_name_counts_against_all():
    log = LOG.replace(" in the function '_Z3badPf'", "")
    assert all(k.serialised for k in resources.parse(log))
    assert not any(dataclasses.replace(k, serialised=False).serialised for k in resources.parse(log))


def test_what_the_build_kept_is_read_while_nothing_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "CUDA", tmp_path / "csrc" / "cuda")
    monkeypatch.setattr(resources, "MODULE_BUILD", tmp_path / "build")
    compiled = tmp_path / "build" / "cuda" / "cuda" / "kernel.cu.o"
    for folder in (resources.CUDA, compiled.parent):
        folder.mkdir(parents=True)
    source, header, log = resources.CUDA / "kernel.cu", resources.CUDA / "row.cuh", Path(f"{compiled}.log")
    architectures = "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a"
    flags = "-std=c++17 -O3 --use_fast_math {} -gencode=arch=compute_80,code=compute_80\n"
    source.write_text("")
    header.write_text("")
    assert resources.built_log(source) is None
    compiled.write_text("")
    log.write_text(flags.format(architectures) + LOG)
    for path in (source, header):
        os.utime(path, (0, 0))
    assert resources.built_log(source) == log
    monkeypatch.setattr(resources, "find_nvcc", lambda: None)
    assert [k.registers for k in resources.compile_kernels(source)] == [32, 168]
    os.utime(header, (2**33, 2**33))
    assert resources.built_log(source) is None
    os.utime(header, (0, 0))
    log.write_text(flags.format("-gencode=arch=compute_80,code=sm_80") + LOG)
    assert resources.built_log(source) is None
