"""A VAE, a GAN and an autoregressive model of the same images on transformer blocks, side by side and beside baselines.

All are measured on the same held-out images: bits per dimension where there is a likelihood or a bound, and in the
features of one classifier the Fréchet distance, precision, recall and coverage of as many samples as held-out images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastformer import generative_measures
from fastformer.evaluation.generative import sample_scores
from fastformer.training.generative import GenerativeConfig, GenerativeData, build_model, defaults, prepare_data
from fastformer.training.plots import plot_images

from ..common import Recipe, main, told
from .baselines import DCGAN, ConvVAE, PCAGaussian

BITS = ("bits_per_dim", "bits_per_dim_any_class", "bits_per_dim_bound", "bits_per_dim_importance_bound")
SHOWN = (*BITS, "frechet_distance", "precision", "recall", "coverage", "classes_covered", "active_units")


@dataclass(frozen=True)
class GenerativeRecipe(Recipe):
    """Three families of generative models on the same images, and baselines."""

    components: int = 16
    """Of the Gaussian in principal components."""
    data: GenerativeData = field(default_factory=GenerativeData)
    vae: GenerativeConfig = field(default_factory=lambda: defaults("vae"))
    gan: GenerativeConfig = field(default_factory=lambda: defaults("gan"))
    autoregressive: GenerativeConfig = field(default_factory=lambda: defaults("autoregressive"))
    """Each with its own model, optimizer and steps; data is that above."""


def run(recipe: GenerativeRecipe) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    results: dict[str, dict[str, float]] = {}
    for name, family, model in (
        ("TransformerVAE", "vae", None),
        ("convolutional VAE", "vae", ConvVAE),
        ("TransformerGAN", "gan", None),
        ("DCGAN", "gan", DCGAN),
        ("ImageGPT", "autoregressive", None),
    ):
        print(f"\n{name}")
        config = told(getattr(recipe, family), recipe, family if model is None else f"{family}-convolutional")
        config = replace(config, data=replace(recipe.data, images=recipe.examples))
        build = None if model is None else lambda config, data, model=model: model(build_like(config, data))
        results[name] = generative_measures.run(config, build=build)
    results["Gaussian in principal components"] = gaussian(recipe)
    return write(recipe, results)


def build_like(config: GenerativeConfig, data: Any) -> Any:
    """The configuration of the transformer that a baseline stands beside; seeds its weights."""
    return build_model(config, data).config


def gaussian(recipe: GenerativeRecipe) -> dict[str, float]:
    """Scores of the baseline that is not trained."""
    config = replace(recipe.vae, data=replace(recipe.data, images=recipe.examples))
    data = prepare_data(config)
    components = min(recipe.components, data.train.pixels[0].numel() - 1)
    model = PCAGaussian(data.train.pixels, data.train.levels, components)
    samples = model.sample(config.samples, torch.Generator().manual_seed(recipe.seed))
    title = f"Samples: {components} principal components, {recipe.data.path}"
    plot_images(samples[:64], Path(recipe.out, "gaussian.png"), levels=data.train.levels, title=title)
    found = {"bits_per_dim_bound": model.bits_per_dim(data.test.pixels)}
    net = generative_measures.feature_net(config.data)
    if net is not None:
        found |= sample_scores(net, data.test.pixels[: config.samples], samples, data.train.num_labels)
    return found


def write(recipe: GenerativeRecipe, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """``report.md`` with a row for each model, and ``results.json``."""
    columns = [name for name in SHOWN if any(name in scores for scores in results.values())]
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for who, scores in results.items():
        lines.append(f"| {who} | {' | '.join(f'{scores[c]:.3f}' if c in scores else '' for c in columns)} |")
    text = f"# Generative models of {recipe.data.path}\n\n" + "\n".join(lines) + "\n"
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    summary = {"data": recipe.data.path, "scores": {who: dict(scores) for who, scores in results.items()}}
    (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}{out / 'report.md'}")
    return summary


if __name__ == "__main__":
    main(run, GenerativeRecipe, __file__)
