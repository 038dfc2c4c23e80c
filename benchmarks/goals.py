"""What each operation has to reach, as data. A goal compares our median with a peer's from the same rounds, or with the
limit of the machine measured at the start of the same run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """One requirement on every case of ``op`` whose fields match ``where``. Exactly one of ``speedup``,
    ``extra_us``, ``limit`` and ``rate`` is set.

    Attributes:
        peer: the provider compared with (for ``speedup`` and ``extra_us``); "best" is the fastest of ``peers``.
        speedup: peer's time / our time, at least. Below 1 it allows us that much longer: 1 / 1.2 is "within 1.2x".
        extra_us: our time − peer's time in microseconds, at most.
        limit: share of the measured bandwidth or matmul rate, at least.
        rate: items per second, at least.
    """

    op: str
    peer: str = ""
    speedup: float = 0.0
    extra_us: float = 0.0
    limit: float = 0.0
    device: str = "cpu"
    where: dict[str, object] = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    rate: float = 0.0

    def applies(self, op: str, device: str, case: object) -> bool:
        """Whether this goal is about ``case`` (anything with the attributes named in ``where``)."""
        if op != self.op or device != self.device:
            return False
        return all(_matches(getattr(case, name), wanted) for name, wanted in self.where.items())

    def text(self) -> str:
        """The goal in a few characters, such as "≤ 1.20× clone" (times) or "≥ 2.00× eager" (speed)."""
        if self.rate:
            return f"≥ {self.rate:,.0f} tokens/s"
        if self.limit:
            return f"≥ {self.limit:.0%} of the limit"
        if self.extra_us:
            return f"≤ {self.peer} + {self.extra_us:g} µs"
        if self.speedup < 1:
            return f"≤ {1 / self.speedup:.2f}× {self.peer}'s time"
        return f"≥ {self.speedup:.2f}× {self.peer}'s speed"

    def judge(self, ours: float, times: dict[str, float], share: float | None, items: int = 0) -> Verdict | None:
        """The verdict on our median ``ours`` (seconds); None where the peer or the limit was not measured.

        Args:
            times: median seconds by provider.
            share: fraction of the machine's limit we reached.
            items: what the case handles in that time.
        """
        if self.rate:
            return Verdict(self, items / ours >= self.rate, f"{items / ours:,.0f}")
        if self.limit:
            return None if share is None else Verdict(self, share >= self.limit, f"{share:.0%}")
        candidates = [times[name] for name in (self.peers or (self.peer,)) if name in times]
        if not candidates:
            return None
        peer = min(candidates)
        if self.extra_us:
            extra = (ours - peer) * 1e6
            return Verdict(self, extra <= self.extra_us, f"+{extra:.1f} µs")
        ratio = peer / ours
        return Verdict(self, ratio >= self.speedup, f"{1 / ratio if self.speedup < 1 else ratio:.2f}×")


@dataclass(frozen=True)
class Verdict:
    """Whether one goal is met in one case, and the number that decided it."""

    goal: Goal
    met: bool
    measured: str

    def text(self) -> str:
        return f"{self.goal.text()}: {self.measured} {'✓' if self.met else '✗ missed'}"


def _matches(value: object, wanted: object) -> bool:
    return wanted(value) if callable(wanted) else value == wanted


WITHIN_A_FIFTH = 1 / 1.2
SDPA = ("flash", "cudnn", "efficient", "math", "eager")
ROWS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "softmax", "cross_entropy")
MAIN_ROWS: dict[str, object] = {"shape": (8192, 1024)}
SWEEP = "sweep"  # of benchmarks/rows.py
THE_DEMO: dict[str, object] = {"variant": "the demo's GPT-2"}
GPT2_BF16: dict[str, object] = {"variant": "GPT-2 124M", "dtype": "bfloat16"}
NOT_THE_SWEEP: dict[str, object] = {"variant": lambda text: text != SWEEP}

GOALS: tuple[Goal, ...] = (
    # Row operations: bound by memory, so beside a copy of as many bytes; and never slower than what they replace.
    Goal("layer_norm", "clone", speedup=WITHIN_A_FIFTH, where=MAIN_ROWS),
    Goal("layer_norm", "eager", speedup=1.0, where=MAIN_ROWS),
    Goal("add_layer_norm", "eager", speedup=2.0, where=MAIN_ROWS),
    Goal("rms_norm", "clone", speedup=WITHIN_A_FIFTH, where=MAIN_ROWS),
    Goal("rms_norm", "eager", speedup=1.0, where=MAIN_ROWS),
    Goal("add_rms_norm", "eager", speedup=2.0, where=MAIN_ROWS),
    Goal("softmax", "clone", speedup=WITHIN_A_FIFTH, where=MAIN_ROWS),
    Goal("softmax", "eager", speedup=1.0, where=NOT_THE_SWEEP),
    Goal("activation", "clone", speedup=WITHIN_A_FIFTH, where=MAIN_ROWS),
    Goal("activation", "eager", speedup=1.0, where=MAIN_ROWS),
    Goal("cross_entropy", "eager", speedup=2.0, where={"shape": (1024, 50257), "backward": True}),
    Goal("cross_entropy", "eager", speedup=1.0, where={"shape": lambda shape: shape != (1024, 50257), **NOT_THE_SWEEP}),
    *(
        Goal(op, "the faster of eager and compile", peers=("eager", "compile"), speedup=0.95, where={"variant": SWEEP})
        for op in (*ROWS, "activation")
    ),
    # Never slower than PyTorch, whatever the CPU has instructions for; a few rows read the weight at the bandwidth.
    Goal("linear", "eager", speedup=0.95),
    Goal("linear", limit=0.85, where={"shape": lambda shape: shape[0] == 1, "dtype": lambda dtype: dtype != "float32"}),
    Goal("linear_cross_entropy", "eager", speedup=1.25, where={"cols": 50257, "dtype": "float32", "backward": True}),
    Goal("linear_cross_entropy", "eager", speedup=3.0, where={"cols": 50257, "dtype": "bfloat16", "backward": True}),
    Goal("linear_cross_entropy", "eager", speedup=1.0, where={"backward": False}),
    Goal("linear_cross_entropy", "eager", speedup=1.0, where={"cols": lambda n: n != 50257, "backward": True}),
    Goal("embedding", "eager", speedup=1.0),
    Goal("embedding", "eager", speedup=2.0, where={"variant": "BERT dropout 0.1", "backward": False}),
    Goal("rotary", "clone", speedup=WITHIN_A_FIFTH),
    Goal("rotary", "eager", speedup=2.0),
    # Attention: the main shape, biases with their gradients; and never slower at any shape.
    Goal("attention", "eager", speedup=1.4, where={"variant": "causal", "dtype": "float32", "backward": False}),
    Goal("attention", "eager", speedup=2.0, where={"variant": "causal", "dtype": "bfloat16", "backward": False}),
    Goal("attention", "eager", speedup=1.6, where={"variant": "causal", "dtype": "float32", "backward": True}),
    Goal("attention", "eager", speedup=3.0, where={"variant": "causal", "dtype": "bfloat16", "backward": True}),
    Goal("attention", "eager", speedup=4.0, where={"variant": lambda text: text.endswith(" bias")}),
    Goal("attention", "eager", speedup=1.0, where={"variant": lambda text: text != "causal" and "bias" not in text}),
    Goal("decode_attention", "eager", speedup=1.0),
    Goal("feed_forward", "matmuls", speedup=1 / 1.08),
    Goal("feed_forward", "eager", speedup=1.0),
    # Whole jobs.
    Goal("data_loading", rate=2e6),
    Goal("encoder_layer", "eager", speedup=1.1, where={"dtype": "float32", "backward": False}),
    Goal("encoder_layer", "eager", speedup=1.05, where={"dtype": "float32", "backward": True}),
    Goal("encoder_layer", "eager", speedup=1.8, where={"dtype": "bfloat16"}),
    Goal("training_step", "eager", speedup=1.2, where=THE_DEMO),
    Goal("training_step", "transformers", speedup=2.0, where=GPT2_BF16),
    Goal("training_step", "compile", speedup=1.3, where=GPT2_BF16),
    *(
        Goal("t5", "transformers", peers=("eager", "transformers"), speedup=n, where={"dtype": dtype})
        for dtype, n in (("float32", 1.3), ("bfloat16", 2.0))
    ),
    Goal("generation", "eager", speedup=3.0),
    Goal("llama", "eager", speedup=1.0),
    # Python between the call and the kernel.
    Goal("overhead", "bare", extra_us=3.0, where={"variant": "inference"}),
    Goal("overhead", "bare", extra_us=8.0, where={"variant": "with gradient"}),
    # A GPU, bfloat16.
    *(Goal(op, limit=0.9, device="cuda", where={"cols": lambda n: n >= 1024}) for op in ROWS),
    *(Goal(op, "compile", speedup=1.0, device="cuda") for op in ROWS),
    *(Goal(op, limit=0.9, device="cuda") for op in ("embedding", "rotary")),
    *(Goal(op, "compile", speedup=1.0, device="cuda") for op in ("embedding", "rotary")),
    Goal("attention", "the best SDPA backend", peers=SDPA, speedup=1.0, device="cuda"),
    Goal("feed_forward", "matmuls", speedup=0.95, device="cuda"),
    Goal("linear_cross_entropy", "liger", speedup=2.0, device="cuda", where={"backward": True}),
    Goal("encoder_layer", "eager", speedup=1.0, device="cuda"),
    Goal("encoder_layer", "compile", speedup=1.0, device="cuda"),
    Goal("training_step", "compile", speedup=1.2, device="cuda"),
)


def verdicts(
    op: str,
    device: str,
    case: object,
    times: dict[str, float],
    share: float | None,
    goals: Iterable[Goal] = GOALS,
    items: int = 0,
) -> list[Verdict]:
    """Every goal on this case, judged. Empty where we were not measured."""
    if "ours" not in times:
        return []
    judged = [g.judge(times["ours"], times, share, items) for g in goals if g.applies(op, device, case)]
    return [v for v in judged if v is not None]
