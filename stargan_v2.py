"""StarGAN v2, "StarGAN v2: Diverse Image Synthesis for Multiple Domains" (Choi, Uh, Yoo, Ha 2019,
arXiv:1912.01865v2).

In this file, in the order in which a picture meets it      paper
    Generator, MappingNetwork, StyleEncoder, Discriminator  sec. 2.1, Fig. 2, appendix (tables)
    discriminator_losses, generator_losses                  sec. 2.2, Eqs. (1)-(5)
    lambda_ds_at                                            sec. 2.2 (decays linearly to zero)
    train_step, train                                       sec. 3, appendix
    translate, align, app                                   Figs. 4-6: by latents, by references
    evaluate                                                Tables 2, 3, appendix: LPIPS and FID

    python stargan_v2.py                                    # toy faces, a CPU core, minutes
    python stargan_v2.py --data afhq
    python stargan_v2.py --data celeba_hq                   # with masks of a landmark network
    python stargan_v2.py translate --checkpoint RUN --input PHOTOS --domain dog --seeds 3
    python stargan_v2.py translate --checkpoint RUN --input PHOTOS --ref REFS --grid grid.png
    python stargan_v2.py align --input PHOTOS --out FACES   # as CelebA-HQ's faces lie
    python stargan_v2.py evaluate --checkpoint RUN
    python stargan_v2.py app --checkpoint RUN               # a web page

Names. The mapping network is the paper's F, so torch.nn.functional goes by its full name. A domain
is a folder of pictures; y is its number in alphabetical order, s a style code of that domain.

Results: README. Differs from the paper, with the official code (clovaai/stargan-v2): weight decay
for all networks; the style encoder learns from latents only; for faces high-pass skips and masks,
and a decoder without shortcuts. Differs from that code: averages start from the initial weights;
the two references of a step are drawn anew each time; large photos are reduced to twice the size
once, and then cropped; lambda_ds follows from the step, so that a run resumes as if nothing had
happened; a GPU trains in bfloat16; LPIPS is of 8-bit pictures, FID of the StyleGANs' Inception.
"""

import argparse
import copy
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import common
import ops_cuda as ops
from common import UserError

# =============================================================================
# The paper's numbers
# =============================================================================

LR, LR_F = 1e-4, 1e-6  # of G, D, E and of F, appendix: training details
BETAS, WEIGHT_DECAY = (0.0, 0.99), 1e-4  # Adam; the decay is added to the gradient
EMA_BETA = 0.999  # of the averages of G, F and E
LAMBDA_STY, LAMBDA_CYC = 1.0, 1.0  # Eq. (5)
LAMBDA_DS = 2.0  # likewise, at first: it falls to 0; 1 for CelebA-HQ, see PRESETS
R1_GAMMA = 1.0  # appendix: training details
ITERS, BATCH = 100_000, 8
CROP_PROB = 0.5  # of a random part of the picture instead of the whole
OUTPUTS = 10  # translations of a test picture to each domain, appendix: evaluation
CHANNEL_BASE, CHANNEL_MAX = 2**14, 512  # channels after the first convolution times side; most
TEST_PARTS = ("val", "test")  # folders of test pictures, beside train
MOST = 32  # pictures in a row or column of a grid
SKIPS = {32: 0, 64: 1, 128: 1}  # sides with a high-pass skip: which of the two masks it takes

# What goes with the networks; a --checkpoint has its own.
SIZES = dict(size=256, channel_base=CHANNEL_BASE, channel_max=CHANNEL_MAX, z_dim=16, style_dim=64)
SIZES |= dict(hidden_dim=512, channels=3, w_hpf=0.0)

PRESETS = {
    "celeba_hq": dict(w_hpf=1.0, lambda_ds=1.0),
    "afhq": dict(lambda_ds=2.0),
    "anime": dict(lambda_ds=2.0),  # photos and drawings: landmarks make no sense there
}
# What a plain `python stargan_v2.py` trains: small enough for a CPU core and six minutes.
TOY = dict(size=32, channel_base=512, channel_max=64, hidden_dim=64, z_dim=4, style_dim=4, batch=8)
TOY |= dict(iters=1700, lr=2e-3, lr_f=1e-4, lambda_ds=0.3, lambda_cyc=3.0, crop_prob=0.0)
TOY |= dict(ema_beta=0.995, every=500)

# =============================================================================
# Networks
# =============================================================================
# Layers have the names of the official checkpoints ("decode.0.norm1.fc.weight").


class Conv2d(nn.Conv2d):
    """A convolution of stride 1 whose second derivative, which R1 needs, is cheap.

    resample: "up": of x with doubled pixels; "down": followed by averages of 2x2 pixels. act and
    gain of the result come in one pass with the bias.
    """

    def __init__(self, I, O, k, padding=0, resample=None, bias=True, act="linear", gain=1.0):
        super().__init__(I, O, k, padding=padding, bias=bias)
        self.resample, self.act, self.gain = resample, act, gain

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):  # which knows PyTorch's own layers only
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w = self.weight.to(x.dtype)
        if self.resample == "up":
            x = ops.upscale_conv2d(x, w)
        elif self.resample == "down":
            x = ops.conv2d_downscale(x, w)
        else:
            x = ops.conv2d(x, w, padding=self.padding)
        return x if self.bias is None else ops.bias_act(x, self.bias, act=self.act, gain=self.gain)


class Norm(nn.InstanceNorm2d):
    """Instance norm with affine parameters, then leaky ReLU. forward(x): (N, C, H, W) -> same"""

    def __init__(self, C):
        super().__init__(C, affine=True)

    def forward(self, x):
        return ops.norm_act(x, self.weight, self.bias, "lrelu")


class ResBlock(nn.Module):
    """A pre-activation residual block of unit variance, for G's encoder, E and D.

    forward(x): (N, I, H, W) -> (N, O, H, W), half of both sides if `down`
    normalize: instance norm before each activation, in G alone: norm1 and norm2 hold both. Without
    it norm1 is the first activation, and conv1 ends with the second.
    """

    def __init__(self, I, O, normalize=False, down=False):
        super().__init__()
        act = "linear" if normalize else "lrelu"
        self.conv1 = Conv2d(I, I, 3, 1, resample="down" if down else None, act=act)
        self.conv2 = Conv2d(I, O, 3, 1, gain=math.sqrt(0.5))
        self.norm1 = Norm(I) if normalize else nn.LeakyReLU(0.2)
        self.norm2 = Norm(I) if normalize else nn.Identity()  # conv1 has the activation
        self.conv1x1 = Conv2d(I, O, 1, bias=False) if I != O else nn.Identity()
        self.down = down

    def forward(self, x):
        # The mean of 2x2 pixels and a 1x1 convolution may change places: here the cheap one first.
        skip = self.conv1x1(ops.pool2(x) if self.down else x)
        y = self.conv1(self.norm1(x))
        y = self.conv2(self.norm2(y))  # times sqrt(1/2), as the skip is
        return torch.add(y, skip, alpha=math.sqrt(0.5))


class AdaIN(nn.Module):
    """Adaptive instance norm (Huang and Belongie 2017), whose scale and shift the style sets, then
    leaky ReLU.

    forward(x, s): (N, C, H, W), (N, style_dim) -> (N, C, H, W)
    The scale is 1 + gamma, and gamma is random at first, as the weights of any layer are.
    """

    def __init__(self, style_dim, C):
        super().__init__()
        self.fc = nn.Linear(style_dim, 2 * C)

    def forward(self, x, s):
        gamma, beta = self.fc(s).chunk(2, 1)  # (N, C) each
        return ops.norm_act(x, 1 + gamma, beta, "lrelu")


class AdainResBlock(nn.Module):
    """A residual block of G's decoder, all of whose norms follow the style.

    forward(x, s): (N, I, H, W), (N, style_dim) -> (N, O, H, W), twice both sides if `up`
    With high-pass skips (w_hpf > 0) there is no shortcut: what of the source's detail is kept is
    theirs to say. The official networks hold its weights even so: they stay as they began.
    """

    def __init__(self, I, O, style_dim, w_hpf, up=False):
        super().__init__()
        self.conv1 = Conv2d(I, O, 3, 1, resample="up" if up else None)
        self.conv2 = Conv2d(O, O, 3, 1, gain=1 if w_hpf > 0 else math.sqrt(0.5))
        self.norm1, self.norm2 = AdaIN(style_dim, I), AdaIN(style_dim, O)
        self.conv1x1 = nn.Conv2d(I, O, 1, bias=False) if I != O else nn.Identity()
        self.conv1x1.requires_grad_(w_hpf == 0)
        self.w_hpf, self.up = w_hpf, up

    def forward(self, x, s):
        y = self.conv1(self.norm1(x, s))
        y = self.conv2(self.norm2(y, s))
        if self.w_hpf > 0:
            return y
        skip = self.conv1x1(x)  # before the doubling of pixels, which may change places with it
        if self.up:
            skip = ops.double(skip)
        return torch.add(y, skip, alpha=math.sqrt(0.5))


class HighPass(nn.Module):
    """What a pixel differs from its neighbours by, divided by w_hpf: a larger one keeps less.

    forward(x): (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, w_hpf):
        super().__init__()
        filter = torch.full((3, 3), -1.0)
        filter[1, 1] = 8.0
        self.register_buffer("filter", filter / w_hpf)

    def forward(self, x):
        C = x.shape[1]
        w = self.filter.to(x.dtype).expand(C, 1, 3, 3)
        return functional.conv2d(x, w, padding=1, groups=C)


def widths(size, n, channel_base, channel_max):
    """Channels before and after each of n blocks that halve the picture."""
    first = channel_base // size  # not limited by channel_max, as in the official code
    return [first] + [min(first * 2**k, channel_max) for k in range(1, n + 1)]


class Generator(nn.Module):
    """G: a picture x and a style s -> x in the domain and style of s (Fig. 2a).

    forward(x, s, masks=None) -> (N, img_channels, H, W), not limited to [-1, 1]: there is no tanh
        x: (N, img_channels, H, W) in [-1, 1]; H, W multiples of 2^halvings, one of them at least
        twice that
        s: (N, style_dim); masks: two of (N, 1, h, w) in [0, 1], where to keep the source's detail,
        for networks with high-pass skips (w_hpf > 0); None: no skips
    Raises ValueError if masks are given to a network without skips.
    """

    def __init__(
        self, size=256, style_dim=64, w_hpf=0.0, img_channels=3, channel_base=CHANNEL_BASE,
        channel_max=CHANNEL_MAX,
    ):  # fmt: skip
        super().__init__()
        self.config = dict(kind="G", size=size, style_dim=style_dim, w_hpf=w_hpf)
        self.config |= dict(img_channels=img_channels, channel_base=channel_base)
        self.config |= dict(channel_max=channel_max)
        halvings = int(math.log2(size)) - 4 + (w_hpf > 0)  # down to 16 pixels, or 8
        C = widths(size, halvings, channel_base, channel_max)
        pairs = list(zip(C, C[1:], strict=False))
        self.from_rgb = nn.Conv2d(img_channels, C[0], 3, padding=1)
        encode = [ResBlock(I, O, normalize=True, down=True) for I, O in pairs]
        encode += [ResBlock(C[-1], C[-1], normalize=True) for _ in range(2)]
        decode = [AdainResBlock(C[-1], C[-1], style_dim, w_hpf) for _ in range(2)]
        decode += [AdainResBlock(I, O, style_dim, w_hpf, up=True) for O, I in pairs[::-1]]
        self.encode, self.decode = nn.ModuleList(encode), nn.ModuleList(decode)
        # The activation, which has no weights, is a layer of its own in official checkpoints.
        self.to_rgb = nn.Sequential(Norm(C[0]), nn.Identity(), nn.Conv2d(C[0], img_channels, 1))
        if w_hpf > 0:
            self.hpf = HighPass(w_hpf)

    def forward(self, x, s, masks=None):
        if masks is not None and self.config["w_hpf"] == 0:
            raise ValueError("masks are for networks with high-pass skips, of w_hpf > 0")
        dtype, kept = x.dtype, {}
        x = self.from_rgb(x)
        for block in self.encode:
            if masks is not None and x.shape[2] in SKIPS:
                kept[x.shape[2]] = x  # of two blocks of one side the later one counts
            x = block(x)
        for block in self.decode:
            x = block(x, s)
            side = x.shape[2]
            if side in kept:
                mask = functional.interpolate(
                    masks[SKIPS[side]], kept[side].shape[2:], mode="bilinear"
                )
                x = x + self.hpf(mask.to(x.dtype) * kept[side])
        return self.to_rgb(x).to(dtype)


def of_domain(outputs, y):
    """outputs: (N, domains, ...), y: (N,) -> (N, ...), each sample's of its own domain."""
    return outputs[torch.arange(len(y), device=y.device), y]


class MappingNetwork(nn.Module):
    """F: a latent z and a domain y -> a style s (Fig. 2b): shared layers, a branch per domain.

    forward(z, y) -> s (N, style_dim); z: (N, z_dim) ~ N(0, 1), y: (N,) numbers of domains
    """

    def __init__(self, z_dim=16, style_dim=64, domains=2, hidden_dim=512):
        super().__init__()
        self.config = dict(kind="F", z_dim=z_dim, style_dim=style_dim, domains=domains)
        self.config |= dict(hidden_dim=hidden_dim)
        H = hidden_dim

        def mlp(*C):
            return [
                layer
                for I, O in zip(C, C[1:], strict=False)
                for layer in (nn.Linear(I, O), nn.ReLU())
            ]

        self.shared = nn.Sequential(*mlp(z_dim, H, H, H, H))
        branches = [
            nn.Sequential(*mlp(H, H, H, H), nn.Linear(H, style_dim)) for _ in range(domains)
        ]
        self.unshared = nn.ModuleList(branches)

    def forward(self, z, y):
        h = self.shared(z)
        return of_domain(torch.stack([branch(h) for branch in self.unshared], 1), y)


def trunk(size, img_channels, channel_base, channel_max):
    """What E and D have in common: halvings down to 4x4, then one vector. A list of layers for
    (N, img_channels, size, size) -> (N, C, 1, 1), and C."""
    C = widths(size, int(math.log2(size)) - 2, channel_base, channel_max)
    blocks = [ResBlock(I, O, down=True) for I, O in zip(C, C[1:], strict=False)]
    last = [nn.LeakyReLU(0.2), Conv2d(C[-1], C[-1], 4), nn.LeakyReLU(0.2)]
    return [Conv2d(img_channels, C[0], 3, 1), *blocks, *last], C[-1]


class StyleEncoder(nn.Module):
    """E: a reference x and its domain y -> its style s (Fig. 2c).

    forward(x, y) -> s (N, style_dim); x: (N, img_channels, size, size) in [-1, 1], y: (N,)
    """

    def __init__(
        self, size=256, style_dim=64, domains=2, img_channels=3, channel_base=CHANNEL_BASE,
        channel_max=CHANNEL_MAX,
    ):  # fmt: skip
        super().__init__()
        self.config = dict(kind="E", size=size, style_dim=style_dim, domains=domains)
        self.config |= dict(img_channels=img_channels, channel_base=channel_base)
        self.config |= dict(channel_max=channel_max)
        layers, C = trunk(size, img_channels, channel_base, channel_max)
        self.shared = nn.Sequential(*layers)
        self.unshared = nn.ModuleList([nn.Linear(C, style_dim) for _ in range(domains)])

    def forward(self, x, y):
        h = self.shared(x).flatten(1)
        return of_domain(torch.stack([head(h) for head in self.unshared], 1), y).to(x.dtype)


class Discriminator(nn.Module):
    """D: a logit per domain (Fig. 2d), of which the picture's own, or wanted, one counts.

    forward(x, y) -> logits (N,); x: (N, img_channels, size, size) in [-1, 1], y: (N,)
    """

    def __init__(
        self, size=256, domains=2, img_channels=3, channel_base=CHANNEL_BASE,
        channel_max=CHANNEL_MAX,
    ):  # fmt: skip
        super().__init__()
        self.config = dict(kind="D", size=size, domains=domains, img_channels=img_channels)
        self.config |= dict(channel_base=channel_base, channel_max=channel_max)
        layers, C = trunk(size, img_channels, channel_base, channel_max)
        self.main = nn.Sequential(*layers, Conv2d(C, domains, 1))

    def forward(self, x, y):
        return of_domain(self.main(x).flatten(1), y).to(x.dtype)


def init_weights(net):
    """He et al. 2015: weights of all convolutions and linear layers ~ N(0, 2 / fan-in), biases 0
    (appendix)."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net


def build(config):
    """The network that a `config` describes: what its attribute of that name held."""
    if config["kind"] == "FAN":  # borrowed, for masks
        return common.FAN()
    kind = dict(G=Generator, F=MappingNetwork, E=StyleEncoder, D=Discriminator)[config["kind"]]
    return kind(**{k: v for k, v in config.items() if k != "kind"})


# =============================================================================
# Losses
# =============================================================================


def adversarial_loss(logits, real):
    """How far D's logits are from calling pictures `real` (True or False), Eq. (1): cross entropy,
    mean over the batch."""
    return functional.softplus(-logits if real else logits).mean()


def r1_penalty(logits, real):
    """|grad_x D(x)|^2, mean over the batch (Mescheder et al. 2018). Weight it by r1_gamma / 2.

    logits: D(real), of real images that require a gradient.
    """
    with ops.no_weight_gradients():  # they come with the penalty's backward pass
        (grads,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return grads.square().sum([1, 2, 3]).mean()


def discriminator_losses(D, real, y, fake, y_fake):
    """{name: loss} of D for pictures of domains y and fakes that should be of domains y_fake."""
    real = real.detach().requires_grad_(True)
    logits = D(real, y)
    return {
        "D_real": adversarial_loss(logits, True),
        "D_fake": adversarial_loss(D(fake.detach(), y_fake), False),
        "reg/r1": r1_penalty(logits, real),
    }


def generator_losses(G, E, D, real, y, s, y_fake, other, masks, masks_of):
    """{name: loss} of G, and of the networks that made the style s, (N, style_dim) of domains
    y_fake.

    real: (N, C, size, size) of domains y; other: G(real) of another style, which is not learned
    from: styles are driven apart by this picture alone. masks: G's of real, or None;
    masks_of(picture): those of the fakes.
    """
    fake = G(real, s, masks)
    back = G(fake, E(real, y), masks_of(fake))
    return {
        "adv": adversarial_loss(D(fake, y_fake), True),  # Eq. (1)
        "sty": (E(fake, y_fake) - s).abs().mean(),  # Eq. (2), whose s is learned from, too
        "ds": (fake - other.detach()).abs().mean(),  # Eq. (3), to be made larger
        "cyc": (back - real).abs().mean(),  # Eq. (4)
    }


def lambda_ds_at(step, lambda_ds, iters):
    """The weight of Eq. (3) in step 0, 1, ...: down to zero in a straight line."""
    return lambda_ds * max(0.0, 1 - step / iters)


# =============================================================================
# Training
# =============================================================================


def average_of(net):
    """A copy for the running average of a network's weights. Taken after initialisation: the
    official one is taken before, and so begins with noise of its own."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema, nets, beta):
    """ema = lerp(nets, ema, beta), parameter by parameter: at 0.999 a half-life of 693 steps."""
    for average, net in zip(ema, nets, strict=True):
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - beta)


def no_masks(img):
    """The masks of networks without high-pass skips."""
    return None


def discriminator_phase(guide, nets, real, y, given, y_ref, masks, args, run):
    """Gradients of D for Eq. (1) and R1. guide: "latent" or "ref", what `given` is, latents (N,
    z_dim) or pictures, in whose styles fakes are made. Returns {name: loss}, unweighted."""
    G, F, E, D = nets
    style_of = F if guide == "latent" else E
    with torch.no_grad(), run.autocast():
        fake = G(real, style_of(given, y_ref), masks)
    with run.autocast():
        losses = discriminator_losses(D, real, y, fake, y_ref)
    run.backward(losses["D_real"] + losses["D_fake"] + args.r1_gamma / 2 * losses["reg/r1"])
    return {f"{name}_{guide}": loss.detach() for name, loss in losses.items()}


def generator_phase(
    guide, nets, real, y, given, given2, y_ref, masks, masks_of, lambda_ds, args, run
):  # fmt: skip
    """Gradients of Eq. (5) for those of G, F and E that learn now. guide: see discriminator_phase;
    given2: the others, from which diversity leads away; lambda_ds: (). Returns {name: loss}."""
    G, F, E, D = nets
    style_of = F if guide == "latent" else E
    # In an autocast of its own: it keeps the weights that it casts, and those cast under no_grad
    # would pass no gradients on below.
    with torch.no_grad(), run.autocast():
        other = G(real, style_of(given2, y_ref), masks)
    with run.autocast():
        s = style_of(given, y_ref)
        losses = generator_losses(G, E, D, real, y, s, y_ref, other, masks, masks_of)
    total = losses["adv"] + args.lambda_sty * losses["sty"] + args.lambda_cyc * losses["cyc"]
    run.backward(total - lambda_ds * losses["ds"])
    return {f"{name}_{guide}": loss.detach() for name, loss in losses.items()}


def train_step(nets, ema, opts, batch, lambda_ds, args, run, masks_of=no_masks):
    """One iteration: two steps of D, two of G, the first of them with F and E. Returns {name:
    loss}, unweighted, by what guided G: NAME_latent, NAME_ref.

    nets, opts: of G, F, E, D; ema: the averages of G, F, E; batch: pictures (N, C, size, size) in
    [-1, 1], two references of one domain for each; their domains y (N,) and y_ref (N,), to which
    latents lead, too; lambda_ds: as of this step; masks_of(picture): G's masks. `run` gives randn,
    autocast, backward(loss), which adds gradients, and graph(phase, *optimizers, key) -> a function
    of phase's arguments: the phase, from no gradients on, and a step of the optimizers with their
    means over all processes. A GPU repeats both as one CUDA graph, for each key, so that all that
    changes must be tensors.
    """
    (G, F, E, D), (opt_G, opt_F, opt_E, opt_D) = nets, opts
    real, ref, ref2, y, y_ref = batch
    z, z2 = (run.randn(len(real), F.config["z_dim"]) for _ in range(2))
    masks = masks_of(real)  # once for all phases
    lambda_ds = real.new_full((), lambda_ds)  # what changes must be a tensor

    # ---- D, in the style of a latent, then of a reference -------------------------------------
    D.requires_grad_(True)
    losses = {}
    for guide, given in (("latent", z), ("ref", ref)):
        update_D = run.graph(discriminator_phase, opt_D, key=guide)  # then a step of opt_D
        losses |= update_D(guide, nets, real, y, given, y_ref, masks, args, run)

    # ---- G, F and E, in the style of a latent; D only passes gradients on ---------------------
    D.requires_grad_(False)
    update = run.graph(generator_phase, opt_G, opt_F, opt_E)
    losses |= update("latent", nets, real, y, z, z2, y_ref, masks, masks_of, lambda_ds, args, run)

    # ---- G alone, in the style of a reference -------------------------------------------------
    # E learns to read styles off pictures in the phase above only; its author found results worse
    # when it also learns from this one (clovaai/stargan-v2, issue 44). So it passes gradients on.
    E.requires_grad_(False)
    update = run.graph(generator_phase, opt_G)
    losses |= update("ref", nets, real, y, ref, ref2, y_ref, masks, masks_of, lambda_ds, args, run)
    E.requires_grad_(True)

    # ---- the averages, with which samples, scores and translations are made -------------------
    update_ema(ema, (G, F, E), args.ema_beta)
    return losses


def new_networks(args, domains):
    """{"G", "F", "E", "D"} with fresh weights."""
    width = dict(channel_base=args.channel_base, channel_max=args.channel_max)
    both = dict(size=args.size, img_channels=args.channels) | width
    nets = {
        "G": Generator(style_dim=args.style_dim, w_hpf=args.w_hpf, **both),
        "F": MappingNetwork(args.z_dim, args.style_dim, domains, args.hidden_dim),
        "E": StyleEncoder(style_dim=args.style_dim, domains=domains, **both),
        "D": Discriminator(domains=domains, **both),
    }
    return {name: init_weights(net) for name, net in nets.items()}


def train(args):
    first = common.first_weights(args)
    given = load_networks(first)[0] if first else {}
    fill_options(args, given)
    args.ds_iters = args.ds_iters or args.iters  # stays when a finished run is lengthened
    run = common.Run("stargan_v2", args, script=__file__, precision="bf16")
    run.fixed += ("preset",)
    source = common.open_data(args.data, size=args.size, toy=common.TOY_DOMAIN_FOLDERS)

    # ---- data: item n is a pure function of (seed, n) -----------------------------------------
    # Twice the size is what crops of larger pictures are made of.
    prepare = functools.partial(common.at_most, 2 * args.size)
    domains = open_domains(args, source, ["train"], prepare)
    args.domains = ",".join(domains)
    data = list(domains.values())

    def item(n):
        """A picture of a random domain, two references of another or the same, both domains: each
        domain is as likely as any other, however many pictures it has."""
        rng = common.item_rng(args.seed, 0, n)
        y, y_ref = rng.integers(len(data), size=2)
        chosen = [data[d][rng.integers(len(data[d]))] for d in (y, y_ref, y_ref)]
        crop = functools.partial(common.crop_and_squeeze, size=args.size, rng=rng)
        pictures = [crop(x, crop_prob=args.crop_prob, flip=args.flip) for x in chosen]
        return *pictures, np.array([y, y_ref])

    # ---- networks, their averages, optimisers -------------------------------------------------
    nets = new_networks(args, len(data))
    nets |= {f"{name}_ema": average_of(nets[name]) for name in "GFE"}
    if given:
        common.copy_matching(nets, given, run.say)
    if args.w_hpf > 0:
        resumed = args.resume and common.last_checkpoint(args.resume)  # which holds its FAN
        nets["FAN"] = given.get("FAN") or (common.FAN() if resumed else common.load_fan(args.fan))
    nets = {name: net.to(run.device, memory_format=run.order) for name, net in nets.items()}
    masks_of = nets["FAN"].masks if args.w_hpf > 0 else no_masks
    trained, ema = [nets[name] for name in "GFED"], [nets[f"{name}_ema"] for name in "GFE"]
    rates = dict(G=args.lr, F=args.lr_f, E=args.lr, D=args.lr)
    opts = {
        name: run.adam([nets[name]], lr, BETAS, weight_decay=WEIGHT_DECAY)
        for name, lr in rates.items()
    }

    shown = open_shown(args, source, list(domains))
    examples = [images.all(2) for images in shown.values()]
    scored = any(common.has_subset(source, part) for part in TEST_PARTS)
    names = [f"{name}/{path}" for name, images in domains.items() for path in images.names]
    start = run.restore(nets, opts, {}, names)
    counts = ", ".join(f"{len(images)} of {name}" for name, images in domains.items())
    if args.w_hpf > 0:
        run.say("masks of face landmarks are on; for other data than photos of faces: --w-hpf 0")
    run.say(f"{len(data)} domains of {args.size}x{args.size} pictures: {counts}")
    if len(names) < args.batch:
        run.say(f"only {len(names)} pictures: a batch of {args.batch} holds each more than once")

    for step, (real, ref, ref2, ys) in run.batches(item, start, args.iters):
        y, y_ref = ys.unbind(1)
        lambda_ds = lambda_ds_at(step, args.lambda_ds, args.ds_iters)
        batch = (real, ref, ref2, y, y_ref)
        losses = train_step(trained, ema, opts.values(), batch, lambda_ds, args, run, masks_of)
        run.log(losses, lambda_ds=round(lambda_ds, 4))
        last = run.steps_done == run.total
        keep = last or run.due(args.keep_every * args.batch)
        if keep or run.due(args.every * args.batch):
            if run.rank == 0:
                sheets = sample_sheets(ema, examples, list(domains), masks_of)
                for name, (columns, rows) in sheets.items():
                    run.save_picture(columns, f"{run.steps_done:07d}-{name}", rows)
            if scored and run.rank == 0:
                row = scores(ema, shown, source.is_toy, masks_of)
                run.save_scores(row)
                run.say(common.describe_scores(row))
            run.save(keep=keep)
    run.say(f"samples and checkpoint are in {run.folder}")


def fill_options(args, nets):
    """Sizes that were left out: those of the networks to start from, else the paper's."""
    held = dict(SIZES)
    for name in ("F", "E", "G"):
        net = nets.get(name) or nets.get(f"{name}_ema")
        config = net.config if net else {}
        held |= {k: v for k, v in config.items() if k in held}
        held["channels"] = config.get("img_channels", held["channels"])
    common.set_missing(args, held)
    if args.size < 32 or args.size & (args.size - 1):
        raise UserError(f"--size {args.size}: a power of two from 32 on is needed.")
    if args.channel_base < args.size:
        raise UserError(f"--channel-base {args.channel_base} leaves no channels at {args.size} px.")
    if args.w_hpf > 0 and args.size < 64:
        raise UserError(f"--w-hpf {args.w_hpf:g} needs pictures of --size 64 or more.")


# =============================================================================
# Official checkpoints
# =============================================================================


# Names of networks in official checkpoints: ours.
OFFICIAL = {"generator": "G", "mapping_network": "F", "style_encoder": "E", "discriminator": "D"}
OFFICIAL |= {"fan": "FAN"}


def from_official(arrays):
    """{"G", "F", "E", "D", "FAN": network}, those that are there, of an official *_nets_ema.ckpt or
    *_nets.ckpt, {"generator.from_rgb.weight": tensor or array, ...}.

    Sizes are read off names and shapes; the side of the pictures off E or D, without them off the
    official width of G. Files of before April 2021 lack the high-pass filter: it is made anew.
    Raises ValueError for anything else.
    """
    found = {}
    for name, a in arrays.items():
        theirs, _, key = name.partition(".")
        if theirs not in OFFICIAL:
            raise ValueError(f"not a StarGAN v2 network: {name!r}")
        found.setdefault(OFFICIAL[theirs], {})[key.removeprefix("module.")] = torch.as_tensor(a)
    shapes = {net: {k: tuple(a.shape) for k, a in found[net].items()} for net in found}
    nets, base = {}, CHANNEL_BASE
    try:
        for net in sorted(found, key="EDGF".find):  # E and D tell the side, G follows
            config = official_config(net, shapes[net], base)
            if net == "G" and config["w_hpf"] > 0:
                name = "hpf.filter"
                if name in found[net]:
                    config["w_hpf"] = round(8 / float(found[net][name][1, 1]), 6)
                found[net] |= {name: HighPass(config["w_hpf"]).filter}
            nets[net] = build(config)
            nets[net].load_state_dict(found[net])
            base = config.get("channel_base", base)
    except KeyError as e:
        raise ValueError(f"not a StarGAN v2 network: no {e.args[0]!r}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise ValueError(f"its {net} does not fit: shapes or names of another network") from None
    except RuntimeError as e:
        raise ValueError(f"its {net} does not fit: {str(e).splitlines()[:2][-1].strip()}") from None
    return nets


def official_config(net, shape, channel_base):
    """The config of a network with tensors of these shapes."""
    if net == "FAN":
        return dict(kind="FAN")
    domains = 1 + max((int(k.split(".")[1]) for k in shape if k.startswith("unshared.")), default=0)
    if net == "F":
        hidden_dim, z_dim = shape["shared.0.weight"]
        style_dim = shape["unshared.0.6.weight"][0]
        config = dict(z_dim=z_dim, style_dim=style_dim, domains=domains, hidden_dim=hidden_dim)
    elif net == "G":
        first, img_channels = shape["from_rgb.weight"][:2]
        blocks = sum(k.endswith("conv2.weight") and k.startswith("encode.") for k in shape)
        last = shape[f"encode.{blocks - 1}.conv2.weight"][0]
        size = channel_base // first
        style_dim = shape["decode.0.norm1.fc.weight"][1]
        config = dict(size=size, style_dim=style_dim, channel_base=channel_base, channel_max=last)
        config |= dict(img_channels=img_channels, w_hpf=float(blocks - 2 > math.log2(size) - 4))
    else:
        layers = "shared" if net == "E" else "main"
        blocks = sum(k.endswith("conv2.weight") for k in shape)
        first, img_channels = shape[f"{layers}.0.weight"][:2]
        last, size = shape[f"{layers}.{blocks + 2}.weight"][0], 2 ** (blocks + 2)
        config = dict(size=size, img_channels=img_channels, channel_base=first * size)
        config |= dict(channel_max=last)
        if net == "E":
            config |= dict(domains=domains, style_dim=shape["unshared.0.weight"][0])
        else:
            config |= dict(domains=shape[f"main.{blocks + 4}.weight"][0])
    return dict(kind=net) | config


def load_networks(path):
    """({name: network}, options of its training) of a checkpoint or run folder of ours, or of an
    official *_nets_ema.ckpt, whose networks are averages, or *_nets.ckpt."""
    path = common.last_checkpoint(path) or path
    return common.load_networks(path, "stargan_v2", build, from_official)


# =============================================================================
# translate, app, evaluate
# =============================================================================


def open_domains(args, source, parts, prepare):
    """{domain: ImageSet}, one for each folder of the first of `parts` that there is, or of the
    source itself where there is none of them."""
    part = next((part for part in parts if common.has_subset(source, part)), None)
    tops = common.top_folders(source)
    if part is None and len(tops) == 1 and common.top_folders(common.subset(source, tops[0])):
        part = tops[0]  # a folder around all others, as zips have it
    source = common.subset(source, part) if part else source
    names = common.top_folders(source)
    cyclegan = {"trainA", "testA"} <= set(names)  # its tests are no domains
    if len(names) < 2 or cyclegan:
        found = (", ".join(names) or "none") + " (CycleGAN's layout)" * cyclegan
        raise UserError(
            f"--data {args.data}: folders of pictures in {source.path}: {found}. Give each of at"
            " least two domains one, as train/cat and train/dog."
        )
    if odd := [name for name in names if "," in name]:  # checkpoints list them with commas
        raise UserError(
            f"--data {args.data}: rename the folder {odd[0]!r}, a comma cannot be in it."
        )
    mode = "L" if args.channels == 1 else "RGB"
    data = {
        name: common.ImageSet(common.subset(source, name), prepare, mode, args.cache)
        for name in names
    }
    for images in data.values():
        images.room = next(iter(data.values())).room  # one limit of memory for all
    return data


def open_shown(args, source, domains):
    """{domain: ImageSet} of what samples and scores are made of: the test pictures or, where there
    are none, the training pictures; whole, not cropped."""
    prepare = functools.partial(common.squeezed, args.size)
    shown = open_domains(args, source, [*TEST_PARTS, "train"], prepare)
    if list(shown) != domains:
        names = ", ".join(shown)
        raise UserError(f"--data {args.data}: tests are of {names}, not of {', '.join(domains)}.")
    return shown


def device_of(net):
    return next(net.parameters()).device


@torch.no_grad()
def masks_for(images, masks_of, device, batch=16):
    """What masks_of says of uint8 images (N, C, size, size): two tensors (N, 1, h, w), or None."""
    found = [masks_of(common.to_float(x, device)) for x in images.split(batch)]
    return None if found[0] is None else [torch.cat(parts) for parts in zip(*found, strict=True)]


@torch.no_grad()
def translated(G, images, s, masks=None, batch=16):
    """uint8 images (N, C, size, size) in styles s, (N, style_dim) or one for all -> uint8 images,
    on the CPU. masks: those of the images."""
    device = device_of(G)

    def translations(x, s, *masks):
        return common.to_uint8(G(common.to_float(x, device), s, masks or None))

    s = s.expand(len(images), -1)
    return common.in_batches(translations, device, batch, images, s, *(masks or ()))


@torch.no_grad()
def styles_of_references(E, images, y, batch=16):
    """s (N, style_dim) of uint8 images (N, C, size, size), all of domain y."""
    device = device_of(E)
    parts = (common.to_float(x, device) for x in images.split(batch))
    return torch.cat([E(x, torch.full((len(x),), y, device=device)) for x in parts])


@torch.no_grad()
def styles_of_latents(F, z, y, psi=1.0):
    """s (N, style_dim) of z (N, z_dim) in domain y; psi: 1 as they are, 0 their domain's mean."""
    z = z.to(device_of(F))
    s = F(z, torch.full((len(z),), y, device=z.device))
    return s if psi == 1 else mean_style(F, y).to(s.dtype).lerp(s, psi)


def mean_style(F, y):
    """(style_dim,): the mean style of 10,000 latents in domain y, always the same."""
    z = torch.randn(10_000, F.config["z_dim"], generator=torch.Generator().manual_seed(0))
    return styles_of_latents(F, z.to(next(F.parameters()).dtype), y).mean(0)


def table(G, sources, styles, firsts, masks_of):
    """(columns, captions of rows) of a sheet laid out as Fig. 4: the first row has the sources,
    {caption: image}, each other one their translations in one of {caption: style}, to the right of
    what the style is of: firsts, a list of images, or None."""
    x = torch.stack(list(sources.values()))
    masks = masks_for(x, masks_of, device_of(G))
    rows = [x] + [translated(G, x, s[None], masks) for s in styles.values()]
    columns = dict(zip(sources, torch.stack(rows, 1), strict=True))
    if firsts is not None:
        columns = {"": torch.stack([torch.full_like(x[0], 255), *firsts])} | columns
    return columns, ["source", *styles]


def there_and_back(G, E, x, refs, y, y_ref, masks_of):
    """(fakes, reconstructions) of images x of domain y, in the styles of refs of domain y_ref."""
    masks = masks_for(x, masks_of, device_of(G))
    fake = translated(G, x, styles_of_references(E, refs, y_ref), masks)
    masks = masks_for(fake, masks_of, device_of(G))
    return fake, translated(G, fake, styles_of_references(E, x, y), masks)


def sample_sheets(ema, examples, domains, masks_of):
    """{name: (columns, captions of rows)} of sheets of the examples, uint8 images of each domain:
    "latent", in styles of three latents of each domain; "reference", in the styles of each other;
    "cycle", to the next domain and back."""
    G, F, E = ema
    z = common.latents(range(3), F.config["z_dim"])
    latents, references, sources, cycles = {}, {}, {}, {}
    for y, name in enumerate(domains):
        latents |= {f"{name} {k}": s for k, s in enumerate(styles_of_latents(F, z, y))}
        styles = styles_of_references(E, examples[y], y)
        references |= {f"{name} {k}": s for k, s in enumerate(styles)}
        sources |= {f"{name} {k}": x for k, x in enumerate(examples[y])}
        y_ref, n = (y + 1) % len(domains), len(examples[y])
        refs = examples[y_ref][torch.arange(n) % len(examples[y_ref])]
        four = (examples[y], refs, *there_and_back(G, E, examples[y], refs, y, y_ref, masks_of))
        cycles |= {f"{name} {k}": column for k, column in enumerate(torch.stack(four, 1))}
    return {
        "latent": table(G, sources, latents, None, masks_of),
        "reference": table(G, sources, references, list(sources.values()), masks_of),
        "cycle": (cycles, ["source", "reference", "fake", "reconstruction"]),
    }


def scores(ema, tests, is_toy, masks_of, n=50, diverse=10):
    """common.translation_scores of up to n test pictures of each domain in the style of references
    of each other domain, and the diversity: the mean difference of two translations of a picture,
    over ten latents and up to `diverse` pictures of each domain. On toy, where a reference's style
    should lead away from the true counterpart, also the error in the domain's mean style."""
    G, F, E = ema
    real = [images.all(n) for images in tests.values()]
    z = common.latents(range(10), F.config["z_dim"])
    parts, diversity, errors = {}, [], []
    for a, b in ((a, b) for a in range(len(real)) for b in range(len(real)) if a != b):
        x = real[a]
        refs = real[b][torch.arange(len(x)) % len(real[b])]
        masks = masks_for(x, masks_of, device_of(G))
        fake, rec = there_and_back(G, E, x, refs, a, b, masks_of)
        pair = dict(real=x, fake=fake, target=real[b], rec=rec)
        styles = styles_of_latents(F, z, b)
        few = masks and [mask[:diverse] for mask in masks]
        many = [translated(G, x[:diverse], s[None], few) for s in styles]
        diversity.append(common.mean_abs_of_pairs(torch.stack(many)))
        if is_toy:
            images, name = list(tests.values())[a], list(tests)[b]
            pair["true"] = images.counterparts(name, images.mode, n)
            mean = translated(G, x, mean_style(F, b)[None], masks)
            errors.append(common.mean_abs(mean, pair["true"]))
        for name, images in pair.items():
            parts.setdefault(name, []).append(images)
    row = common.translation_scores(**{name: torch.cat(images) for name, images in parts.items()})
    row["diversity"] = float(np.mean(diversity))
    return row | (dict(error_in_mean_style=float(np.mean(errors))) if is_toy else {})


def networks_of(args):
    """({"G", "F", "E": network}, the averages where there are any, on --device, with "FAN" where it
    is needed; masks_of; names of the domains; options of the training) of --checkpoint."""
    found, saved = load_networks(args.checkpoint)
    device = common.pick_device(args.device)
    nets = {}
    for name in "GFE":
        net = found.get(f"{name}_ema") or found.get(name)
        if net is None:
            raise UserError(f"--checkpoint {args.checkpoint} has no {name}.")
        nets[name] = net.to(device).eval().requires_grad_(False)
    has_masks, names = nets["G"].config["w_hpf"] > 0, domain_names(nets, saved)
    if "domains" not in saved and vars(args).get("ref") and Path(args.ref).is_dir():
        folders = common.top_folders(common.Folder(args.ref))
        names = folders if len(folders) == len(names) else names
    if has_masks or vars(args).get("align"):
        nets["FAN"] = (found.get("FAN") or common.load_fan(args.fan)).to(device)
    return nets, nets["FAN"].masks if has_masks else no_masks, names, saved


def preparations(args, nets):
    """PIL picture -> the square PIL picture that the networks take: for sources, for references.
    Without masks domains need not have faces: --align is of sources then."""
    size = nets["E"].config["size"]
    squeezed = functools.partial(common.squeezed, size)
    if not args.align:
        return squeezed, squeezed
    mean = common.load_mean_landmarks(args.landmarks)
    aligned = functools.partial(common.aligned, nets["FAN"], mean, size)
    return aligned, aligned if nets["G"].config["w_hpf"] > 0 else squeezed


def film_alphas():
    """The 31 steps from one style to the next: slow, fast, slow, and a rest of ten."""
    middle = [1 / (1 + math.exp(-t / 2)) for t in range(-10, 10)]
    return [0.0, *middle, *[1.0] * 10]


def domain_names(nets, saved):
    """The domains of a checkpoint. Official files do not say: those of the two published ones, as
    one knows them by their sizes, else the numbers."""
    if saved.get("domains"):
        return saved["domains"].split(",")
    count, G = nets["F"].config["domains"], nets["G"].config
    published = {(2, True): ["female", "male"], (3, False): ["cat", "dog", "wild"]}
    numbers = [str(k) for k in range(count)]
    return published.get((count, G["w_hpf"] > 0), numbers) if G["size"] == 256 else numbers


def number_of(domain, names):
    """The number of a domain that the user named, by its name or its number."""
    if domain in names:
        return names.index(domain)
    if domain.isdecimal() and int(domain) < len(names):
        return int(domain)
    raise UserError(f"--domain {domain}: the checkpoint has {', '.join(names)}.")


def chosen_styles(args, nets, names, prepare, mode):
    """[(domain's number, {caption: style}, images or None)] of --ref, or of --seeds in --domain."""
    F, E = nets["F"], nets["E"]
    if args.ref is None:
        y = number_of(args.domain, names)
        z = common.latents(args.seeds, F.config["z_dim"]).to(device_of(F))
        s = styles_of_latents(F, z, y, args.psi)
        captions = [f"{names[y]} {seed}" for seed in args.seeds]
        return [(y, dict(zip(captions, s, strict=True)), None)]
    folders = {name: Path(args.ref, name) for name in names if Path(args.ref, name).is_dir()}
    if args.domain is not None:
        name = names[number_of(args.domain, names)]
        folders = {name: folders.get(name, args.ref)}
    if not folders:
        raise UserError(
            f"--ref {args.ref}: of which domain is it? Pass --domain, one of {', '.join(names)}."
        )
    groups = []
    for name, folder in folders.items():
        files, images = common.read_pictures(folder, prepare, mode, "--ref")
        s = styles_of_references(E, images, names.index(name))
        captions = [f"{name}: {file}" for file in files]
        groups.append((names.index(name), dict(zip(captions, s, strict=True)), images))
    return groups


def film(G, sources, groups, masks_of):
    """Yields the frames, PIL pictures, of a film through the styles of each group, two or more in
    one at least: the sources over their translations, and to the left, of references, how one gives
    way to the next. The last frame rests."""
    size, masks = sources.shape[2], masks_for(sources, masks_of, device_of(G))
    for _, styles, images in groups:
        styles = list(styles.values())
        for k in range(len(styles) - 1):
            for alpha in film_alphas():
                s = styles[k].lerp(styles[k + 1], alpha)
                fakes = translated(G, sources, s[None], masks)
                rows = [sources, fakes]
                if images is not None:
                    y = round(alpha * size)
                    strip = torch.cat([images[k], images[k + 1]], 1)[None, :, y : y + size]
                    rows = [torch.cat([torch.full_like(strip, 255), sources])]
                    rows += [torch.cat([strip, fakes])]
                frame = common.grid(torch.cat(rows), len(rows[0]))
                yield frame
    yield from [frame] * 10  # before it begins again


def first_ones(pictures, what):
    """As many as a row or column of a grid shows."""
    if len(pictures) > MOST:
        print(f"the first {MOST} of {len(pictures)} {what}")
    return pictures[:MOST]


def translate(args):
    """Pictures in the style of a reference or latent; a grid of all with all; or a film."""
    if (args.ref is None) == (args.seeds is None):
        raise UserError("name the style: either --ref, or --seeds with --domain.")
    if args.ref is None and args.domain is None:
        raise UserError("--seeds needs --domain, the one to translate to.")
    if args.ref is not None and args.psi != 1:
        raise UserError("--psi truncates styles of latents: it goes with --seeds, not with --ref.")
    if args.grid and Path(args.grid).suffix.lower() != ".png":
        raise UserError(f"--grid {args.grid}: grids are PNG files: name one.")
    nets, masks_of, names, saved = networks_of(args)
    G, (prepare, prepare_ref) = nets["G"], preparations(args, nets)
    mode = "L" if G.config["img_channels"] == 1 else "RGB"
    groups = chosen_styles(args, nets, names, prepare_ref, mode)

    originals = [args.input] if args.ref is None else [args.input, args.ref]
    if args.grid or args.film:
        files, sources = common.read_pictures(args.input, prepare, mode, "--input")
        option = "--grid" if args.grid else "--film"
        common.keep_originals([args.grid or args.film], option, *originals)
        sources = first_ones(sources, "pictures of --input")
    if args.grid:
        styles = first_ones([item for _, styles, _ in groups for item in styles.items()], "styles")
        firsts = None if args.ref is None else [x for _, _, images in groups for x in images][:MOST]
        sources = dict(zip(files, sources, strict=False))
        common.save_sheet(args.grid, *table(G, sources, dict(styles), firsts, masks_of))
        print(args.grid)
    elif args.film:
        steps = sum(len(styles) - 1 for _, styles, _ in groups)
        if steps == 0:
            raise UserError("--film goes from one style to another: give two of one domain.")
        columns = len(sources) + (args.ref is not None)
        size = common.grid(sources[:1], 1).width  # of a picture in it
        common.check_film(args.film, (columns * size, 2 * size), steps * len(film_alphas()))
        common.save_film(args.film, film(G, sources, groups, masks_of), fps=15)
        print(args.film)
    else:
        styles = [(names[y], s) for y, styles, _ in groups for s in styles.values()]
        if len(styles) > 1:
            raise UserError(f"{len(styles)} styles: pass --grid or --film, or a single one.")

        def function(img):
            image = common.stack([common.pixels(prepare(img))])
            masks = masks_for(image, masks_of, device_of(G))
            return common.to_picture(translated(G, image, styles[0][1][None], masks)[0])

        print(f"to {styles[0][0]} with {args.checkpoint}, trained on {saved.get('data', '?')}")
        common.map_pictures(args.input, args.out, mode, function, originals)


def align(args):
    """Photos of faces, turned, scaled and moved to where those of CelebA-HQ lie."""
    common.picture_files(args.input, "--input")  # before anything is fetched
    fan, mean = common.load_fan(args.fan), common.load_mean_landmarks(args.landmarks)
    fan = fan.to(common.pick_device(args.device))
    function = functools.partial(common.aligned, fan, mean, args.size)
    common.map_pictures(args.input, args.out, "RGB", function)


def app(args):
    """A web page on which visitors have their pictures translated, in the style of a latent or of a
    picture of the domain that they choose. Truncation, --psi, and --align are the server's."""
    nets, masks_of, names, saved = networks_of(args)
    G, F, E = (nets[name] for name in "GFE")
    prepare, prepare_ref = preparations(args, nets)
    mode = "L" if G.config["img_channels"] == 1 else "RGB"

    def prepared(img, prepare):
        return common.stack([common.pixels(prepare(img.convert(mode)))])

    def function(img, domain, seed, reference):
        if reference is None:
            z = common.latents([seed], F.config["z_dim"])
            s = styles_of_latents(F, z, domain, args.psi)
        else:
            s = styles_of_references(E, prepared(reference, prepare_ref), domain)
        image = prepared(img, prepare)
        masks = masks_for(image, masks_of, device_of(G))
        return common.to_picture(translated(G, image, s, masks)[0])

    title = f"StarGAN v2 {Path(saved.get('data', '')).stem}".strip()
    common.serve_page(args, title, function, domains=names, styles=True)


# ---- evaluate: the protocol of the appendix ------------------------------------------------------
# Appendix: every test picture goes to every other domain, ten times. LPIPS tells how much the ten
# differ, FID whether all look like the domain's training pictures. Tables 2 and 3 have the means
# over the pairs of domains.

TABLE = ("fd8", "fid", "kid_x1000", "lpips", "diversity")
OF_TOY = ("error", "error_in_mean_style", "error_of_doing_nothing")


def random_styles(nets, y, n, refs, rng):
    """{"latent", "reference": styles (n, 10, style_dim) of domain y}, of latents and of pictures
    refs, all of which are used once before any is used again."""
    total, F = n * OUTPUTS, nets["F"]
    rounds = math.ceil(total / len(refs))
    order = torch.cat([torch.randperm(len(refs), generator=rng) for _ in range(rounds)])[:total]
    z = torch.randn(total, F.config["z_dim"], generator=rng)
    of_refs = styles_of_references(nets["E"], refs, y)
    found = {"latent": styles_of_latents(F, z, y), "reference": of_refs[order.to(of_refs.device)]}
    return {mode: s.unflatten(0, (n, OUTPUTS)) for mode, s in found.items()}


@torch.no_grad()
def translated_often(G, sources, styles, masks_of, lpips, batch=32):
    """uint8 images (N * 10, C, size, size), of sources (N, ...) in styles (N, 10, style_dim),
    and how much the ten of a picture differ, the mean of their 45 pairs, {"diversity": in pixels,
    "lpips": if there is that network}: means over batches, as in the official code."""
    device, fakes, rows = device_of(G), [], []
    for x, s in zip(sources.split(batch), styles.split(batch), strict=True):
        masks = masks_for(x, masks_of, device)
        ten = [translated(G, x, s_k, masks) for s_k in s.unbind(1)]
        fakes.append(torch.stack(ten, 1).flatten(0, 1))
        rows.append({"diversity": common.mean_abs_of_pairs(torch.stack(ten).to(device))})
        if lpips:
            with common.exact_float32(device):
                features = [lpips.features(common.to_float(fake, device)) for fake in ten]
            # LPIPS is their squared distance, whose mean over all pairs is twice the variance.
            rows[-1]["lpips"] = 2 * torch.stack(features).var(0).sum(1).mean().item()
    return torch.cat(fakes), {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}


def print_row(name, row, columns):
    """A line of the table of scores; what a row lacks stays blank."""
    cells = (f"{row[k]:.4f}" if k in row else "" for k in columns)
    cells = (f"{text:>{max(11, len(k) + 2)}}" for k, text in zip(columns, cells, strict=True))
    print(f"{name:40}" + "".join(cells), flush=True)


def evaluate(args):
    """Prints a table, a row for each ordered pair of domains and each way to choose styles."""
    nets, masks_of, names, saved = networks_of(args)
    args.size, device = nets["E"].config["size"], device_of(nets["G"])
    args.channels = nets["G"].config["img_channels"]
    args.data = common.data_of(args, saved)
    source = common.open_data(args.data, size=args.size, toy=common.TOY_DOMAIN_FOLDERS)
    train = open_domains(args, source, ["train"], functools.partial(common.squeezed, args.size))
    if len(train) != len(names) or (saved.get("domains") and list(train) != names):
        there = f"--data {args.data} has the domains {', '.join(train)}"
        raise UserError(f"{there}, the checkpoint {', '.join(names)}.")
    if not any(common.has_subset(source, part) for part in TEST_PARTS):
        raise UserError(f"--data {args.data} has no test pictures: neither val nor test.")
    tests = open_shown(args, source, list(train))
    inception = common.load_inception_or_explain(args.inception, device)
    load, files = common.load_lpips_alex, (args.alexnet, args.lpips)
    lpips = common.load_or_explain("LPIPS is left out", load, *files, device=device)
    print(
        f"protocol: every test picture {OUTPUTS} times to every other domain, in styles of latents"
        f" and of its test pictures, against its training pictures; {args.size}x{args.size}"
    )
    counts = [f"{name} {len(train[name])} + {len(tests[name])}" for name in train]
    print(f"training + test pictures: {', '.join(counts)}")
    if inception:
        print(
            f"FID and KID: {inception.label}, resize {args.fid_resize}. The official FIDs are of"
            " another Inception, torchvision's, and do not compare."
        )
    if lpips:
        print(f"LPIPS: {lpips.label}")

    result = dict(data=args.data, size=args.size, outputs=OUTPUTS, seed=args.seed)
    result |= dict(lpips_features=lpips.label) if lpips else {}
    result |= dict(latent={}, reference={})
    absent = () if inception else ("fid", "kid_x1000")
    absent += () if lpips else ("lpips",)
    columns = [k for k in TABLE if k not in absent] + list(OF_TOY) * source.is_toy
    print(" " * 40 + "".join(f"{k:>{max(11, len(k) + 2)}}" for k in columns))
    rng = torch.Generator().manual_seed(args.seed)
    pictures = {name: images.all() for name, images in tests.items()}
    for y, target in enumerate(train):
        # Training sets can be too large to be held: fd8 needs 8x8 pixels, FID passes over all.
        reals = train[target].batches
        small = torch.cat([common.averaged(x) for x in reals()])
        if inception and len(small) > 1:  # a covariance needs two
            statistics = common.real_statistics(reals, inception, args.fid_resize)
        for name in (name for name in train if name != target):
            x = pictures[name]
            if source.is_toy:
                s = mean_style(nets["F"], y)[None]
                in_mean_style = translated(nets["G"], x, s, masks_for(x, masks_of, device))
                true = tests[name].counterparts(target, tests[name].mode)
            for mode, s in random_styles(nets, y, len(x), pictures[target], rng).items():
                fakes, row = translated_often(nets["G"], x, s, masks_of, lpips)
                row |= common.translation_scores(x, fakes, small)
                if inception and "fd8" in row:
                    row |= common.fid_kid(statistics, fakes, inception, args.fid_resize)
                if source.is_toy:
                    row["error"] = common.mean_abs(fakes, true.repeat_interleave(OUTPUTS, 0))
                    row["error_in_mean_style"] = common.mean_abs(in_mean_style, true)
                    row["error_of_doing_nothing"] = common.mean_abs(x, true)
                result[mode][f"{name} to {target}"] = row
                print_row(f"{mode}: {name} to {target}", row, columns)
    for mode in ("latent", "reference"):
        rows = list(result[mode].values())
        means = ((k, [row[k] for row in rows if k in row]) for k in columns)
        mean = {k: float(np.mean(values)) for k, values in means if len(values) == len(rows)}
        result[mode]["mean"] = mean
        print_row(f"{mode}: mean", mean, columns)
    for warning in {row["warning"] for row in rows if "warning" in row}:  # of either mode, alike
        print(warning)
    if args.out:
        common.write_json(args.out, result)


# =============================================================================
# Command line
# =============================================================================


def add_landmark_options(p):
    p.add("--fan", help="wing.ckpt, where landmarks are needed and it cannot be fetched")
    p.add("--landmarks", help="celeba_lm_mean.npz, of aligned faces, likewise")


def main(argv=None):
    cli = common.CommandLine("stargan_v2.py", __doc__, {"toy": TOY} | PRESETS, tuple(SIZES))
    count, above_0, from_0 = common.positive_int, common.positive, common.not_negative
    to_align = "turn, scale and move sources as the command align does; with masks references, too"

    p = cli.command("train", train, "train on folders of pictures, a domain each (default command)")
    common.add_train_options(
        p, batch=BATCH, every="iterations", default_every=5000, gpu_precision="bf16"
    )
    presets = "options for such data; else by --data's name; anime: best in greyscale, --channels 1"
    p.add("--preset", choices=list(PRESETS), help=presets)
    p.add("--iters", type=count, default=ITERS, help="length of the training")
    p.add("--lr", type=above_0, default=LR, help="Adam's learning rate, of G, D and E")
    p.add("--lr-f", type=above_0, default=LR_F, help="that of the mapping network F")
    p.add("--lambda-sty", type=from_0, default=LAMBDA_STY, help="weight of style reconstruction")
    p.add("--lambda-ds", type=from_0, default=LAMBDA_DS, help="of diversity, at first; faces: 1")
    p.add("--ds-iters", type=count, help="until that weight is 0: as --iters at first")
    p.add("--lambda-cyc", type=from_0, default=LAMBDA_CYC, help="weight of cycle consistency")
    p.add("--r1-gamma", type=from_0, default=R1_GAMMA, help="weight of R1, halved")
    p.add("--ema-beta", type=common.fraction, default=EMA_BETA, help="of the weights' averages")
    p.add("--crop-prob", type=common.probability, default=CROP_PROB, help="of random crops")
    flip = dict(action=argparse.BooleanOptionalAction, default=True)
    p.add("--flip", **flip, help="mirror at random")
    p.add("--size", type=count, help="pixels; this and the rest: 256, or as a --checkpoint has it")
    p.add("--w-hpf", type=from_0, help="high-pass skips with face masks; 0: none; larger: weaker")
    p.add("--fan", help="wing.ckpt for these masks, where it cannot be fetched")
    p.add("--channels", type=int, choices=(1, 3), help="3; 1: greyscale")
    p.add("--channel-base", type=count, help="channels at first times side: 16384")
    p.add("--channel-max", type=count, help="channels at most: 512")
    p.add("--z-dim", type=count, help="of latents: 16")
    p.add("--style-dim", type=count, help="of styles: 64")
    p.add("--hidden-dim", type=count, help="of layers of F: 512")
    p.add("--keep-every", type=count, default=10_000, help="iterations between kept checkpoints")

    p = cli.command("translate", translate, "pictures in the style of a reference or a latent")
    p.add("--checkpoint", required=True, help="ours, a run folder, or an official .ckpt")
    p.add("--input", required=True, help="a picture or a folder")
    p.add("--ref", help="a picture, a folder of --domain, or one with a folder per domain")
    p.add("--domain", help="to translate to: a name or a number")
    p.add("--seeds", type=common.seeds, help="styles of latents, as in 0-7,42")
    p.add("--psi", type=common.finite, default=1.0, help="truncation: 0 is the mean style")
    to = p.add_mutually_exclusive_group()
    out = "folder to write PNG files to, or one .png file (default: %(default)s)"
    to.add_argument("--out", default="out", help=out)
    grid = ".png: pictures in columns, styles in rows, all with all"
    to.add_argument("--grid", metavar="FILE", help=grid)
    film = ".webp, .gif or .png: from style to style"
    to.add_argument("--film", metavar="FILE", help=film)
    p.add("--align", action="store_true", help=to_align)
    add_landmark_options(p)
    common.add_device_option(p)

    p = cli.command("align", align, "turn, scale and move photos of faces as those of CelebA-HQ")
    p.add("--input", required=True, help="a picture or a folder; faces have to fill most of each")
    p.add("--out", default="out", help="folder to write PNG files to, or one .png file")
    p.add("--size", type=count, default=256, help="pixels, of the results")
    add_landmark_options(p)
    common.add_device_option(p)

    p = cli.command("evaluate", evaluate, "FID, KID, LPIPS, fd8 and diversity on the test pictures")
    common.add_evaluate_options(p)
    p.add("--alexnet", help="alexnet-owt-7be5be79.pth, where it cannot be fetched")
    p.add("--lpips", help="the LPIPS weights of AlexNet, likewise")
    p.add("--seed", type=common.one_seed, default=0, help="of latents and references")
    p.add("--fan", help="wing.ckpt, where masks are needed and cannot be fetched")

    p = cli.command("app", app, "a web page: choose picture, domain and style, save the result")
    common.add_app_options(p)
    p.add("--psi", type=common.finite, default=1.0, help="truncation: 0 is the mean style")
    p.add("--align", action="store_true", help=to_align)
    add_landmark_options(p)

    args = cli.parse(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))
