"""Training: typed configuration, objectives, schedules, one loop, checkpoints that resume exactly, plots."""

from .checkpoint import CheckpointError, find_checkpoint, load_state, restore_checkpoint, save_checkpoint
from .config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    load_config,
)
from .ema import Ema
from .evaluate import evaluate
from .objectives import (
    OBJECTIVES,
    Objective,
    causal_lm,
    check_classes,
    instruction,
    masked_lm,
    model_loss,
    question_answering,
    seq2seq,
    sequence_classification,
    token_classification,
)
from .optimizer import make_optimizer
from .parallel import Parallel
from .recompute import recompute_blocks
from .schedule import learning_rate_factor
from .trainer import BadLossError, Loader, Result, Step, Trainer

__all__ = [
    "OBJECTIVES",
    "BadLossError",
    "CheckpointError",
    "DataConfig",
    "Ema",
    "Loader",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "Parallel",
    "Result",
    "RunConfig",
    "ScheduleConfig",
    "Step",
    "TrainConfig",
    "Trainer",
    "causal_lm",
    "check_classes",
    "evaluate",
    "find_checkpoint",
    "instruction",
    "learning_rate_factor",
    "load_config",
    "load_state",
    "make_optimizer",
    "masked_lm",
    "model_loss",
    "question_answering",
    "recompute_blocks",
    "restore_checkpoint",
    "save_checkpoint",
    "seq2seq",
    "sequence_classification",
    "token_classification",
]
