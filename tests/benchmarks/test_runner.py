"""The benchmark runner with fake providers: turns, medians, compared results, goals, tables and the merged JSON."""

import json
import re
import signal
import struct
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import charts, goals, machine, report, runner
from benchmarks.goals import GOALS, Goal
from benchmarks.recorder import Recorder
from benchmarks.runner import Case, Cost, Problem, Timing, Unavailable, incomparable, timed

CASE = Case((8, 16), "float32")


class FakeBenchmark:
    """Stands in for pytest-benchmark's fixture: a round lasts what its call says."""

    def __init__(self):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        self.extra_info = {}
        self.timed = []

    def pedantic(self, target, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            (call, repeats), _ = setup()
            target(call, repeats)
            self.timed.append((call.name, repeats))
            self.stats.stats.data.append(repeats * next(call.durations))


class FakeCall:
    def __init__(self, name, durations):
        self.name, self.durations, self.calls = name, iter(durations), 0

    def __call__(self):
        self.calls += 1


def fake_module(**providers):
    return SimpleNamespace(
        setup=lambda case, device: Problem(device, (torch.arange(8.0).to(case.torch_dtype),)),
        PROVIDERS=providers,
        cost=lambda case: Cost(bytes=64),
    )


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_providers_take_turns_and_medians_are_theirs(monkeypatch):
    monkeypatch.setattr(runner, "_estimate", lambda call, device: 1.0)
    ours, eager = FakeCall("ours", [3.0, 1.0, 2.0]), FakeCall("eager", [4.0, 9.0, 6.0])
    benchmark = FakeBenchmark()
    timings = runner.measure({"ours": ours, "eager": eager}, "cpu", benchmark, seconds=0.1, quick=False)
    # Each round times everyone once, and a different one begins.
    assert [name for name, _ in benchmark.timed] == ["ours", "eager", "eager", "ours", "ours", "eager"]
    assert timings["ours"].median == 2.0 and timings["ours"].minimum == 1.0 and timings["ours"].rounds == 3
    assert timings["eager"].median == 6.0
    assert ours.calls == 6, "every timed round follows one untimed call"
    assert benchmark.stats.stats.data == [3.0, 1.0, 2.0], "pytest-benchmark's own statistics are of the first provider"
    assert benchmark.extra_info["medians"] == {"ours": 2.0, "eager": 6.0}


def test_short_calls_are_repeated_within_a_round(monkeypatch):
    monkeypatch.setattr(runner, "_estimate", lambda call, device: {"ours": 1e-5, "eager": 1.0}[call.name])
    ours, eager = FakeCall("ours", [1e-5] * 99), FakeCall("eager", [1.0] * 99)
    benchmark = FakeBenchmark()
    timings = runner.measure({"ours": ours, "eager": eager}, "cpu", benchmark, seconds=0.1, quick=False)
    assert timings["ours"].repeats == 200 and timings["eager"].repeats == 1
    assert ("ours", 200) in benchmark.timed
    assert timings["ours"].median == pytest.approx(1e-5), "the time of one call, not of the round"


def test_calls_of_seconds_have_three_rounds_and_are_kept_after_each(monkeypatch):
    monkeypatch.setattr(runner, "_estimate", lambda call, device: {"ours": 0.1, "eager": 7.0}[call.name])
    ours, eager = FakeCall("ours", [3.0, 1.0, 2.0]), FakeCall("eager", [7.0, 9.0, 8.0])
    kept = []
    timings = runner.measure(
        {"ours": ours, "eager": eager}, "cpu", FakeBenchmark(), seconds=60.0, quick=False, progress=kept.append
    )
    assert ours.calls == eager.calls == 3, "no untimed calls"
    assert timings["eager"].median == 8.0 and timings["eager"].rounds == 3
    assert [t["eager"].rounds for t in kept] == [1, 2] and [t["eager"].median for t in kept] == [7.0, 8.0]


def test_a_call_too_long_for_its_rounds_is_left_out(monkeypatch):
    monkeypatch.setattr(runner, "_estimate", lambda call, device: {"ours": 1.0, "eager": 150.0}[call.name])
    missing = {}
    timings = runner.measure(
        {"ours": FakeCall("ours", [1.0] * 9), "eager": FakeCall("eager", [])},
        "cpu",
        FakeBenchmark(),
        0.1,
        False,
        missing,
    )
    assert set(timings) == {"ours"} and missing == {"eager": "3 calls take more than 300 s"}
    assert runner.measure({"eager": FakeCall("eager", [])}, "cpu", FakeBenchmark(), 0.1, False, missing) == {}


def forever(case, problem):
    while True:  # as a compiler that does not end, deaf to ordinary exceptions
        try:
            time.sleep(0.01)
        except Exception:
            continue


def test_a_provider_that_does_not_end_costs_only_itself(monkeypatch):
    monkeypatch.setattr(runner, "CAP_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    fine = timed(lambda case: lambda x: x)
    ready = runner.prepare(fake_module(ours=fine, compile=forever, eager=fine), CASE, "cpu")
    assert set(ready.calls) == {"ours", "eager"}
    assert "did not end within" in ready.missing["compile"]
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_case_ends_with_its_operations_time():
    fine = timed(lambda case: lambda x: x)
    ready = runner.prepare(fake_module(ours=fine, compile=forever, eager=fine), CASE, "cpu", limit=0.3)
    assert set(ready.calls) == {"ours"}
    assert "did not end within" in ready.missing["compile"] and ready.missing["eager"] == "no time left in this run"


def test_operations_share_the_time_until_the_deadline(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("benchmarks.recorder.time.perf_counter", lambda: clock.now)
    results = report.Results(ABOUT, CEILINGS, "run.py")
    recorder = Recorder(deadline=90.0, ops=3, results=results)
    recorder.begin("softmax", CASE)
    assert recorder.left() == 30
    clock.now = 10.0
    recorder.begin("softmax", CASE)
    assert recorder.left() == 20, "one operation, one share"
    recorder.begin("layer_norm", CASE)
    assert recorder.left() == 40, "half of what is left"
    clock.now = 60.0
    assert recorder.left() < 0
    recorder.begin("rms_norm", CASE)
    assert recorder.left() == 30
    assert Recorder(results=results).left() == float("inf")


def test_peers_that_would_take_minutes_are_not_tried(monkeypatch):
    # 32 times the flops of a case in which eager takes 8 seconds.
    monkeypatch.setattr(runner, "_estimate", lambda call, device: 8.0)
    fine = timed(lambda case: lambda x: x)
    module = fake_module(ours=fine, eager=fine, compile=forever)
    module.smaller, module.cost = lambda case, device: Case((2, 2)), lambda case: Cost(flops=case.shape[0] * case.cols)
    ready = runner.prepare(module, Case((8, 16)), "cpu")
    reason = "a call would take about 4 minutes here, going by eager's at 2×2"
    assert set(ready.calls) == {"ours"} and ready.missing == {"eager": reason, "compile": reason}
    module.smaller = lambda case, device: None
    module.PROVIDERS.pop("compile")
    assert set(runner.prepare(module, Case((8, 16)), "cpu").calls) == {"ours", "eager"}


def test_training_steps_of_half_precision_are_estimated_first(monkeypatch):
    from benchmarks import training_step

    monkeypatch.setattr(training_step, "FAST_BF16", False)
    large, single = (training_step.gpt2_case(4, 512, dtype) for dtype in ("bfloat16", "float32"))
    small = training_step.smaller(large, "cpu")
    assert small.shape == (12, 768, 1, 32) and small.options == large.options
    assert [training_step.smaller(c, "cpu") for c in (small, single)] == [None, None]
    assert training_step.smaller(large, "cuda") is None
    monkeypatch.setattr(training_step, "FAST_BF16", True)
    assert training_step.smaller(large, "cpu") is None


def test_spread_is_the_interquartile_range():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0], repeats=1)
    assert (timing.median, timing.minimum, timing.spread) == (3.0, 1.0, pytest.approx(2 / 3))
    assert Timing.of([2.0], repeats=1).spread == 0


def test_clone_moves_the_bytes_it_is_told(monkeypatch):
    cloned = []
    original = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: cloned.append(self.nbytes) or original(self))
    x = torch.zeros(8, 16)  # 512 bytes
    build = runner.clone_of_bytes(lambda case: Cost(bytes=5 * 512))
    build(CASE, Problem("cpu", (x,)))()
    assert cloned == [512, 512, 256], "n bytes cloned are n read and n written"


def test_limit_is_the_slower_of_moving_and_computing():
    ceilings = {"clone": 100.0, "copy": 1000.0, "matmul_float32": 10.0}
    assert Cost(bytes=1000, flops=5).limit_seconds(ceilings, "float32") == (1.0, "bandwidth")
    assert Cost(bytes=1000, flops=50).limit_seconds(ceilings, "float32") == (5.0, "matmul")
    timings = {name: Timing(median, median, 0.0, 5, 1) for name, median in (("ours", 4.0), ("clone", 2.0))}
    ours, _ = runner.rows("softmax", CASE, timings, Cost(bytes=1000), ceilings, "run")
    assert ours["share_of_limit"] == 0.5, "a clone in the same rounds goes before the ceiling"
    (alone,) = runner.rows("softmax", CASE, {"ours": timings["ours"]}, Cost(bytes=1000), ceilings, "run")
    assert alone["share_of_limit"] == 0.25


# ---- results are compared --------------------------------------------------------------------------------------------


def test_a_provider_that_computes_something_else_is_named():
    right = timed(lambda case: lambda x: x * 2)
    wrong = timed(lambda case: lambda x: x * 2.1)
    unlike = incomparable(timed(lambda case: lambda x: x.new_zeros(3)))
    ready = runner.prepare(fake_module(ours=wrong, eager=right, compile=right, clone=unlike), CASE, "cpu")
    assert set(ready.wrong) == {"ours"} and "from eager's" in ready.wrong["ours"]
    assert set(ready.calls) == {"ours", "eager", "compile", "clone"}


def test_low_precision_is_compared_with_eager_in_float32():
    # Eager in bfloat16 is 30% off here; ours is right, and must not be called wrong for it.
    eager = timed(lambda case: lambda x: x * (2 if x.dtype == torch.float32 else 2.6))
    right = timed(lambda case: lambda x: x * 2)
    ready = runner.prepare(fake_module(ours=right, eager=eager), Case((8,), "bfloat16"), "cpu")
    assert set(ready.wrong) == {"eager"}


def test_nan_is_wrong():
    ready = runner.prepare(
        fake_module(ours=timed(lambda c: lambda x: x * float("nan")), eager=timed(lambda c: lambda x: x)), CASE, "cpu"
    )
    assert "ours" in ready.wrong


def test_backward_differentiates_every_output():
    x = torch.ones(3, requires_grad=True)
    problem = Problem("cpu", (x,), wrt=(x,), douts=(torch.ones(3), torch.full((3,), 10.0)))
    build = timed(lambda case: lambda x: (2 * x, 3 * x))
    (gradient,) = build(Case((3,), backward=True), problem)()
    assert gradient.tolist() == [32.0] * 3


def test_peers_may_fail_and_be_absent_but_ours_may_not():
    def broken(case, problem):
        raise RuntimeError("no kernel image\nfor this device")

    def absent(case, problem):
        raise Unavailable("not installed")

    fine = timed(lambda case: lambda x: x)
    ready = runner.prepare(fake_module(ours=fine, eager=fine, liger=absent, flash=broken), CASE, "cpu")
    assert ready.missing == {"liger": "not installed", "flash": "failed: RuntimeError: no kernel image"}
    with pytest.raises(RuntimeError, match="no kernel image"):
        runner.prepare(fake_module(ours=broken, eager=fine), CASE, "cpu")


# ---- goals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "ours", "times", "share", "met", "measured"),
    [
        (Goal("softmax", "eager", speedup=2.0), 1.0, {"eager": 2.0}, None, True, "2.00×"),
        (Goal("softmax", "eager", speedup=2.0), 1.0, {"eager": 1.9}, None, False, "1.90×"),
        (Goal("softmax", "clone", speedup=1 / 1.2), 1.19, {"clone": 1.0}, None, True, "1.19×"),
        (Goal("softmax", "clone", speedup=1 / 1.2), 1.3, {"clone": 1.0}, None, False, "1.30×"),
        (
            Goal("softmax", "best", speedup=1.0, peers=("flash", "cudnn")),
            1.0,
            {"flash": 2.0, "cudnn": 0.9},
            None,
            False,
            "0.90×",
        ),
        (Goal("softmax", "bare", extra_us=3.0), 4e-6, {"bare": 2e-6}, None, True, "+2.0 µs"),
        (Goal("softmax", "bare", extra_us=3.0), 6e-6, {"bare": 2e-6}, None, False, "+4.0 µs"),
        (Goal("softmax", limit=0.9), 1.0, {}, 0.91, True, "91%"),
        (Goal("softmax", limit=0.9), 1.0, {}, 0.5, False, "50%"),
    ],
)
def test_verdicts(goal, ours, times, share, met, measured):
    verdict = goal.judge(ours, times, share)
    assert (verdict.met, verdict.measured) == (met, measured)
    assert goal.text() in verdict.text()


def test_a_goal_without_its_peer_is_not_judged():
    assert Goal("softmax", "compile", speedup=1.0).judge(1.0, {"eager": 1.0}, None) is None
    assert Goal("softmax", limit=0.9).judge(1.0, {}, None) is None
    assert goals.verdicts("layer_norm", "cpu", CASE, {"eager": 1.0}, None) == [], "and none without our own time"


def test_a_rate_is_items_over_our_time():
    case = Case((16, 1024), "int64", False, "windows")
    for seconds, met in ((0.008, True), (0.009, False)):
        (verdict,) = goals.verdicts("data_loading", "cpu", case, {"ours": seconds}, None, items=16 * 1024)
        assert verdict.met is met and verdict.goal.text() == "≥ 2,000,000 tokens/s"
        assert verdict.measured == f"{16384 / seconds:,.0f}"


def _full_cases(device):
    for op in runner.OPS:
        module = getattr(__import__(f"benchmarks.{op}"), op)
        yield from ((op, case, module) for case in module.CASES[device])


@pytest.mark.parametrize("goal", GOALS, ids=lambda g: f"{g.op}-{g.device}-{g.text()}".replace(" ", "_"))
def test_every_goal_is_about_a_case_and_a_provider_there_is(goal):
    found = [(case, module) for op, case, module in _full_cases(goal.device) if goal.applies(op, goal.device, case)]
    assert found, "no case is judged by this goal"
    assert sum(map(bool, (goal.speedup, goal.extra_us, goal.limit, goal.rate))) == 1
    if not (goal.limit or goal.rate):
        assert set(goal.peers or (goal.peer,)) <= set(found[0][1].PROVIDERS)


@pytest.mark.parametrize(
    ("op", "case", "peer", "speedup"),
    [
        ("layer_norm", Case((8192, 1024), "float32", True), "clone", 1 / 1.2),
        ("layer_norm", Case((8192, 1024), "bfloat16", False), "eager", 1.0),
        ("add_layer_norm", Case((8192, 1024), "bfloat16", True, "dropout 0.1"), "eager", 2.0),
        ("rms_norm", Case((8192, 1024), "bfloat16", True), "clone", 1 / 1.2),
        ("add_rms_norm", Case((8192, 1024), "float32", False), "eager", 2.0),
        ("attention", Case((2, 12, 1024, 64), "float32", False, "causal"), "eager", 1.4),
        ("attention", Case((2, 12, 1024, 64), "bfloat16", False, "causal"), "eager", 2.0),
        ("training_step", Case((4, 128, 16, 128), "float32", True, "the demo's GPT-2"), "eager", 1.2),
        ("generation", Case((4, 128, 1, 112), "float32", False, "the demo's GPT-2"), "eager", 3.0),
    ],
)
def test_the_promised_numbers_are_judged(op, case, peer, speedup):
    assert any(g.applies(op, "cpu", case) and g.peer == peer and g.speedup == speedup for g in GOALS)


# ---- results on disk and on paper ------------------------------------------------------------------------------------

ABOUT = {
    "machine": "test-machine",
    "machine_details": "a test machine",
    "device": "cpu",
    "versions": {"torch": "2.0"},
    "commit": "abc",
    "date": "2024-01-01 00:00:00 UTC",
}
CEILINGS = {"clone": 1e9, "copy": 2e9, "matmul_float32": 1e9}


def results_with(medians, **about):
    op, case = "layer_norm", Case((8192, 1024), "float32")
    results = report.Results({**ABOUT, **about}, CEILINGS, "python run.py")
    timings = {name: Timing(median, median, 0.05, 5, 1) for name, median in medians.items()}
    cost = Cost(bytes=1_000_000)
    results.add(op, case, runner.rows(op, case, timings, cost, CEILINGS, results.id), {"compile": "failed: x"}, {})
    return results


def test_the_same_measurement_replaces_the_older_one(tmp_path):
    results_with({"ours": 2e-3, "eager": 3e-3}).save(tmp_path, chart=False)
    results_with({"ours": 1e-3, "eager": 3e-3}, date="2024-01-02 00:00:00 UTC").save(tmp_path, chart=False)
    stored = json.loads((tmp_path / report.JSON).read_text())
    assert {row["provider"]: row["median_s"] for row in stored["rows"]} == {"ours": 1e-3, "eager": 3e-3}
    assert len(stored["rows"]) == 2 and len(stored["runs"]) == 1, "the older run has no rows left"


@pytest.mark.parametrize("change", [{"commit": "def"}, {"versions": {"torch": "2.1"}}, {"machine": "another"}])
def test_another_commit_version_or_machine_is_another_row(tmp_path, change):
    results_with({"ours": 2e-3}).save(tmp_path, chart=False)
    results_with({"ours": 1e-3}, **change).save(tmp_path, chart=False)
    assert len(json.loads((tmp_path / report.JSON).read_text())["rows"]) == 2


def test_saving_case_by_case_keeps_one_row_each(tmp_path):
    results = results_with({"ours": 1e-3})
    for _ in range(3):
        results.save(tmp_path, chart=False)
    assert len(json.loads((tmp_path / report.JSON).read_text())["rows"]) == 1


def test_rounds_of_a_case_that_was_killed_are_on_disk(tmp_path):
    results = results_with({"ours": 1e-3})
    results.unfinished = [{**results.rows[0], "provider": "eager", "rounds": 1}]
    results.save(tmp_path, chart=False)
    stored = json.loads((tmp_path / report.JSON).read_text())
    assert [(row["provider"], row["rounds"]) for row in stored["rows"]] == [("ours", 5), ("eager", 1)]
    results.fail("layer_norm", CASE, RuntimeError("boom"))
    assert [row["provider"] for row in results.rows] == ["ours", "eager"] and not results.unfinished


def test_a_table_has_rows_of_one_run_only(tmp_path):
    results_with({"ours": 1e-3, "eager": 5e-3}, commit="old").save(tmp_path, chart=False)
    results_with({"ours": 2e-3}, commit="new", date="2024-02-01 00:00:00 UTC").save(tmp_path, chart=False)
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "2 ms" in text and "eager" not in text and "new" in text and "old" not in text


def test_markdown_says_where_and_how(tmp_path):
    results_with({"ours": 1e-3, "eager": 2e-3}).save(tmp_path, chart=False)
    text = (tmp_path / report.MARKDOWN).read_text()
    for part in (
        "test-machine",
        "a test machine",
        "torch 2.0",
        "commit: abc",
        "`python run.py`",
        "2024-01-01",
        "1.0 GB/s",
    ):
        assert part in text


def test_table_shows_ratios_limits_and_goals():
    medians = {"ours": 2e-3, "eager": 3e-3, "clone": 1e-3}
    lines = report.tables(results_with(medians).rows, [], "cpu")
    (line,) = (line for line in lines if "8192×1024" in line)
    assert "2 ms ±5%" in line and "3 ms (1.50×)" in line and "1 ms (0.50×)" in line
    assert "50% bandwidth" in line, "of the clone"
    assert "2.00× ✗ missed" in line and "1.50× ✓" in line
    assert report.goal_lines(results_with(medians).rows, "cpu")[0] == "Goals: 1 met, 1 missed."


def test_failures_are_in_the_table_and_in_broken():
    results = results_with({"eager": 1e-3})
    results.fail("layer_norm", CASE, RuntimeError("boom"))
    assert any("boom" in line for line in report.tables(results.rows, results.run["notes"], "cpu"))
    assert [note["text"] for note in results.broken] == ["RuntimeError: boom"], "a peer's failure is not ours"


def test_tokens_per_second():
    row = {"items": 512, "median_s": 0.5}
    assert report._speed(row) == "1,024 tokens/s"
    assert [report._time(t) for t in (2.0, 0.0123, 4.56e-5, 3e-9)] == ["2 s", "12.3 ms", "45.6 µs", "3 ns"]


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_charts_are_readable_pictures_that_the_results_link(tmp_path):
    pytest.importorskip("matplotlib")
    results = results_with({"ours": 1e-3, "eager": 2e-3, "compile": 3e-3})
    # Thirty cases of one operation, more than any has.
    first, rows = results.rows[:], list(results.rows)
    for n in range(1, 30):
        rows += [{**row, "shape": f"{n}x1024"} for row in first]
    rows += [{**row, "op": "rms_norm", "provider": row["provider"].replace("eager", "clone")} for row in first]
    results.rows = rows
    results.save(tmp_path)
    assert not (tmp_path / charts.FOLDER / "rms_norm.png").exists(), "nothing to compare it with"
    for path in (tmp_path / charts.SUMMARY, tmp_path / charts.FOLDER / "layer_norm.png"):
        width, height = png_size(path)
        assert 300 < width < 2000 and 100 < height < 2000
    text = (tmp_path / report.MARKDOWN).read_text()
    linked = re.findall(r"\]\((.*?)\)", text)
    assert linked == ["results.png", "charts/layer_norm.png"]
    assert all((tmp_path / address).exists() for address in linked)


def test_a_run_draws_the_operations_it_measured(tmp_path):
    pytest.importorskip("matplotlib")
    results_with({"ours": 1e-3, "eager": 2e-3}).save(tmp_path)
    chart = tmp_path / charts.FOLDER / "layer_norm.png"
    chart.write_bytes(b"older")
    stored = json.loads((tmp_path / report.JSON).read_text())
    charts.draw(stored, tmp_path, {"softmax"})
    assert chart.read_bytes() == b"older"
    assert charts.main([str(tmp_path)]) == 0 and png_size(chart)
    assert charts.main([str(tmp_path / "nowhere")]) == 2


def test_committed_charts_are_of_readable_size():
    pictures = sorted((machine.ROOT / "benchmarks" / "results").rglob("*.png"))
    assert pictures and all(max(png_size(path)) < 2000 for path in pictures)


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_run", lambda *command: "")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("FASTFORMER_COMMIT", raising=False)
    (tmp_path / "fastformer").mkdir()
    (tmp_path / "fastformer" / "a.py").write_text("a = 1")
    first = machine.commit()
    (tmp_path / "fastformer" / "a.py").write_text("a = 2")
    assert first.startswith("sources-") and machine.commit() != first, "it identifies the sources"
    (tmp_path / "COMMIT").write_text("0123abc\n")
    assert machine.commit() == "0123abc"
    monkeypatch.setenv("FASTFORMER_COMMIT", "feedbee")
    assert machine.commit() == "feedbee"


def test_ceilings_are_rates():
    limits = machine.ceilings("cpu", quick=True)
    assert set(limits) == {"clone", "copy", "matmul_float32", "matmul_bfloat16"}
    assert all(1e6 < rate < 1e15 for rate in limits.values()), limits


def test_names():
    assert machine._slug("AMD EPYC 7B13 64-Core Processor") == "amd-epyc-7b13-64-core"
    assert machine._slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon"
    assert machine._slug("NVIDIA H200") == "nvidia-h200"
