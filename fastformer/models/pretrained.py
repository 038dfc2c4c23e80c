"""Reading and writing Hugging Face model directories: config.json beside safetensors or pytorch_model.bin.

The model is built without memory ("meta" device), then each tensor is copied from the file into its parameter, so at
most one shard is ever held twice. Files are written under another name and renamed, so that a reader (or a crash) never
meets half a checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import os
import re
import warnings
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
    derived_fields: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Field -> those that a file's values no longer fit once it is changed."""
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
    def from_pretrained(cls, path: str | os.PathLike[str], **changes: Any) -> Any:
        """The configuration in a model directory (or Hugging Face hub id), with some fields changed.

        Raises:
            TypeError: a field that does not exist; the message has the nearest.
        """
        values = read_config(resolve(path))
        for name in changes:
            cls.check_field(name)
            values.pop(cls.attribute_map.get(name, name), None)
            for derived in cls.derived_fields.get(name, ()):
                values.pop(derived, None)
        values |= changes
        return cls.from_dict(values)

    @classmethod
    def check_field(cls, name: str) -> None:
        """Raises TypeError unless a configuration can be given ``name``."""
        fields = {f.name for f in dataclasses.fields(cls)} - {"extra"} | set(cls.attribute_map)  # type: ignore[arg-type]
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise TypeError(f"{name}: {cls.__name__} has no such field{f'; did you mean {near[0]}?' if near else ''}")

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}  # type: ignore[arg-type]
        return dict(sorted({**self.extra, **own, "model_type": self.model_type}.items()))


class PreTrainedModel(torch.nn.Module):
    """``from_pretrained``, ``save_pretrained``, ``tie_weights`` and ``generate`` for the models of this package.

    What a subclass says about its checkpoints:

    Attributes:
        config_class: the class of its configuration.
        base_model_prefix: the attribute, and prefix of keys, of the model without its head.
        tied_weights: key -> the key whose tensor it shares where the configuration ties embeddings.
        renamed_keys: (pattern, replacement) pairs for keys of old checkpoints, as in ``re.sub``.
        ignored_keys: patterns of entries that are not parameters of this class.
        head_keys: patterns of parameters that a checkpoint of another class may lack; they then start at random.
        float32_keys: patterns of parameters that stay float32 in a float16 model.
        init_arguments: arguments of the constructor, beside the configuration, that ``from_pretrained`` takes as well.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    base_model_prefix: ClassVar[str]
    tied_weights: ClassVar[dict[str, str]] = {}
    renamed_keys: ClassVar[tuple[tuple[str, str], ...]] = ()
    ignored_keys: ClassVar[tuple[str, ...]] = ()
    head_keys: ClassVar[tuple[str, ...]] = ()
    float32_keys: ClassVar[tuple[str, ...]] = ()
    init_arguments: ClassVar[tuple[str, ...]] = ()

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
        self._generation_config = GenerationConfig.of(value)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def ties(self) -> dict[str, str]:
        """Key -> the key whose tensor it shares, with this configuration."""
        return self.tied_weights if getattr(self.config, "tie_word_embeddings", False) else {}

    def tie_weights(self) -> None:
        """Makes every key of :meth:`ties` share its partner's parameter."""
        for key, partner in self.ties().items():
            module, _, name = key.rpartition(".")
            setattr(self.get_submodule(module), name, self.get_parameter(partner))

    @torch.no_grad()
    def init_weights(self, prefix: str = "") -> None:
        """Draws the parameters of the modules whose names start with ``prefix`` anew."""
        for name, module in self.named_modules():
            if name.startswith(prefix):
                self.init_module(name, module)

    def init_module(self, name: str, module: torch.nn.Module) -> None:
        """Initial values of the parameters that ``module`` itself holds."""
        if module._parameters and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """The layer onto the vocabulary, for models that have one."""
        return None

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Continues ``input_ids``; see :func:`fastformer.generation.generate` for the arguments."""
        if self.get_output_embeddings() is None:
            raise ValueError(f"model: {type(self).__name__} does not predict the next token, so it writes no text")
        # Generation sits above the models in the import order, so it is looked up only when called.
        return importlib.import_module("fastformer.generation").generate(self, input_ids, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **config: Any,
    ) -> Model:
        """Loads a model directory written by this library or by ``transformers``; returned in evaluation mode.

        Args:
            path: a directory with config.json and model.safetensors, pytorch_model.bin, or a sharded index of either;
                or the id of a model on the Hugging Face hub, if ``huggingface_hub`` is installed.
            dtype: of the parameters; a torch dtype or its name. None or "auto" keeps the file's.
            device: where the parameters go; default the CPU.
            config: fields of the configuration to change, such as ``num_labels=3``.

        A head that the checkpoint does not have, as for fine-tuning, starts at random values, with a warning.

        Raises:
            FileNotFoundError: no such directory, or a file is missing in it.
            ValueError: a key is missing, unexpected or of the wrong shape; the message names it.
            TypeError: a field that the configuration does not have.
        """
        directory = resolve(path)
        arguments = {name: config.pop(name) for name in cls.init_arguments if name in config}
        settings = cls.config_class.from_pretrained(directory, **config)
        with torch.device("meta"):
            model = cls(settings, **arguments)
        target = torch.device("cpu") if device is None else torch.device(device)
        stored = settings.extra.pop("torch_dtype", None) or settings.extra.get("dtype")
        model._load(directory, _dtype(dtype) or _dtype(stored), target)
        if (directory / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        return model.eval()

    def _load(self, directory: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        ties = self.ties()
        shapes = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        missing, unexpected, copies = set(shapes) - set(ties), [], {}
        allocated = False
        for file, key, tensor in _tensors(directory):
            name = self._own_key(key, shapes)
            if name is None:
                if not _matches(self.ignored_keys, key):
                    unexpected.append(f"{key} (in {file})")
                continue
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{key}: shape {tuple(tensor.shape)} in {file} is not the model's {shapes[name]}")
            if not allocated:
                self._allocate(dtype or tensor.dtype, device)
                allocated = True
            if name in ties:  # a second copy of its partner, needed only if the partner is not there
                copies[name] = tensor
                continue
            with torch.no_grad():
                self.get_parameter(name).copy_(tensor)
            missing.discard(name)
        for name, tensor in copies.items():
            partner = ties[name]
            with torch.no_grad():
                if partner in missing:
                    self.get_parameter(partner).copy_(tensor)
                    missing.discard(partner)
                elif not torch.equal(self.get_parameter(partner), tensor.to(self.get_parameter(partner))):
                    self._untie(name, tensor)
        # A whole layer may be absent, not one of its parameters.
        present = {name.rpartition(".")[0] for name in set(shapes) - set(ties) - missing}
        head = {n for n in missing if _matches(self.head_keys, n) and n.rpartition(".")[0] not in present}
        head = head if allocated else set()
        missing -= head
        problems = [f"missing {_listing(missing)}"] if missing else []
        problems += [f"unexpected {_listing(unexpected)}"] if unexpected else []
        if problems:
            raise ValueError(f"{directory} does not hold a {type(self).__name__}: {'; '.join(problems)}")
        if head:
            for module in {name.rpartition(".")[0] for name in head}:
                with torch.no_grad():
                    self.init_module(module, self.get_submodule(module))
            warnings.warn(
                f"fastformer: {directory} has no {_listing(head)}; this head starts at random values, train it first",
                stacklevel=3,
            )

    def _untie(self, name: str, tensor: Tensor) -> None:
        """Gives ``name`` values of its own: the checkpoint's, which are not its partner's, whatever the configuration
        says. ``transformers`` writes such ones for T5 1.1."""
        self.config.tie_word_embeddings = False
        if name in self.ties():
            raise ValueError(f"{name}: differs from {self.ties()[name]}, which is the same parameter")
        module, _, last = name.rpartition(".")
        parameter = self.get_parameter(name)
        setattr(self.get_submodule(module), last, torch.nn.Parameter(tensor.to(parameter, copy=True)))

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Memory for the parameters of a model that was built on the meta device."""
        self.to(dtype)
        if dtype == torch.float16:
            for name, parameter in self.named_parameters():
                if _matches(self.float32_keys, name):
                    parameter.data = parameter.data.float()
        self.to_empty(device=device)
        self.tie_weights()

    def _own_key(self, key: str, shapes: dict[str, Any]) -> str | None:
        """The parameter that ``key`` of a checkpoint names: as it is, or with or without the base model's prefix."""
        for pattern, replacement in self.renamed_keys:
            key = re.sub(pattern, replacement, key)
        prefix = self.base_model_prefix + "."
        return next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in shapes), None)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Writes config.json and model.safetensors into directory ``path``, as ``transformers`` reads them.

        And generation_config.json, if the model has one.

        Tied weights are stored once. Each file appears complete or not at all.

        Args:
            state_dict: what to write instead of this model's, such as one gathered from several processes.
            max_shard_size: bytes, or a number and KB, MB or GB; above it the tensors are spread over several files with
                an index. A tensor that is larger by itself has a file of its own.
        """
        from safetensors.torch import save_file

        directory, limit = Path(path), _bytes(max_shard_size)
        if directory.is_file():
            raise ValueError(f"path: {directory} is a file, not a directory")
        directory.mkdir(parents=True, exist_ok=True)
        ties = self.ties()
        source = self.state_dict() if state_dict is None else state_dict
        state = {k: v.detach().contiguous() for k, v in source.items() if k not in ties}
        config = self.config.to_dict()
        config["architectures"] = [type(self).__name__]
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        shards = _shards(state, limit)
        for name, tensors in shards.items():
            with replaced(directory / name) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
        texts = {"config.json": json.dumps(config, indent=2, sort_keys=True)}
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in state.values())},
                "weight_map": {key: name for name, tensors in shards.items() for key in tensors},
            }
            texts[SAFETENSORS_INDEX] = json.dumps(index, indent=2, sort_keys=True)
        if self._generation_config is not None:
            texts[GENERATION_CONFIG] = json.dumps(self._generation_config.to_dict(), indent=2)
        for name, text in texts.items():
            with replaced(directory / name) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        # What an earlier save left would be read first, or beside these.
        stale = {SAFETENSORS, SAFETENSORS_INDEX, *(p.name for p in directory.glob("model-*-of-*.safetensors"))}
        for name in stale - set(shards) - set(texts):
            (directory / name).unlink(missing_ok=True)


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


def _shards(state: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """File name -> its part of ``state``, each of at most ``limit`` bytes where its tensors allow that."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][key] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return {SAFETENSORS: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", str(size).strip().upper())
    number = float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]] if match else 0
    if number < 1:
        raise ValueError(f"max_shard_size: got {size!r}, expected bytes, or a number and KB, MB or GB, above 0")
    return int(number)


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


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
