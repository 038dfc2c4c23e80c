"""Configuration: YAML in, unknown keys with the nearest name out, values checked before anything runs."""

from dataclasses import dataclass, field

import pytest
import torch

from fastformer.training import ModelConfig, OptimizerConfig, TrainConfig, load_config
from fastformer.training.config import from_dict, resolve_device, resolve_dtype, to_dict


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  n_layer: 2\noptimizer:\n  learning-rate: 3e-4\nrun:\n  resume: true\n")
    config = load_config(path)
    # YAML 1.1 reads 3e-4 as text; dashes are as good as underscores.
    assert config.optimizer.learning_rate == 3e-4 and config.model.n_layer == 2 and config.run.resume is True
    assert config.data == TrainConfig().data
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "run.yaml") == TrainConfig()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": {"n_layr": 2}}, r"unknown setting model.n_layr; did you mean model.n_layer\?"),
        ({"modl": {}}, r"unknown setting modl"),
        ({"data": {"learning_rate": 1e-3}}, r"data.learning_rate; did you mean optimizer.learning_rate\?"),
        ({"model": 3}, r"model: expected a mapping"),
        ({"model": {"n_layer": 2.5}}, r"model.n_layer: got 2.5, expected int"),
        ({"model": {"n_layer": True}}, r"model.n_layer: got True, expected int"),
        ({"optimizer": {"learning_rate": "fast"}}, r"optimizer.learning_rate: got 'fast', expected float"),
        ({"run": {"resume": "yes"}}, r"run.resume: got 'yes', expected bool"),
        (
            {"schedule": {"kind": "sawtooth"}},
            r"schedule.kind: got 'sawtooth', expected one of cosine, linear",
        ),
        ({"optimizer": {"ema_decay": 1}}, r"optimizer.ema_decay: got 1.0, expected in \[0, 1\)"),
        ({"schedule": {"decay_fraction": 0.0}}, r"schedule.decay_fraction: got 0.0, expected in \(0, 1\]"),
        ({"run": {"on_bad_los": "skip"}}, r"unknown setting run.on_bad_los; did you mean run.on_bad_loss\?"),
        ({"run": {"keep": 0}}, r"run.keep: got 0, expected at least 1"),
        ({"run": {"dtype": "int8"}}, r"run.dtype: got 'int8', expected one of auto, float32, bfloat16, float16"),
        ({"model": {"n_embd": 130}}, r"model.n_embd: got 130, expected a multiple of model.n_head = 4"),
        ({"optimizer": {"learning_rate": -1.0}}, r"optimizer.learning_rate: got -1.0, expected above 0"),
        ({"data": {"validation_fraction": 1}}, r"data.validation_fraction: got 1.0, expected in \(0, 1\)"),
    ],
)
def test_errors_name_the_setting(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


def test_bad_yaml_and_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("model: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="n_head"):
        TrainConfig(model=ModelConfig(n_head=0))
    with pytest.raises(ValueError, match="accumulate"):
        TrainConfig(optimizer=OptimizerConfig(accumulate=0))


def test_other_configs_have_their_own_names(tmp_path):
    @dataclass(frozen=True)
    class Task:
        labels: int = 2

    @dataclass(frozen=True)
    class Config:
        task: Task = field(default_factory=Task)
        optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    assert from_dict(Config, {"task": {"labels": 3}}).task.labels == 3
    with pytest.raises(ValueError, match=r"task.label; did you mean task.labels\?"):
        from_dict(Config, {"task": {"label": 3}})


def test_device_and_precision():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"run.device: got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"run.device: 'cuda:99' was asked for and torch sees \d+ GPUs"):
        resolve_device("cuda:99")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_lists_and_a_default_to_start_from(tmp_path):
    @dataclass(frozen=True)
    class Config:
        names: tuple[str, ...] = ()
        rates: tuple[float, ...] = (1.0,)
        span: tuple[float, float] = (0.0, 1.0)

    (tmp_path / "run.yaml").write_text("names: [a, b]\n")
    config = load_config(tmp_path / "run.yaml", Config, Config(rates=(2.0, 3.0)))
    assert config == Config(("a", "b"), (2.0, 3.0))
    assert from_dict(Config, {"rates": ["1e-3"]}).rates == (1e-3,)
    assert from_dict(Config, {"span": [1, "2e-1"]}).span == (1.0, 0.2)
    with pytest.raises(ValueError, match=r"span: got \[1\], expected a list of 2"):
        from_dict(Config, {"span": [1]})
    with pytest.raises(ValueError, match=r"names: got 'a', expected a list"):
        from_dict(Config, {"names": "a"})
    with pytest.raises(ValueError, match=r"names: got 2, expected str"):
        from_dict(Config, {"names": ["a", 2]})
