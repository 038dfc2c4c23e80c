"""Training: typed configuration, learning-rate schedules, one loop, checkpoints that resume exactly, plots."""

from .config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    load_config,
)
from .schedule import learning_rate_factor
from .trainer import Result, Trainer, causal_lm_loss, evaluate, make_optimizer

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Result",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "Trainer",
    "causal_lm_loss",
    "evaluate",
    "learning_rate_factor",
    "load_config",
    "make_optimizer",
]
