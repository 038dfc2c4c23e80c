"""Reading and writing Hugging Face model directories: config.json beside safetensors or pytorch_model.bin.

The model is built without memory ("meta" device), then each tensor is copied from the file into its parameter, so at
most one shard is ever held twice. Files are written under another name and renamed, so that a reader (or a crash) never
meets half a checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .generation_config import FILE as GENERATION_CONFIG
from .generation_config import GenerationConfig

Model = TypeVar("Model", bound="PreTrainedModel")

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PreTrainedConfig:
    """Base of the configuration dataclasses: config.json in and out, keeping the entries this library does not use."""

    model_type: ClassVar[str]
    attribute_map: ClassVar[dict[str, str]] = {}
    extra: dict[str, Any]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """A configuration from the contents of a config.json. Unknown entries go to ``extra`` and are written back."""
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type: config.json says {model_type!r}, {cls.__name__} is for {cls.model_type!r}")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}  # type: ignore[arg-type]
        renamed = {cls.attribute_map.get(k, k): v for k, v in values.items()}
        extra = {k: v for k, v in renamed.items() if k not in known and k != "model_type"}
        return cls(**{k: v for k, v in renamed.items() if k in known}, extra=extra)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Any:
        """The configuration in a model directory (or Hugging Face hub id)."""
        return cls.from_dict(read_config(resolve(path)))

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}  # type: ignore[arg-type]
        return dict(sorted({**self.extra, **own, "model_type": self.model_type}.items()))


class PreTrainedModel(torch.nn.Module):
    """``from_pretrained``, ``save_pretrained``, ``tie_weights`` and ``generate`` for the models of this package.

    A subclass sets :attr:`config_class`, :attr:`base_model_prefix` (the attribute, and key prefix, of the model without
    its head), :attr:`tied_weights` (key -> the key whose tensor it shares) and :attr:`ignored_keys` (patterns of
    entries in old checkpoints that are not parameters).
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    base_model_prefix: ClassVar[str]
    tied_weights: ClassVar[dict[str, str]] = {}
    ignored_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PreTrainedConfig) -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(f"config: expected a {self.config_class.__name__}, got {type(config).__name__}")
        super().__init__()
        self.config: Any = config

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.parameters()).dtype

    # None until a file or the user sets it.
    _generation_config: GenerationConfig | None = None

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of :meth:`generate`: generation_config.json, or else the special tokens of ``config``."""
        if self._generation_config is None:
            self._generation_config = GenerationConfig.from_model_config(self.config)
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if not isinstance(value, GenerationConfig):  # that of transformers
            value = GenerationConfig.from_dict({k: v for k, v in value.to_dict().items() if v is not None})
        self._generation_config = value

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def tie_weights(self) -> None:
        """Makes every key of :attr:`tied_weights` share its partner's parameter, if the configuration ties them."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return
        for key, partner in self.tied_weights.items():
            module, _, name = key.rpartition(".")
            setattr(self.get_submodule(module), name, self.get_parameter(partner))

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Continues ``input_ids``; see :func:`fastformer.generation.generate` for the arguments."""
        # Generation sits above the models in the import order, so it is looked up only when called.
        return importlib.import_module("fastformer.generation").generate(self, input_ids, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """Loads a model directory written by this library or by ``transformers``; returned in evaluation mode.

        Args:
            path: a directory with config.json and model.safetensors, pytorch_model.bin, or a sharded index of either;
                or the id of a model on the Hugging Face hub, if ``huggingface_hub`` is installed.
            dtype: of the parameters; a torch dtype or its name. None or "auto" keeps the file's.
            device: where the parameters go; default the CPU.

        Raises:
            FileNotFoundError: no such directory, or a file is missing in it.
            ValueError: a key is missing, unexpected or of the wrong shape; the message names it.
        """
        directory = resolve(path)
        config = cls.config_class.from_dict(read_config(directory))
        with torch.device("meta"):
            model = cls(config)
        target = torch.device("cpu") if device is None else torch.device(device)
        stored = config.extra.pop("torch_dtype", None) or config.extra.get("dtype")
        model._load(directory, _dtype(dtype) or _dtype(stored), target)
        if (directory / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        return model.eval()

    def _load(self, directory: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        tied = self.tied_weights if getattr(self.config, "tie_word_embeddings", False) else {}
        shapes = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        ignored = re.compile("|".join(f"(?:{p})" for p in self.ignored_keys) or r"(?!)")
        missing, unexpected, copies = set(shapes) - set(tied), [], {}
        allocated = False
        for file, key, tensor in _tensors(directory):
            name = self._own_key(key, shapes)
            if name is None:
                if not ignored.search(key):
                    unexpected.append(f"{key} (in {file})")
                continue
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{key}: shape {tuple(tensor.shape)} in {file} is not the model's {shapes[name]}")
            if not allocated:
                self.to(dtype or tensor.dtype).to_empty(device=device)
                self.tie_weights()
                allocated = True
            if name in tied:  # a second copy of its partner, needed only if the partner is not there
                copies[tied[name]] = tensor
                continue
            with torch.no_grad():
                self.get_parameter(name).copy_(tensor)
            missing.discard(name)
        for name in missing & set(copies):
            with torch.no_grad():
                self.get_parameter(name).copy_(copies[name])
            missing.discard(name)
        problems = [f"missing {_listing(missing)}"] if missing else []
        problems += [f"unexpected {_listing(unexpected)}"] if unexpected else []
        if problems:
            raise ValueError(f"{directory} does not hold a {type(self).__name__}: {'; '.join(problems)}")

    def _own_key(self, key: str, shapes: dict[str, Any]) -> str | None:
        """The parameter that ``key`` of a checkpoint names: as it is, or with or without the base model's prefix."""
        prefix = self.base_model_prefix + "."
        return next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in shapes), None)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors into directory ``path``, as ``transformers`` reads them.

        And generation_config.json, if the model has one.

        Tied weights are stored once. Each file appears complete or not at all.
        """
        from safetensors.torch import save_file

        directory = Path(path)
        if directory.is_file():
            raise ValueError(f"path: {directory} is a file, not a directory")
        directory.mkdir(parents=True, exist_ok=True)
        tied = self.tied_weights if getattr(self.config, "tie_word_embeddings", False) else {}
        state = {k: v.detach().contiguous() for k, v in self.state_dict().items() if k not in tied}
        config = self.config.to_dict()
        config["architectures"] = [type(self).__name__]
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        with replaced(directory / SAFETENSORS) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        with replaced(directory / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self._generation_config is not None:
            with replaced(directory / GENERATION_CONFIG) as temporary:
                temporary.write_text(json.dumps(self._generation_config.to_dict(), indent=2) + "\n", encoding="utf-8")


class replaced:
    """``with replaced(file) as temporary``: what is written there takes the place of ``file`` if nothing is raised."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, exception: object, *_: object) -> None:
        if exception is None:
            os.replace(self.temporary, self.file)
        else:
            self.temporary.unlink(missing_ok=True)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The model directory ``path``, or a local copy of the hub model of that id.

    Raises:
        FileNotFoundError: not a directory, and not something the hub could be asked for.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise FileNotFoundError(f"path: {directory} is a file; expected the directory with config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise FileNotFoundError(f"path: no directory {directory}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"path: no directory {directory}; to load it from the Hugging Face hub, install huggingface_hub"
        ) from None
    try:
        wanted = ["config.json", GENERATION_CONFIG, "*.safetensors*", "*.bin*"]
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:
        raise FileNotFoundError(f"path: no directory {directory}, and the hub did not deliver it: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json."""
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"path: no config.json in {directory}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, got {type(values).__name__}")
    return values


def _tensors(directory: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(file name, key, tensor) of every tensor of the checkpoint; one tensor (or .bin shard) in memory at a time."""
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if (directory / single).is_file():
            files = [single]
        elif (directory / index).is_file():
            files = sorted(set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            continue
        for name in files:
            file = directory / name
            if not file.is_file():
                raise FileNotFoundError(f"path: {index} names {name}, which is not in {directory}")
            if name.endswith(".safetensors"):
                from safetensors import safe_open

                with safe_open(file, framework="pt") as handle:
                    for key in handle.keys():
                        yield name, key, handle.get_tensor(key)
            else:
                for key, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
                    yield name, key, tensor
        return
    raise FileNotFoundError(f"path: {directory} has none of {SAFETENSORS}, {TORCH} or their .index.json")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype  # type: ignore[return-value]
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is not a torch dtype, its name, or 'auto'")
    return found


def _listing(keys: Any) -> str:
    names = sorted(keys)
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
