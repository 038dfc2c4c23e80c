"""The oracle: each operation in plain PyTorch, in float32 for half precision, on any device."""


def unavailable(device: str) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    return None
