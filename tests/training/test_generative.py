"""Generative models in the one trainer: two networks' gradients in one backward, schedules, exact resuming, and that
neither the posterior nor the modes collapse."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastformer.data import load_tokenizer
from fastformer.data.images import Images
from fastformer.evaluation.generative import (
    active_units,
    classes_covered,
    mode_collapse,
    posterior_collapse,
    precision_recall,
)
from fastformer.models import (
    TransformerGAN,
    TransformerGANConfig,
    TransformerVAE,
    TransformerVAEConfig,
    from_pretrained,
)
from fastformer.training import Ema, OptimizerConfig, RunConfig, ScheduleConfig, Trainer, make_optimizer
from fastformer.training.generative import GenerativeConfig, GenerativeModel, defaults, prepare, prepare_data, train
from fastformer.training.generative_objectives import (
    GAN_LOSSES,
    GANSettings,
    Numbered,
    VAESettings,
    augment,
    gan_objective,
    r1_penalty,
    vae_objective,
)
from fastformer.training.logs import read_metrics

GAN = TransformerGANConfig(
    image_size=4,
    levels=5,
    latent_size=4,
    d_model=32,
    nhead=2,
    num_layers=1,
    discriminator_width=16,
    discriminator_layers=1,
)
MODES = 4


def bars(count=400):
    """4 × 4 images of one bright column: four modes, with a little noise."""
    modes = torch.arange(count) % MODES
    pixels = torch.randint(0, 2, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[torch.arange(count), 0, :, modes] += 3
    return Images(pixels, modes, 5)


def modes_of(pixels):
    return pixels.float().mean((1, 2)).argmax(-1)


@pytest.fixture
def file(tmp_path):
    """The bars as an .npz file."""
    images = bars()
    np.savez(tmp_path / "bars.npz", images=(images.pixels[:, 0] * 60).numpy(), labels=images.labels.numpy())
    return str(tmp_path / "bars.npz")


def configured(family, path, out, steps, *, resume=False, **changes):
    config = defaults(family)
    shape = {"d_model": 16, "nhead": 2, "num_layers": 1, "latent_size": 4, "patch_size": 2}
    run = {
        "max_steps": steps,
        "eval_every": 0,
        "save_every": 0,
        "log_every": 1,
        "tensorboard": False,
        "device": "cpu",
        "resume": resume,
    }
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=path, levels=0 if path.endswith(".txt") else 5, batch_size=16),
        model=dataclasses.replace(config.model, **shape),
        run=dataclasses.replace(config.run, out=str(out), **run),
        **changes,
    )


# ---- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_one_backward_gives_each_network_its_own_gradient(name):
    """The generator's loss leaves the discriminator alone, and the other way round."""
    torch.manual_seed(0)
    gan = TransformerGAN(GAN)
    real = {"pixel_values": bars(8).pixels}
    torch.manual_seed(1)
    total = gan_objective(GANSettings(loss=name, r1=0.0, augment=()))(gan, real)
    assert total[1] == 8
    total[0].backward()
    mine = {parameter: p.grad.clone() for parameter, p in gan.named_parameters()}
    torch.manual_seed(1)
    fake = gan.generator(torch.randn(8, 4))
    x = real["pixel_values"].float() / 2 - 1
    of_discriminator, of_generator = GAN_LOSSES[name]
    for part, loss in (
        ("discriminator", of_discriminator(gan.discriminator(x), gan.discriminator(fake.detach()))),
        ("generator", of_generator(gan.discriminator(fake))),
    ):
        names, parameters = zip(*((n, p) for n, p in gan.named_parameters() if n.startswith(part)))
        for parameter, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(mine[parameter], gradient, msg=parameter)


def test_r1_is_the_squared_gradient():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    images = torch.rand(6, 1, 4, 4).mul(2).sub(1).requires_grad_()
    exact = torch.autograd.grad(net(images).sum(), images)[0].square().sum() / 6
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        estimates = torch.stack([r1_penalty(net, images, generator=generator) for _ in range(300)])
    error = estimates.std() / math.sqrt(300)
    assert abs(estimates.mean() - exact) < 4 * error and error < 0.1 * exact
    discriminator = TransformerGAN(GAN).discriminator
    r1_penalty(discriminator, images.detach()).backward()
    assert discriminator.blocks.layers[0].linear1.weight.grad.abs().sum() > 0


def test_r1_comes_every_so_often_with_so_much_more_weight():
    torch.manual_seed(0)
    gan, real = TransformerGAN(GAN), bars(8).pixels

    def loss(r1, number):
        torch.manual_seed(1)
        batch = {"pixel_values": real, "_batch": number}
        return gan_objective(GANSettings(r1=r1, r1_every=4, augment=())).loss(gan, batch)

    assert loss(2.0, 1) == loss(0.0, 1)
    torch.manual_seed(1)
    loss(0.0, 0)
    penalty = r1_penalty(gan.discriminator, real.float() / 2 - 1)  # the next random numbers, as in the objective
    torch.testing.assert_close(loss(2.0, 4) - loss(0.0, 4), 4 * penalty)


def test_augmentation():
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8)
    assert augment(images, ()) is images
    moved = augment(images, ("translation",))
    ours = [any(torch.equal(moved[i, 0, 1:-1, 1:-1], images[i, 0, 1 + y : 7 + y, 1 + x : 7 + x])
                for y in (-1, 0, 1) for x in (-1, 0, 1)) for i in range(64)]  # fmt: skip
    assert all(ours) and not torch.equal(moved, images)
    cut = augment(images, ("cutout",))
    assert ((cut == images) | (cut == -1)).all()
    assert 4 <= (cut == -1).sum((1, 2, 3)).min() and (cut == -1).sum((1, 2, 3)).max() <= 25
    leaf = images.clone().requires_grad_()
    augment(leaf, ("color", "translation", "cutout")).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_kl_warm_up():
    torch.manual_seed(0)
    model = TransformerVAE(TransformerVAEConfig(image_size=4, levels=5, d_model=16, nhead=2, num_layers=1))
    objective = vae_objective(VAESettings(kl_warmup=10, free_bits=0.0))

    def loss(**number):
        torch.manual_seed(1)
        return objective.loss(model, {"pixel_values": bars(8).pixels, **number})

    torch.testing.assert_close(loss(_batch=9), loss())
    torch.testing.assert_close(loss(_batch=99), loss())
    torch.testing.assert_close(loss(_batch=4) - loss(_batch=0), (loss() - loss(_batch=4)) * 4 / 5)
    assert objective.count({"pixel_values": bars(8).pixels}) == 8 * 16


def test_rates_of_their_own():
    gan = TransformerGAN(GAN)
    optimizer = make_optimizer(gan, OptimizerConfig(rates=("discriminator.=0.5",)))
    multiples = {id(p): group["multiple"] for group in optimizer.param_groups for p in group["params"]}
    assert all(multiples[id(p)] == (0.5 if n.startswith("d") else 1.0) for n, p in gan.named_parameters())
    with pytest.raises(ValueError, match=r"optimizer\.rates: no parameter"):
        make_optimizer(gan, OptimizerConfig(rates=("critic.=0.5",)))
    with pytest.raises(ValueError, match=r"optimizer\.rates"):
        OptimizerConfig(rates=("discriminator.",))


def test_the_trainer_uses_them(file, tmp_path):
    optimizer = dataclasses.replace(defaults("gan").optimizer, rates=("discriminator.=0",))
    trainer, _ = prepare(configured("gan", file, tmp_path / "run", 2, optimizer=optimizer), quiet=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    moved = {name.partition(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"generator"}


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vae", "gan"])
def test_a_resumed_run_repeats_the_losses(family, file, tmp_path):
    """Batch numbers, by which warm-up and R1 go, and random numbers included."""
    schedule = ScheduleConfig(kind="constant", warmup_steps=0)  # others depend on how long the run is meant to be
    settings = {"vae": VAESettings(kl_warmup=8), "gan": GANSettings(r1_every=4), "schedule": schedule}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare(configured(family, file, whole, 6, **settings), quiet=True)[0].fit()
    prepare(configured(family, file, parts, 3, **settings), quiet=True)[0].fit()
    prepare(configured(family, file, parts, 6, resume=True, **settings), quiet=True)[0].fit()
    kept = [[r["loss"] for r in read_metrics(out) if "loss" in r] for out in (whole, parts)]
    assert len(kept[0]) == 6 and kept[0] == kept[1]


def test_a_line_is_written_by_what_was_trained_on_lines(tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"{a} {b}\n" for a in ("red", "blue", "green", "old", "new") * 20 for b in "abcdefgh"))
    config = configured("vae", str(text), tmp_path / "run", 3)
    result, model, data = train(config, quiet=True)
    assert result.steps == 3 and math.isfinite(result.validation_loss)
    assert {"red a", "blue h"} <= {data.tokenizer.decode(row[:-1]) for row in data.train.rows}
    tokenizer = load_tokenizer(tmp_path / "run" / "checkpoint")
    assert all(isinstance(tokenizer.decode(ids), str) for ids in model.sample(3))
    assert type(from_pretrained(tmp_path / "run" / "ema")) is type(model)


def learned(model, objective, steps, batch_size=32, **optimizer):
    """The average of the weights after some steps on the bars, without files."""
    images, adam, ema = bars(), torch.optim.Adam(model.parameters(), **optimizer), Ema(model, 0.98)
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        adam.zero_grad()
        objective.loss(model, {"pixel_values": images.pixels[chosen], "_batch": number}).backward()
        adam.step()
        ema.update(number + 1)
    model.load_state_dict(ema.state_dict())
    return model.eval()


@torch.no_grad()
def test_a_vae_that_learns_uses_its_latents_and_a_collapsed_one_is_told():
    torch.manual_seed(0)
    config = TransformerVAEConfig(image_size=4, levels=5, latent_size=4, d_model=16, nhead=2, num_layers=1)
    with torch.enable_grad():
        model = learned(TransformerVAE(config), vae_objective(VAESettings(kl_warmup=100)), 300, lr=5e-3)
    pixels = bars().pixels
    output = model(pixels)
    assert posterior_collapse(output.latent_mean, output.kl) == ""
    assert active_units(output.latent_mean) >= 1
    assert (modes_of(model.reconstruct(pixels)) == modes_of(pixels)).float().mean() > 0.9
    # A decoder that does without z: the posterior is the prior.
    torch.nn.init.zeros_(model.to_latent.weight)
    torch.nn.init.zeros_(model.to_latent.bias)
    collapsed = model(pixels)
    assert "posterior collapse" in posterior_collapse(collapsed.latent_mean, collapsed.kl)


@torch.no_grad()
def test_a_gan_that_learns_covers_the_modes_and_a_collapsed_one_is_told():
    torch.manual_seed(0)
    with torch.enable_grad():
        objective = gan_objective(GANSettings(r1=1.0, r1_every=2, augment=()))
        gan = learned(TransformerGAN(GAN), objective, 400, lr=2e-3, betas=(0.0, 0.99))
    real, generated = bars().pixels, gan.sample(400, generator=torch.Generator().manual_seed(0))
    covered = classes_covered(modes_of(generated), MODES)
    assert covered == MODES
    manifold = precision_recall(real.flatten(1).float(), generated.flatten(1).float())
    assert mode_collapse(manifold, covered, MODES) == ""
    for parameter in (gan.generator.first, *gan.generator.styles[0], *gan.generator.styles[1]):
        torch.nn.init.zeros_(parameter.weight)  # always the same image
    collapsed = gan.sample(400)
    manifold = precision_recall(real.flatten(1).float(), collapsed.flatten(1).float())
    assert "mode collapse" in mode_collapse(manifold, classes_covered(modes_of(collapsed), MODES), MODES)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: GenerativeConfig(family="flow"), "family: got 'flow'"),
        (lambda: GANSettings(loss="wasserstein"), "gan.loss"),
        (lambda: GANSettings(augment=("flip",)), "gan.augment"),
        (lambda: VAESettings(free_bits=-1.0), "vae.free_bits"),
        (lambda: GenerativeModel(d_model=10, nhead=4), "model.d_model"),
        (lambda: configured("gan", "shakespeare", "run", 1), "data.path: 'shakespeare' is text"),
        (lambda: dataclasses.replace(defaults("gan"), optimizer=OptimizerConfig(accumulate=2)), "accumulate"),
        (
            lambda: prepare_data(dataclasses.replace(defaults(), data=dataclasses.replace(defaults().data, path="x"))),
            "x",
        ),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        wrong()


def test_batches_are_numbered():
    class Ones:
        def next_batch(self):
            return {"pixel_values": torch.ones(1)}

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            assert state == {}

    loader = Numbered(Ones())
    assert [loader.next_batch()["_batch"] for _ in range(3)] == [0, 1, 2]
    again = Numbered(Ones())
    again.load_state_dict(loader.state_dict())
    assert again.next_batch()["_batch"] == 3


def test_an_unfinished_run_is_not_written_over(file, tmp_path):
    config = configured("gan", file, tmp_path / "run", 1)
    trainer, _ = prepare(config, quiet=True)
    assert isinstance(trainer, Trainer) and isinstance(config.run, RunConfig)
    trainer.fit()
    with pytest.raises(FileExistsError, match=r"run\.out"):
        prepare(config, quiet=True)
