"""Other libraries' interfaces on fastformer's kernels."""
