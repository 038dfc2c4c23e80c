"""What is watched while a model trains: jumps of the loss, the share of the machine's arithmetic in use, memory.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): a token costs 6 N + 12 L S E floating-point operations,
forward and backward, for N parameters in matrix products, L layers, S positions and a width of E; tokens per second
times that, over the peak rate of the machine. The peak is a data sheet's for a GPU known here, else the best rate of a
square matrix product, measured once.
"""

from __future__ import annotations

import functools
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..data import Batch

# Dense bfloat16 and float16 rates of data sheets, in TFLOP/s, by a part of the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "V100": 125.0, "T4": 65.0}
SMALLEST_WINDOW = 8


class SpikeDetector:
    """Finds losses more than ``zscore`` standard deviations above the mean of the last ``window``.

    Args:
        zscore: standard deviations that make a spike; 0 finds none.
        window: losses remembered. Those that were spikes are not.
    """

    def __init__(self, zscore: float, window: int) -> None:
        self.zscore = zscore
        self.losses: deque[float] = deque(maxlen=window)

    def check(self, loss: float) -> str:
        """What is wrong with ``loss``, in words, or "" where it is remembered as a good one."""
        if self.zscore and len(self.losses) >= SMALLEST_WINDOW:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            score = (loss - mean) / max(deviation, 1e-12)
            if score > self.zscore:
                return (
                    f"the loss jumped to {loss:.4f}, {score:.1f} standard deviations above the mean {mean:.4f} of the "
                    f"last {len(self.losses)} steps"
                )
        if self.zscore:
            self.losses.append(loss)
        return ""

    def state_dict(self) -> dict[str, Any]:
        """The losses remembered."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state_dict` returned."""
        self.losses.clear()
        self.losses.extend(state["losses"])


def flops_per_token(model: nn.Module, length: int) -> float:
    """Floating-point operations of training for each token of rows of ``length`` tokens, 6 N + 12 L S E; NaN where the
    model's configuration does not say L and E, and for an encoder with a decoder, whose tokens cost differently.

    N leaves out the tables that are only looked up: embeddings that no output layer shares.
    """
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if layers is None or width is None or getattr(config, "is_encoder_decoder", False):
        return math.nan
    multiplied = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m._parameters.values()}
    count = sum(p.numel() for p in model.parameters() if id(p) in multiplied)
    return 6.0 * count + 12.0 * layers * length * width


@functools.lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations a second that ``device`` can do in ``dtype``, and where that number is from."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if part in name.replace("-", " ").split():
                return tflops * 1e12, f"{tflops:g} TFLOP/s, the data sheet's for {name}"
    rate, size = 0.0, 256
    begin = time.perf_counter()
    # Twice the size while that is quick: a rate is its best at a size that only a fast machine can afford.
    while time.perf_counter() - begin < 0.05 and size <= 8192:
        rate = max(rate, _matmul_rate(device, dtype, size))
        size *= 2
    return rate, f"{rate / 1e12:.3g} TFLOP/s, measured with a matrix product in {str(dtype)[6:]}"


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # Not random numbers: the run's generator is not this function's to advance.
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on the GPU, or on a CPU the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokens_in(batch: Batch) -> int:
    """Tokens that the model reads, without padding; pixels of images."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return next((batch[name].numel() for name in ("input_ids", "pixel_values") if name in batch), 0)


def length_in(batch: Batch) -> int:
    """Tokens in a row; 0 where there are no tokens."""
    return batch["input_ids"].shape[-1] if "input_ids" in batch else 0


def name_batch(samples: list[Any], describe: Callable[[Any], str] = str, shown: int = 16) -> str:
    """The samples of a batch, in words; ``describe`` is the loader's for one of them."""
    if not samples:
        return "a batch whose samples the loader does not name"
    more = f" and {len(samples) - shown} more" if len(samples) > shown else ""
    return f"samples {', '.join(map(describe, samples[:shown]))}{more}"
