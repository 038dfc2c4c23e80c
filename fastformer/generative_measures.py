"""``fastformer generative``: a generative model trained, measured and shown.

It sits above training and evaluation because neither imports the other.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .data import EvaluationLoader, to_device
from .data.images import load_images
from .evaluation import generative as measure
from .models.latent import gaussian_kl, importance_weighted_bound
from .models.pixels import bits_per_dim

if TYPE_CHECKING:
    from .evaluation.generative import FeatureNet
    from .training.generative import Build, GenerativeConfig, GenerativeData, GenerativeParts

SHOWN = 64  # samples on a sheet, and texts in samples.txt
IMPORTANCE = (200, 64)  # test samples and latents of each in the importance-weighted bound
AT_ONCE = 250  # samples


def run(config: GenerativeConfig, *, build: Build | None = None, quiet: bool = False) -> dict[str, float]:
    """Trains as ``config`` says, measures the model on the test part, and leaves in ``run.out``: ``results.json``,
    ``loss.png``, and of images ``samples.png``, ``reconstructions.png``, ``interpolations.png``; of text
    ``samples.txt``. Returns the scores; ``build`` is that of :func:`fastformer.training.generative.train`.

    Raises:
        As :func:`fastformer.training.generative.train`.
    """
    from .training.generative import train
    from .training.logs import read_metrics
    from .training.plots import plot_loss

    def metrics(config: GenerativeConfig, data: GenerativeParts) -> Callable[[nn.Module], dict[str, float]] | None:
        net = feature_net(config.data)
        if net is None and config.family == "gan":
            return None
        return lambda model: scores(model, data, data.validation, config, net)

    result, model, data = train(config, metrics=metrics, build=build, quiet=quiet)
    torch.manual_seed(config.run.seed)  # a run that was resumed measures the same
    net = feature_net(config.data)
    found = scores(model, data, data.test, config, net, thorough=True)
    found["parameters"] = float(model.num_parameters())
    found |= {} if net is None else {"feature_net_accuracy": accuracy(net, data)}
    out = Path(config.run.out)
    what = f"{type(model).__name__}, {config.data.path}"
    unit = "both networks' losses" if config.family == "gan" else f"nats per {'token' if data.tokenizer else 'pixel'}"
    plot_loss(read_metrics(out), out / "loss.png", title=what, label=unit)
    show(model, data, out, what, config.run.seed)
    warnings = problems(model, data, config, found)
    summary = {"steps": result.steps, "seconds": result.seconds, "scores": found, "problems": warnings}
    (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"{result.steps} steps in {result.seconds:.0f} s; on {len(data.test):,} held-out samples:")
        for name, value in found.items():
            print(f"  {name.replace('_', ' '):28s}{value:.4g}")
        print(*(f"warning: {text}" for text in warnings), f"{out}: samples, plots, results.json", sep="\n")
    return found


def feature_net(data: GenerativeData) -> FeatureNet | None:
    """The network in whose features images are compared, trained on all images of the training part; None without
    classes. Models of one process share it."""
    return None if data.is_text else _feature_net(data.path, data.size, data.levels)


@functools.lru_cache(maxsize=1)
def _feature_net(path: str, size: int, levels: int) -> FeatureNet | None:
    train = load_images(path, size=size, levels=levels).train
    if train.num_labels < 2:
        return None
    epochs = max(2, min(20, 40_000 // len(train)))
    return measure.train_feature_net(train.pixels, train.labels, train.levels, epochs=epochs)


def accuracy(net: FeatureNet, data: GenerativeParts) -> float:
    """Share of the test images whose class ``net`` knows."""
    return float((net.describe(data.test.pixels)[1] == data.test.labels).double().mean())


@torch.no_grad()
def scores(
    model: Any,
    data: GenerativeParts,
    part: Any,
    config: GenerativeConfig,
    net: FeatureNet | None = None,
    thorough: bool = False,
) -> dict[str, float]:
    """What the model is worth on ``part`` of ``data``: the family's likelihood or bound, and its samples beside it.

    Args:
        thorough: also what takes long: the importance-weighted bound, log p(x) over all classes, self-BLEU.
    """
    found: dict[str, float] = {}
    if config.family == "vae":
        found |= bound_scores(model, data, part)
        if thorough:
            found |= importance_scores(model, data, part, config.run.seed)
    if config.family == "autoregressive":
        found["bits_per_dim"] = likelihood(model, part, given_class=True)
        if thorough and model.config.num_labels:
            found["bits_per_dim_any_class"] = likelihood(model, part.part(slice(IMPORTANCE[0])), given_class=False)
    if data.tokenizer is not None:
        if thorough:
            found |= text_scores(model, data, part, min(200, config.samples), config.run.seed)
    elif net is not None:
        generated = draw(model, config.samples, config.run.seed)
        found |= measure.sample_scores(net, part.pixels[: config.samples], generated, data.train.num_labels)
    return found


def draw(model: Any, samples: int, seed: int) -> Tensor:
    """Images ``(samples, C, H, W)`` uint8 on the CPU, the same for a seed."""
    generator = torch.Generator(model.device).manual_seed(seed)
    sizes = [min(AT_ONCE, samples - done) for done in range(0, samples, AT_ONCE)]
    return torch.cat([model.sample(size, generator=generator).cpu() for size in sizes])


def posteriors(model: Any, data: GenerativeParts, part: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """Of a variational autoencoder on ``part``: negative bounds ``(N)``, KL and posterior means ``(N, latent_size)``,
    and how many pixels or tokens that is."""
    bounds, kl, means, total = [], [], [], 0
    for batch in EvaluationLoader(part, data.collator, AT_ONCE):
        inputs = _inputs(batch, model.device)
        output = model(**inputs)
        total += int(model.count(**inputs))
        bounds.append(output.bound.cpu())
        means.append(output.latent_mean.cpu())
        kl.append(gaussian_kl(output.latent_mean, output.latent_log_variance).cpu())
    return torch.cat(bounds), torch.cat(kl), torch.cat(means), total


def bound_scores(model: Any, data: GenerativeParts, part: Any) -> dict[str, float]:
    """The bound as bits per dimension or perplexity, its KL in nats, and how many latents are active."""
    bounds, kl, means, total = posteriors(model, data, part)
    nats = float(bounds.sum()) / total
    of_text = data.tokenizer is not None
    return {
        "negative_elbo": float(bounds.mean()),
        ("perplexity_bound" if of_text else "bits_per_dim_bound"): math.exp(nats) if of_text else bits_per_dim(nats),
        "kl": float(kl.sum(-1).mean()),
        "active_units": float(measure.active_units(means)),
    }


def importance_scores(model: Any, data: GenerativeParts, part: Any, seed: int) -> dict[str, float]:
    """The importance-weighted bound on the first of ``part``, beside the plain one there."""
    samples, latents = min(IMPORTANCE[0], len(part)), IMPORTANCE[1]
    inputs = _inputs(data.collator([part[i] for i in range(samples)]), model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    weights = model.log_weights(latents, generator, **inputs)
    nats = -float(importance_weighted_bound(weights).sum()) / int(model.count(**inputs))
    if data.tokenizer is not None:
        return {"perplexity_importance_bound": math.exp(nats)}
    return {"bits_per_dim_importance_bound": bits_per_dim(nats)}


def likelihood(model: Any, part: Any, given_class: bool) -> float:
    """Bits per dimension of images; the class is told, or any."""
    total = 0.0
    for pixels, labels in zip(part.pixels.split(AT_ONCE), part.labels.split(AT_ONCE)):
        labels = labels.to(model.device) if given_class and model.config.num_labels else None
        total += float(model.log_prob(pixels.to(model.device), labels).double().sum())
    return bits_per_dim(-total, part.pixels.numel())


def text_scores(model: Any, data: GenerativeParts, part: Any, samples: int, seed: int) -> dict[str, float]:
    """Variety of sampled lines, beside that of as many real ones."""
    generator = torch.Generator(model.device).manual_seed(seed)
    written = [data.tokenizer.decode(ids) for ids in model.sample(samples, generator=generator)]  # type: ignore[union-attr]
    real = [data.tokenizer.decode(row[:-1]) for row in part.rows[: len(written)]]  # type: ignore[union-attr]
    found = {}
    for who, texts in (("", written), ("real_", real)):
        words = [text.split() for text in texts]
        found |= {f"{who}distinct_{n}": measure.distinct(words, n) for n in (1, 2)}
        found[f"{who}self_bleu"] = measure.self_bleu(texts)
    return found


@torch.no_grad()
def problems(model: Any, data: GenerativeParts, config: GenerativeConfig, found: dict[str, float]) -> list[str]:
    """Posterior collapse and mode collapse, in words."""
    said = []
    if config.family == "vae":
        _, kl, means, _ = posteriors(model, data, data.validation)
        said.append(measure.posterior_collapse(means, kl))
    if "coverage" in found:
        manifold = measure.Manifold(*(found[name] for name in measure.Manifold._fields))
        said.append(measure.mode_collapse(manifold, int(found["classes_covered"]), data.train.num_labels))
    return [text for text in said if text]


@torch.no_grad()
def show(model: Any, data: GenerativeParts, out: Path, title: str, seed: int) -> None:
    """Sheets of samples, and of a variational autoencoder what it makes of held-out samples and between them."""
    from .training.plots import plot_images

    reconstructs = hasattr(model, "reconstruct")
    if data.tokenizer is not None:
        (out / "samples.txt").write_text(written_samples(model, data, seed), encoding="utf-8")
        return
    levels = data.train.levels
    plot_images(draw(model, SHOWN, seed), out / "samples.png", levels=levels, title=f"Samples: {title}")
    if reconstructs:
        real = data.test.pixels[: SHOWN // 2].to(model.device)
        pairs = torch.stack([real.cpu(), model.reconstruct(real).cpu()], 1).flatten(0, 1)
        plot_images(pairs, out / "reconstructions.png", levels=levels, title=f"Held out, and reconstructed: {title}")
        count = min(8, len(real) // 2)
        if not count:
            return
        paths = model.interpolate(real[:count], real[count : 2 * count], 12).cpu().flatten(0, 1)
        plot_images(paths, out / "interpolations.png", levels=levels, columns=12, title=f"From one to another: {title}")


def written_samples(model: Any, data: GenerativeParts, seed: int) -> str:
    """Lines from the prior, lines beside their reconstructions, and a path from one line to another."""
    decode: Any = data.tokenizer.decode  # type: ignore[union-attr]
    generator = torch.Generator(model.device).manual_seed(seed)
    lines = ["Samples", *(decode(ids) for ids in model.sample(SHOWN // 2, generator=generator))]
    batch = _inputs(data.collator([data.test[i] for i in range(min(8, len(data.test)))]), model.device)
    lines += ["", "Held out -> reconstructed"]
    for i, ids in enumerate(model.reconstruct(**batch)):
        lines.append(f"{decode(data.test[i][:-1])} -> {decode(ids)}")
    first, last = (torch.tensor([data.test[i]], device=model.device) for i in (0, 1))
    return "\n".join([*lines, "", "From one to another", *map(decode, model.interpolate(first, last))]) + "\n"


def _inputs(batch: Any, device: torch.device) -> dict[str, Any]:
    names = ("pixel_values", "input_ids", "attention_mask")
    return to_device({name: batch[name] for name in names if name in batch}, device)
