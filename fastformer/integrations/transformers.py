"""``attn_implementation="fastformer"``: the attention of every Hugging Face model, on fastformer's kernels.

transformers asks a registered implementation for two functions. One builds the mask of a forward pass, once for all
layers (transformers_mask.py); the other computes the attention of a layer (transformers_attention.py). Registering only
the second would silently lose causality and padding, since transformers then makes no mask at all.

>>> from fastformer.integrations import transformers as integration
>>> integration.register()
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastformer")
>>> model.set_attn_implementation("fastformer")  # or of a model that is already there
"""

from __future__ import annotations

import importlib
import inspect

NAME = "fastformer"
_REQUIRED = "transformers 5.4 or newer"

__all__ = ["register", "unregister"]


def register() -> None:
    """Makes ``attn_implementation="fastformer"`` known to transformers, in this process, until :func:`unregister`.

    Calling it again changes nothing. No model changes by it: each says which implementation it uses.

    Raises:
        ImportError: transformers is not installed, or older than 5.4.
    """
    modeling, masking = _interfaces()
    from .transformers_attention import attention_forward
    from .transformers_mask import attention_mask

    modeling.AttentionInterface.register(NAME, attention_forward)
    masking.AttentionMaskInterface.register(NAME, attention_mask)


def unregister() -> None:
    """Removes the name again. A model that is still set to it raises at its next call; set it to another one first."""
    try:
        modeling, masking = _interfaces()
    except ImportError:
        return
    # transformers offers no function for this.
    modeling.AttentionInterface._global_mapping.pop(NAME, None)
    masking.AttentionMaskInterface._global_mapping.pop(NAME, None)


def _interfaces():
    """The modules that have AttentionInterface and AttentionMaskInterface."""
    try:
        masking = importlib.import_module("transformers.masking_utils")
        modeling = importlib.import_module("transformers.modeling_utils")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "transformers":
            raise
        raise ImportError(
            f"fastformer.integrations.transformers needs {_REQUIRED}: pip install -U transformers"
        ) from None
    if "q_length" not in inspect.signature(masking.sdpa_mask).parameters:
        found = importlib.import_module("transformers").__version__
        raise ImportError(
            f"fastformer.integrations.transformers needs {_REQUIRED}, and {found} is installed: pip install -U"
            " transformers"
        )
    return modeling, masking
