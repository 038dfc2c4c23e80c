"""Lets pytest collect the benchmark files: one test per case, timed by pytest-benchmark, all providers taking turns.

    python -m pytest benchmarks/layer_norm.py --benchmark-only

pytest-benchmark's own table then shows our times; the comparison with the others is printed before it. ``run.py`` is
the same session with the machine's limits measured first and the results written down."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks import runner
from benchmarks.recorder import PLUGIN, Recorder


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin(PLUGIN):
        config.pluginmanager.register(Recorder(), PLUGIN)


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> list[pytest.Item] | None:
    """``CASES`` in a benchmark file becomes one test per case."""
    module = getattr(collector, "obj", None)
    if name != "CASES" or not isinstance(module, ModuleType) or _op(module) not in runner.OPS:
        return None
    recorder = collector.config.pluginmanager.get_plugin(PLUGIN)
    cases = obj["quick"] if recorder.quick else obj[recorder.device]
    return [
        pytest.Function.from_parent(
            collector, name=f"test_speed[{case.id}]", originalname="test_speed", callobj=_test(module, case, recorder)
        )
        for case in cases
    ]


def _op(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _test(module: ModuleType, case: runner.Case, recorder: Recorder):
    op, device, results = _op(module), recorder.device, recorder.results

    def test_speed(benchmark) -> None:
        recorder.begin(op, case)
        try:
            if recorder.left() <= 0:
                results.skip(op, case, "no time left in this run")
                pytest.skip("no time left in this run")
            ready = runner.prepare(module, case, device, limit=recorder.left())
            cost, how = module.cost(case), (recorder.seconds, recorder.quick)
            rows = lambda timings: runner.rows(op, case, timings, cost, results.ceilings, results.id)  # noqa: E731

            def progress(timings: dict[str, runner.Timing]) -> None:
                results.unfinished = rows(timings)
                recorder.end()

            timings = runner.measure(ready.calls, device, benchmark, *how, ready.missing, progress)
            results.add(op, case, rows(timings), ready.missing, ready.wrong)
        except Exception as error:
            results.fail(op, case, error)
            raise
        finally:
            recorder.end()
            runner.release(case, device)
        if "ours" in ready.wrong:
            pytest.fail(f"{op} {case.id}: {ready.wrong['ours']}")

    return test_speed
