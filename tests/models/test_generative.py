"""VAEs, the GAN and the image GPT: likelihoods add up to one, bounds are below the evidence, checkpoints come back."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastformer.models import (
    ImageGPT,
    ImageGPTConfig,
    PreTrainedConfig,
    TransformerGAN,
    TransformerGANConfig,
    TransformerTextVAE,
    TransformerTextVAEConfig,
    TransformerVAE,
    TransformerVAEConfig,
    from_pretrained,
)
from fastformer.models.latent import LatentModel, gaussian_kl, importance_weighted_bound, slerp
from fastformer.models.pixels import PixelDistribution, from_patches, to_patches

VAE = TransformerVAEConfig(image_size=4, levels=5, latent_size=3, d_model=16, nhead=2, num_layers=1)
TEXT = TransformerTextVAEConfig(vocab_size=11, max_length=8, latent_size=3, d_model=16, nhead=2, num_layers=1)
GAN = TransformerGANConfig(
    image_size=4, levels=5, latent_size=3, d_model=16, nhead=2, num_layers=1, discriminator_width=8
)
GPT = ImageGPTConfig(image_size=2, levels=2, num_labels=3, d_model=16, nhead=2, num_layers=1)
MODELS = ((TransformerVAE, VAE), (TransformerTextVAE, TEXT), (TransformerGAN, GAN), (ImageGPT, GPT))


def made(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def images(count=3, side=4, levels=5):
    return torch.randint(levels, (count, 1, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def texts():
    ids = torch.tensor([[1, 2, 3, 4, 9], [5, 6, 9, 9, 9]])
    return ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("cls, config", MODELS)
def test_a_saved_model_comes_back(cls, config, tmp_path):
    model = made(cls, config)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    again.config.extra.clear()  # architectures, dtype
    assert type(again) is cls and again.config == config
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    samples = [m.sample(2, generator=torch.Generator().manual_seed(3)) for m in (model, again)]
    assert samples[0] == samples[1] if cls is TransformerTextVAE else torch.equal(*samples)


@pytest.mark.parametrize("likelihood", ["categorical", "logistic"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_probabilities_of_a_pixel_add_up_to_one(likelihood, levels):
    pixels = PixelDistribution(likelihood, levels, 3)
    parameters = 3 * torch.randn(6, pixels.num_parameters, generator=torch.Generator().manual_seed(0))
    each = torch.stack([pixels.log_prob(parameters, torch.full((6,), level)) for level in range(levels)])
    torch.testing.assert_close(each.exp().sum(0), torch.ones(6))
    drawn = pixels.sample(parameters[:1].expand(4000, -1), torch.Generator().manual_seed(0)).long()
    frequencies = torch.bincount(drawn, minlength=levels) / 4000
    assert (frequencies - each[:, 0].exp()).abs().max() < 0.04


def test_patches_and_back():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert torch.equal(from_patches(to_patches(x, 2), 2, 3, 4)[..., 0], x)
    assert to_patches(x, 2)[0, 1, :4].tolist() == [2.0, 3.0, 6.0, 7.0]  # the second patch of the first row


def test_probabilities_of_all_images_add_up_to_one():
    model = made(ImageGPT, GPT)
    every = torch.tensor(list(itertools.product(range(2), repeat=4)), dtype=torch.uint8).view(16, 1, 2, 2)
    for labels in (torch.full((16,), 2), None):
        assert abs(float(model.log_prob(every, labels).exp().sum()) - 1) < 1e-5
    drawn = model.sample(4000, torch.full((4000,), 2), generator=torch.Generator().manual_seed(0)).flatten(1)
    codes = (drawn.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    expected = model.log_prob(every, torch.full((16,), 2)).exp()
    assert (torch.bincount(codes, minlength=16) / 4000 - expected).abs().max() < 0.03


def test_kl_of_gaussians():
    mean, log_variance = torch.randn(2, 5, 4).double()
    theirs = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), theirs)


class LinearGaussian(LatentModel):
    """x = W z + noise: log p(x) is known, and so is the posterior, from which this one is ``off``."""

    config_class = PreTrainedConfig

    def __init__(self, off):
        torch.nn.Module.__init__(self)
        self.off = off
        self.w = torch.tensor([[1.0], [-0.5], [2.0]])

    def encode(self, x):
        variance = 1 / (1 + (self.w.T @ self.w / 0.25))
        return x @ self.w @ variance / 0.25 + self.off, (variance.log() + self.off).expand(len(x), 1)

    def log_likelihood(self, latents, x):
        return Normal(latents @ self.w.T, 0.5).log_prob(x).sum(-1)

    def count(self, x):
        return x.numel()


def test_bounds_of_a_model_whose_evidence_is_known():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    exact = LinearGaussian(0.0)
    evidence = MultivariateNormal(torch.zeros(3), exact.w @ exact.w.T + 0.25 * torch.eye(3)).log_prob(x)
    # With the true posterior every sample's weight is the evidence.
    torch.testing.assert_close(exact.log_weights(3, x=x), evidence[:, None].expand(-1, 3), atol=1e-3, rtol=1e-3)
    off = LinearGaussian(0.2)
    elbo = -torch.stack([off.bound({"x": x}).bound for _ in range(100)]).mean()
    bounds = [importance_weighted_bound(off.log_weights(k, x=x)).mean() for k in (1, 4, 64)]
    one_by_one = off.log_weights(100, x=x).mean()
    assert abs(elbo - one_by_one) < 0.1
    assert elbo + 0.1 < bounds[1] < bounds[2] < evidence.mean() + 1e-2
    assert evidence.mean() - bounds[2] < 0.1


def test_what_is_minimised():
    """The weight multiplies the KL; free bits are a floor under each latent's mean KL."""
    model, x = made(TransformerVAE, VAE), images()
    plain, no_kl, floor = (
        torch.manual_seed(5) and model(x, kl_weight=weight, free_bits=free)
        for weight, free in ((1.0, 0.0), (0.0, 0.0), (1.0, 4.0))
    )
    torch.testing.assert_close(plain.loss, plain.bound.sum() / x.numel())
    torch.testing.assert_close(no_kl.loss, -no_kl.log_likelihood.sum() / x.numel())
    charged = plain.kl.mean(0).clamp(min=4.0).sum() * len(x)
    torch.testing.assert_close(floor.loss - no_kl.loss, charged / x.numel())
    assert charged > plain.kl.sum()


def test_padding_is_not_read_and_not_scored():
    model, (ids, mask) = made(TransformerTextVAE, TEXT), texts()
    alone = model.encode(ids[1:, :3])
    torch.testing.assert_close(model.encode(ids, mask)[0][1:], alone[0])
    z = torch.randn(2, 3)
    scored = model.log_likelihood(z, ids, mask)[1:]
    torch.testing.assert_close(scored, model.log_likelihood(z[1:], ids[1:, :3]))


def test_a_text_is_written_from_its_latents_with_a_cache():
    """Each token that is written is the likeliest by the scores of a run without a cache."""
    model = made(TransformerTextVAE, TEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # else the choice is close
    z = torch.randn(2, 3)
    for row, written in enumerate(model.decode(z)):
        assert all(token < TEXT.bos_token_id for token in written)
        for place in range(len(written)):
            options = torch.tensor([[*written[:place], token] for token in range(9)])
            likely = model.log_likelihood(z[row].expand(9, -1), options).argmax()
            assert int(likely) == written[place]
    assert len(model.interpolate(*texts()[0].split(1), steps=3)) == 3


def test_slerp_stays_on_the_sphere():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    path = slerp(a, b, torch.tensor([[0.0], [0.5], [1.0]]))
    torch.testing.assert_close(path, torch.tensor([[1.0, 0.0], [math.sqrt(0.5)] * 2, [0.0, 1.0]]), atol=1e-5, rtol=0)


def test_images_of_a_vae():
    model, x = made(TransformerVAE, VAE), images()
    assert model.interpolate(x[:2], x[1:], steps=5).shape == (2, 5, 1, 4, 4)
    assert torch.equal(model.interpolate(x[:1], x[1:2])[:, -1], model.reconstruct(x[1:2]))
    assert model.sample(2, draw=True).dtype == torch.uint8


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: TransformerVAEConfig(patch_size=3), "patch_size: 3"),
        (lambda: TransformerVAEConfig(likelihood="normal"), "likelihood: 'normal'"),
        (lambda: TransformerGANConfig(d_model=24), "d_model: 24"),
        (lambda: ImageGPTConfig(levels=1), "levels: 1"),
        (lambda: TransformerTextVAEConfig(word_dropout=2), "word_dropout: 2"),
        (lambda: made(TransformerVAE, VAE)(images() + 1), "pixel_values: values"),
        (lambda: made(TransformerVAE, VAE)(images(side=2)), "pixel_values: shape"),
        (lambda: made(TransformerVAE, VAE)(images(), kl_weight=-1.0), "kl_weight"),
        (lambda: made(ImageGPT, GPT)(images(side=2, levels=2)), "labels: needed"),
        (lambda: made(ImageGPT, GPT)(images(side=2, levels=2), torch.tensor([0, 1, 3])), "labels: not all"),
        (lambda: made(TransformerGAN, GAN)(torch.randn(2, 4)), "latents: shape"),
        (lambda: made(TransformerTextVAE, TEXT)(torch.zeros(1, 9, dtype=torch.long)), "input_ids: 9 tokens"),
        (lambda: made(TransformerGAN, GAN).sample(0), "count: got 0"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_pixels_are_whole_numbers():
    with pytest.raises(TypeError, match="pixel_values"):
        made(TransformerVAE, VAE)(images().float())
