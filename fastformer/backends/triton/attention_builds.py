"""The attention kernels' builds: what aot.py compiles without a GPU, and tune.py before it measures."""

from __future__ import annotations

from collections.abc import Iterator

from . import attention_backward_kernels, attention_bias_kernels, attention_kernels
from .attention_tiles import TILES, Key, Tile, Tiles, block_dim
from .launch import Configuration

KERNELS = {
    "forward": attention_kernels.forward,
    "backward_q": attention_backward_kernels.backward_q,
    "backward_k": attention_backward_kernels.backward_k,
    "backward_bias": attention_bias_kernels.backward_bias,
    "backward_distance_bias": attention_bias_kernels.backward_distance_bias,
}
assert tuple(KERNELS) == Tiles._fields

# Feature -> the arguments that are not None with it, and what they are ("data": the dtype of q).
_ARGUMENTS = {
    "varlen": {"cu_seqlens_q_ptr": "*i32", "cu_seqlens_k_ptr": "*i32", "total_q": "i32"},
    "key_padding_mask": {"padding_ptr": "*u8", "padding_stride": "i32"},
    "mask": {"mask_ptr": "*u8", "mask_stride_b": "i32", "mask_stride_h": "i32", "mask_stride_q": "i32"},
    "bias": {"bias_ptr": "data", "bias_stride_b": "i32", "bias_stride_h": "i32", "bias_stride_q": "i32"},
    "relative_bias": {"distance_bias_ptr": "*fp32", "max_distance": "i32"},
    "alibi": {"slopes_ptr": "*fp32", "slopes_stride": "i32"},
    "window": {"window_left": "i32", "window_right": "i32"},
    "softcap": {"softcap": "fp32"},
}
_ALIGNED = ("stride", "padded")  # what the names of integers contain that are multiples of 16


def configuration(
    direction: str, sm_family: int, kind: str, head_dim: int, features: tuple[str, ...], tile: Tile
) -> Configuration:
    """One build of the kernel ``direction`` with ``tile``. ``features``: "causal", "dropout" and keys of _ARGUMENTS."""
    kernel = KERNELS[direction]
    data = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "dbias_ptr")
    statistics = ("lse_ptr", "lse_log2_ptr", "delta_ptr", "dlse_ptr", "line_ptr")
    types: dict[str, str | None] = dict.fromkeys(data, f"*{kind}") | dict.fromkeys(statistics, "*fp32")
    types |= {"scale": "fp32", "keep_scale": "fp32", "seed": "u64", "threshold": "u32"}
    for feature, arguments in _ARGUMENTS.items():
        for name, argument in arguments.items():
            types[name] = (f"*{kind}" if argument == "data" else argument) if feature in features else None
    if "causal" in features:
        types["window_right"] = "i32"
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(head_dim),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK": tile.block_k,
        "TOP_LEFT": False,
        "DROPOUT": "dropout" in features,
        "WIDE": False,
        "ROWS": True,
    }
    names = kernel.arg_names
    return Configuration(
        kernel,
        f"attention {direction} {kind} D={head_dim} {'+'.join(features) or 'full'}",
        {name: type for name, type in types.items() if name in names},
        {name: value for name, value in constants.items() if name in names},
        tile.num_warps,
        tile.num_stages,
        capabilities=(sm_family,),
        tensor_cores=kind != "fp32",  # float32 is multiplied exactly, which no matrix instruction does
        unaligned=frozenset(name for name in names if not any(part in name for part in _ALIGNED))
        - {name for name in names if name.endswith("_ptr")},
        above_one=frozenset({"padded"}),  # a whole number of blocks
    )


# What is built for each line of a table, the features that take most last: with a tile that has room for those, smaller
# sets have room, too.
_EVERYTHING = ("causal", "window", "key_padding_mask", "mask", "bias", "relative_bias", "alibi", "softcap", "dropout")
COMBINATIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "plain": ((), ("causal",), ("causal", "key_padding_mask")),
    "window": (
        ("causal", "softcap", "window"),  # Gemma 2
        ("causal", "alibi"),
        ("causal", "window", "alibi", "softcap", "varlen"),
        ("causal", "window", "key_padding_mask", "alibi", "softcap"),
    ),
    "bias": (
        ("causal", "dropout", "varlen"),
        ("bias", "dropout"),
        ("causal", "mask", "bias"),
        ("key_padding_mask", "relative_bias", "dropout"),  # T5's encoder, training
    ),
    "all": (_EVERYTHING,),
}
_BIAS_COMBINATIONS = {
    "backward_bias": (("key_padding_mask", "bias", "dropout"), ("causal", "mask", "bias")),
    "backward_distance_bias": (("key_padding_mask", "relative_bias", "dropout"),),
}


def combinations(direction: str, features: str) -> tuple[tuple[str, ...], ...]:
    """The features with which a kernel is built for lines of the class ``features``; () = not at all."""
    if direction not in _BIAS_COMBINATIONS or features == "all":
        return COMBINATIONS[features]
    return _BIAS_COMBINATIONS[direction] if features == "bias" else ()


def head_dims(dim: int, features: tuple[str, ...]) -> tuple[int, ...]:
    """The head sizes with which a line for ``dim`` is built: ``dim``, and for the most demanding features of a class
    one that is no power of two, which takes comparisons more."""
    demanding = features in [combinations[-1] for combinations in COMBINATIONS.values()]
    return (dim, dim // 8 * 5) if demanding and dim >= 64 else (dim,)


def builds(sm_family: int, key: Key, direction: str, tile: Tile) -> Iterator[Configuration]:
    """What is built of one kernel of one line of a table, if its tile is ``tile``, the most demanding first. For the
    compiler float16 is bfloat16, so that one build of it is enough."""
    itemsize, dim, features = key
    combination = ()
    for combination in reversed(combinations(direction, features)):
        for head_dim in head_dims(dim, combination):
            kind = "fp32" if itemsize == 4 else "bf16"
            yield configuration(direction, sm_family, kind, head_dim, combination, tile)
    if itemsize == 2:
        yield configuration(direction, sm_family, "fp16", dim, combination, tile)


def configurations() -> Iterator[Configuration]:
    """Everything that is built of the tables."""
    for sm_family, table in TILES.items():
        for key, line in table.items():
            for direction, tile in line._asdict().items():
                if tile is not None:
                    yield from builds(sm_family, key, direction, tile)
