"""The version, in the one place that pyproject.toml, the CMake project and ``fastformer.__version__`` read it from."""

__version__ = "0.1.0"
