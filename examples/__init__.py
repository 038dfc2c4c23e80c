"""Recipes: from data that installs as a package to a measured model, each one command (README.md)."""
