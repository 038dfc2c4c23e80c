from .submodules import is_plain

__all__ = ["is_plain"]
