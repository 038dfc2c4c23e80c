"""How fast, beside what, against which limit: ``python benchmarks/run.py``, and on a GPU ``python benchmarks/gpu.py``.

machine.py    what ran: versions, commit, and the ceilings of the machine (copy bandwidth, matmul rate)
runner.py     one case: several providers on the same inputs, taking turns, through pytest-benchmark
goals.py      the table of goals
report.py     the printed table, JSON and Markdown; charts.py draws them
<op>.py       the cases, inputs and providers of one operation
run.py        the command; conftest.py lets pytest collect the same files, recorder.py keeps what they measure
gpu.py        the proof on a GPU, section by section; check.py is its correctness part
"""

KERNELS = (
    "layer_norm",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "softmax",
    "activation",
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "embedding",
    "rotary",
    "attention",
    "decode_attention",
    "feed_forward",
)
JOBS = ("encoder_layer", "training_step", "generation", "t5", "llama", "data_loading", "overhead")
