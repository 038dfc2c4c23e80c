"""Implementations of every operation, one package per backend; :mod:`fastformer.backends.registry` chooses."""
