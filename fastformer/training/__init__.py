"""Training: typed configuration, objectives, schedules, one loop, checkpoints that resume exactly, plots."""

from .checkpoint import CheckpointError, find_checkpoint, load_state, restore_checkpoint, save_checkpoint
from .config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    load_config,
)
from .ema import Ema
from .evaluate import evaluate
from .finetune import ExamplesConfig, FinetuneConfig, finetune
from .lora import LoraConfig, add_lora, freeze, load_lora, merge_lora
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
from .search import SearchConfig, SearchSettings, search
from .trainer import BadLossError, Loader, Result, Step, Trainer

__all__ = [
    "OBJECTIVES",
    "BadLossError",
    "CheckpointError",
    "DataConfig",
    "Ema",
    "ExamplesConfig",
    "FinetuneConfig",
    "Loader",
    "LoraConfig",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "Parallel",
    "ParallelConfig",
    "Result",
    "RunConfig",
    "ScheduleConfig",
    "SearchConfig",
    "SearchSettings",
    "Step",
    "TrainConfig",
    "Trainer",
    "add_lora",
    "causal_lm",
    "check_classes",
    "evaluate",
    "find_checkpoint",
    "finetune",
    "freeze",
    "instruction",
    "learning_rate_factor",
    "load_config",
    "load_lora",
    "load_state",
    "make_optimizer",
    "masked_lm",
    "merge_lora",
    "model_loss",
    "question_answering",
    "recompute_blocks",
    "restore_checkpoint",
    "save_checkpoint",
    "search",
    "seq2seq",
    "sequence_classification",
    "token_classification",
]
