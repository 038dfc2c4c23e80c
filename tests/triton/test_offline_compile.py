"""Every kernel compiles for sm_80 and sm_90 without a GPU, spills no register and has its matrix instructions.

Here a sample is compiled, which touches every kernel and each kind of tile; `python -m fastformer.backends.triton.aot`
compiles all of them, which takes an hour, and fails in the same cases. pytest's ``-rP`` shows the tables.
"""

import dataclasses

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from fastformer.backends.triton import aot, attention_builds, interpreting, layer_norm
from fastformer.backends.triton.attention_tiles import TILES, Tile

pytestmark = pytest.mark.skipif(
    interpreting(), reason="Triton runs its interpreter in this process, which cannot compile (unset TRITON_INTERPRET)"
)

# What is compiled by default: for each operation, a regular expression over the labels.
SAMPLE = {
    # short rows in tiles, the longest row in one block, chunks; both passes of the parameter gradients
    "layer_norm": r"^layer_norm (forward_rows (bf16 1024|fp32 16384)|backward_rows (bf16 256$|fp32 8192)|"
    r"(\w+_chunks|backward_parameters) bf16 262144$)",
    "add_layer_norm": r"^add_layer_norm\+dropout \w+_(rows bf16 1024|chunks fp32)",
    "rms_norm": r"^rms_norm (forward_rows fp32 16384|backward_rows (bf16 256$|fp32 8192)|"
    r"(\w+_chunks|backward_parameters) bf16 262144$)",
    "add_rms_norm": r"^add_rms_norm\+dropout \w+_(rows bf16 1024|chunks fp32)",
    # a copy, two tables with dropout, three with everything; both kinds of gradient
    "embedding": r"^embedding (forward (bf16 16384$|fp32 64 of 2\+dropout|bf16 4096 of 3\+norm\+dropout)|"
    r"sum_takers bf16)",
    # both orders of pairs, whole and partly rotated
    "rotary": r"^rotary bf16 D=(128 R=128 halves|80 R=32 interleaved|256 R=256 interleaved)",
    "softmax": r"^softmax (forward_rows bf16 32768$|backward_rows fp32 16384$)|^log_softmax \w+_chunks bf16 262144$|"
    r"^log_softmax (forward|backward)_rows bf16 16384\+mask$",
    "cross_entropy": r"^cross_entropy \w+ (bf16 262144 (weight\+smoothing|gradient|probabilities)$|fp32 512$|"
    r"bf16 32 weight.* of 1|fp32 2048 probabilities$)",
    "linear_cross_entropy": r"^linear_cross_entropy forward bf16 262144 gradient$",
    # a row in blocks, all parts at once
    "activation": r"^activation (forward bf16 262144 gelu\+bias$|backward bf16 1024 (gelu_tanh\+bias|silu\+gate)$|"
    r"backward fp32 262144 gelu\+bias\+gate)",
    # the head size of most models, and one between powers of two; a T5 encoder in training; every kind of feature;
    # float32, which has to be sliced
    "attention": r"^attention (\w+ bf16 D=64 (causal|key_padding_mask\+relative_bias\+dropout)$|"
    r"forward bf16 D=80 causal\+key_padding_mask$|"
    r"backward_bias bf16 D=128 key_padding_mask\+bias\+dropout$|backward_k fp32 D=128 causal$|"
    r"(forward bf16 D=128 causal\+softcap\+window|backward_k bf16 D=128 causal\+dropout\+varlen)$)",
    "decode_attention": r"^decode_attention (bf16 D=64 rows=(16|64)(\+everything)?|merge bf16 D=64 of 2)$",
    "linear_activation": r"^linear_activation \w+ bf16 (gelu\+bias|silu\+gate)$",
    "column_sum": r"^column_sum bf16 x2$",
}


def check_table(builds: list[aot.Build]) -> None:
    """Prints the table; fails where a build has a problem or a GPU generation is missing."""
    print(aot.header(), *(aot.row(build) for build in builds), sep="\n")
    assert {build.capability for build in builds} == set(aot.CAPABILITIES)
    assert not [f"{build.label} sm_{build.capability}: {build.problem}" for build in builds if build.problem]


# In this process: starting others takes as long as several kernels, and pytest-xdist's workers share the operations.
@pytest.mark.parametrize("op", SAMPLE)
def test_sample_compiles_without_spills(op):
    check_table(list(aot.compile_all([op], select=SAMPLE[op])))


def test_every_operation_is_sampled():
    assert set(SAMPLE) == set(aot.KERNEL_FILES)


def test_hopper_attention_uses_its_own_matrix_instruction():
    tile = TILES[90][2, 64, "plain"].forward
    build = aot.compile_one(attention_builds.configuration("forward", 90, "bf16", 64, ("causal",), tile), 90)
    assert build.matrix == "HGMMA"


# ---- the checks can fail ---------------------------------------------------------------------------------------------


def one_block_row():
    return next(c for c in layer_norm.configurations() if c.label == "layer_norm forward_rows fp32 8192")


def test_a_planted_spill_is_found():
    # 32 values per thread and their sums do not fit into the 24 registers it is told to use.
    build = aot.compile_one(dataclasses.replace(one_block_row(), options={"maxnreg": 24}), 80)
    assert build.spills > 0 and "spills" in build.problem


def test_missing_matrix_instructions_are_found():
    build = aot.compile_one(dataclasses.replace(one_block_row(), tensor_cores=True), 80)
    assert build.problem == "has no matrix instructions"


def test_too_much_shared_memory_is_found():
    tile = Tile(128, 128, 8, 3)  # fits on an H100; an RTX 4090 has 99 KiB
    build = aot.compile_one(attention_builds.configuration("forward", 80, "bf16", 128, (), tile), 80)
    assert "shared memory" in build.problem or "spills" in build.problem
    assert build.shared > aot.SHARED_LIMIT[80]


def test_a_kernel_that_does_not_compile_is_found():
    constants = {**one_block_row().constants, "BLOCK_COLS": 100}  # not a power of two
    build = aot.compile_one(dataclasses.replace(one_block_row(), constants=constants), 90)
    assert "does not compile" in build.problem


def test_command_line_fails_when_nothing_matches(capsys):
    assert aot.main(["--op", "activation", "--select", "no such label"]) == 1
    assert "0 builds" in capsys.readouterr().out
