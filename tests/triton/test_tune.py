"""The tuner, rehearsed without a GPU: with a clock that makes times up, the off-line compiler for one small case, and
Triton's interpreter for the comparison with the reference."""

import ast
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from triton.runtime.errors import OutOfResources

from fastformer.backends.triton import attention, attention_problems, attention_tiles, interpreting, launch, tune
from fastformer.backends.triton.attention_tiles import TILES, Tile, Tiles

SLOT = tune.Slot(80, (2, 64, "plain"), "forward")
PRESENT, SLOW, FAST, SPILLING = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(128, 64, 8, 2), Tile(128, 128, 4, 3)
SECONDS = {PRESENT: 1.0, SLOW: 2.0, FAST: 0.5, SPILLING: 0.1}


def choose(good, *, wrong=lambda slot, tile: "", seconds=SECONDS):
    return tune.choose(SLOT, PRESENT, good, {}, wrong, lambda slot, tile: seconds[tile])


def test_the_fastest_tile_is_chosen():
    choice = choose([PRESENT, SLOW, FAST])
    assert choice.tile == FAST and (choice.present_seconds, choice.seconds) == (1.0, 0.5)
    assert "64/64/4/2" in tune.row(choice) and "128/64/8/2" in tune.row(choice)


def test_the_present_tile_stays_unless_another_is_clearly_faster():
    assert choose([PRESENT, FAST], seconds={PRESENT: 1.0, FAST: 0.99}).tile == PRESENT


def test_a_spilling_tile_is_never_measured_or_chosen():
    problem = {SPILLING: "spills: 8 local-memory instructions"}.get
    good, refused = tune.compiled(SLOT, [SPILLING, PRESENT, FAST], 12, lambda slot, tile: problem(tile, ""))
    assert good == [PRESENT, FAST] and list(refused) == [SPILLING]
    choice = tune.choose(SLOT, SPILLING, good, refused, lambda slot, tile: "", lambda slot, tile: SECONDS[tile])
    assert choice.tile == FAST and "spills" in tune.row(choice)


def test_a_tile_with_a_wrong_result_is_never_measured_or_chosen():
    measured = []
    choice = tune.choose(
        SLOT,
        PRESENT,
        [PRESENT, FAST, SLOW],
        {},
        lambda slot, tile: "relative error 0.1" if tile == FAST else "",
        lambda slot, tile: measured.append(tile) or SECONDS[tile],
    )
    assert choice.tile == PRESENT and choice.refused == {FAST: "relative error 0.1"} and FAST not in measured


def test_nothing_is_chosen_where_nothing_is_right():
    choice = choose([PRESENT, FAST], wrong=lambda slot, tile: "two runs differ")
    assert choice.tile is None and set(choice.refused) == {PRESENT, FAST}
    assert tune.with_choices(TILES[80], [choice]) == TILES[80]


def test_candidates_are_near_the_present_tile_and_fit_the_kernel():
    tiles = tune.candidates(PRESENT, "forward", 12)
    assert tiles[0] == PRESENT and len(tiles) == len(set(tiles)) == 13
    assert {Tile(128, 64, 4, 2), Tile(64, 128, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)} <= set(tiles[:5])
    square = tune.candidates(Tile(32, 32, 8, 2), "backward_distance_bias", 12)
    assert len(square) == 13 and all(tile.block_q == tile.block_k for tile in square)


# ---- the tables ------------------------------------------------------------------------------------------------------


def lines(text):
    """LINES of a table's file, read without running it, and how its tiles were chosen."""
    module = ast.parse(text)
    assignment = next(node for node in module.body if isinstance(node, ast.AnnAssign))
    return ast.literal_eval(assignment.value), ast.get_docstring(module).split("\n")[2]


@pytest.mark.parametrize("family", TILES)
def test_tables_are_what_the_tuner_writes(family):
    text = tune.table_path(family).read_text()
    assert tune.rendered(TILES[family], family, lines(text)[1]) == text


def test_a_written_table_reads_back():
    changed = tune.with_choices(TILES[90], [choose([PRESENT, FAST])])
    text = tune.rendered(changed, 90, "Chosen on one NVIDIA X, on 2000-01-01.")
    read, source = lines(text)
    assert {key: Tiles(*(Tile(*tile) for tile in line)) for key, line in read.items()} == changed
    assert changed[SLOT.key] == TILES[90][SLOT.key]._replace(forward=FAST) != TILES[90][SLOT.key]
    assert source == "Chosen on one NVIDIA X, on 2000-01-01." and max(map(len, text.splitlines())) <= 120


def test_tables_have_a_tile_for_every_call():
    for table in TILES.values():
        keys = {(size, dim, c) for size in (2, 4) for dim in (16, 32, 64, 128, 256) for c in attention_tiles.CLASSES}
        assert set(table) == keys
        for (_, _, features), tiles in table.items():
            biased = features in ("bias", "all")
            assert (tiles.backward_bias is not None) == (tiles.backward_distance_bias is not None) == biased
            for tile in filter(None, tiles):
                assert tile.block_q >= 16 and tile.block_k >= 32 and tile.block_k % 32 == 0


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ((), "plain"),
        (("causal", "top_left", "key_padding_mask", "grouped_heads", "unaligned"), "plain"),
        (("causal", "window", "softcap", "alibi", "varlen"), "window"),
        (("bias",), "bias"),
        (("dropout",), "bias"),
        (("mask", "bias"), "bias"),
        (("mask", "bias", "dropout"), "all"),
        (("relative_bias", "dropout", "window", "alibi"), "all"),
    ],
)
def test_classes_of_features(features, expected):
    assert attention_tiles.class_of(features) == expected


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "table.py"
    path.write_text("old")
    path.chmod(0o640)
    replace = os.replace

    def watched(source, target):
        assert path.read_text() == "old" and open(source).read() == "new"  # complete before it takes the place
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    tune.replace_file(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tune.replace_file(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# ---- the command -----------------------------------------------------------------------------------------------------

not_interpreted = pytest.mark.skipif(interpreting(), reason="the interpreter cannot compile (unset TRITON_INTERPRET)")


@not_interpreted
def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--op", "attention", "--write"]) == 2
    said = capsys.readouterr()
    assert "no GPU" in said.err and "--compile-only" in said.err and not said.out


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table's file that may be written."""
    path = tmp_path / "table.py"
    monkeypatch.setattr(tune, "table_path", lambda family: path)
    return path


def rehearse(monkeypatch, arguments, **replacements):
    """The command as on a GPU of family 80, up to what needs one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(tune, "capability", lambda device: 86)
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    run = tune.tune
    monkeypatch.setattr(tune, "tune", lambda options: run(options, **replacements))
    return tune.main(["--op", "attention", *arguments])


def everything_compiles(jobs, processes):
    for slot, tiles, most in jobs:
        yield tune.compiled(slot, tiles, most, lambda slot, tile: "")


ONE_ENTRY = ["--itemsize", "2", "--dim", "64", "--features", "plain", "--kernel", "forward"]


def test_rehearsal_writes_the_fastest_tiles(table, monkeypatch, capsys):
    def area(slot, tile):
        return 1 / (tile.block_q * tile.block_k)

    replacements = {"compile_candidates": everything_compiles, "wrong": lambda slot, tile: "", "measure": area}
    assert rehearse(monkeypatch, [*ONE_ENTRY, "--write"], **replacements) == 0
    present = TILES[80][SLOT.key]
    expected = min(tune.candidates(present.forward, "forward", 11), key=lambda tile: area(None, tile))
    read, source = lines(table.read_text())
    written = {key: Tiles(*(Tile(*tile) for tile in line)) for key, line in read.items()}
    assert written == {**TILES[80], SLOT.key: present._replace(forward=expected)} and expected != present.forward
    assert "NVIDIA X" in source and torch.__version__ in source
    assert "1 entries, 1 changed" in capsys.readouterr().out


def test_rehearsal_without_write_leaves_the_table(table, monkeypatch):
    replacements = {
        "compile_candidates": everything_compiles,
        "wrong": lambda slot, tile: "",
        "measure": lambda slot, tile: tile.block_q,
    }
    assert rehearse(monkeypatch, ONE_ENTRY, **replacements) == 0
    assert not table.exists()


def test_rehearsal_fails_where_nothing_is_found(table, monkeypatch, capsys):
    replacements = {"compile_candidates": everything_compiles, "wrong": lambda slot, tile: "two runs differ"}
    assert rehearse(monkeypatch, [*ONE_ENTRY, "--write"], **replacements) == 1
    assert not table.exists() and "1 for which nothing was found" in capsys.readouterr().out


def test_quick_takes_the_commonest_entries(monkeypatch, capsys):
    replacements = {
        "compile_candidates": everything_compiles,
        "wrong": lambda slot, tile: "",
        "measure": lambda slot, tile: 1.0,
    }
    assert rehearse(monkeypatch, ["--quick"], **replacements) == 0
    printed = capsys.readouterr().out
    assert "16 entries, 0 changed" in printed and "32-bit" not in printed and "D=256" not in printed


@not_interpreted
def test_compile_only_replaces_a_tile_that_spills(table, monkeypatch, capsys):
    slot, spilling = tune.Slot(80, (2, 16, "plain"), "backward_q"), Tile(128, 128, 4, 2)
    monkeypatch.setitem(TILES[80], slot.key, TILES[80][slot.key]._replace(backward_q=spilling))
    candidates = tune.candidates
    monkeypatch.setattr(
        tune, "candidates", lambda present, *rest: [t for t in candidates(present, *rest) if t in (present, SLOW)]
    )
    monkeypatch.setattr(tune, "NEARBY", 200)
    arguments = ["--compile-only", "--family", "80", "--itemsize", "2", "--dim", "16", "--features", "plain"]
    assert tune.main(["--op", "attention", *arguments, "--kernel", "backward_q", "--jobs", "1", "--write"]) == 0
    assert lines(table.read_text())[0][slot.key][1] == SLOW
    assert "the present tile: spills" in capsys.readouterr().out


# ---- the comparison with the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "itemsize", "features"),
    [
        ("forward", 4, "all"),
        ("backward_q", 4, "window"),
        ("backward_k", 2, "plain"),
        ("backward_bias", 4, "all"),
        ("backward_distance_bias", 2, "bias"),
    ],
)
def test_right_results_are_accepted(kernel, itemsize, features, device):
    family, key, tile = attention_tiles.family(launch.capability(device)), (itemsize, 16, features), Tile(32, 32, 4, 1)
    assert attention_problems.wrong(family, key, kernel, tile, device) == ""


@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_k"])
def test_wrong_results_are_refused(kernel, device, monkeypatch):
    family, key = attention_tiles.family(launch.capability(device)), (4, 16, "plain")
    present, launched = TILES[family][key], []

    def a_little_off(function, grid, device, *args, **options):
        launched.append((function.__name__, options["BLOCK_Q"], options["BLOCK_K"]))
        args = [arg * 1.001 if name == "scale" else arg for name, arg in zip(function.arg_names, args)]
        launch.launch(function, grid, device, *args, **options)

    monkeypatch.setattr(attention, "launch", a_little_off)
    assert "relative error" in attention_problems.wrong(family, key, kernel, Tile(16, 32, 4, 1), device)
    assert (kernel, 16, 32) in launched and TILES[family][key] == present


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_key_of_many_counts(dtype):
    # What tells a block that was left out from rounding, on the sequences that the comparison uses.
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 2 * 128 + 17, 64, generator=generator, dtype=torch.float64)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    without = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:])
    allowed = attention_problems.ROUNDINGS[2] * torch.finfo(dtype).eps
    assert attention_problems.difference(exact.to(dtype).double(), exact, allowed) == ""
    assert attention_problems.difference(without, exact, allowed)
    changed = exact.clone()
    changed[0, 0, 0, 0] += 1
    assert "one element" in attention_problems.difference(changed, exact, 0.05)


def test_results_that_do_not_repeat_are_refused(device, monkeypatch):
    family, key = attention_tiles.family(launch.capability(device)), (4, 16, "plain")
    runs = []
    forward = attention.forward

    def drifting(q, k, v, options):
        runs.append(None)
        out, lse = forward(q, k, v, options)
        return out + 1e-7 * len(runs), lse

    monkeypatch.setattr(attention, "forward", drifting)
    assert "two runs differ" in attention_problems.wrong(family, key, "forward", Tile(32, 32, 4, 1), device)


def test_a_tile_that_this_gpu_has_no_room_for_is_refused(device, monkeypatch):
    def no_room(*args):
        raise OutOfResources(200_000, 101_376, "shared memory")

    monkeypatch.setattr(attention, "forward", no_room)
    family = attention_tiles.family(launch.capability(device))
    reason = attention_problems.wrong(family, (4, 16, "plain"), "forward", Tile(32, 32, 4, 1), device)
    assert "out of resource: shared memory" in reason
