"""StyleGAN, "A Style-Based Generator Architecture for Generative Adversarial Networks" (Karras,
Laine, Aila 2018, arXiv:1812.04948), grown progressively (Karras et al. 2017, arXiv:1710.10196).

In this file, in the order of the signal              paper
    MappingNetwork                                    sec. 2, Fig. 1b; truncation: appendix B
    instance_norm, Epilogue, SynthesisNetwork         sec. 2, Eq. (1), Fig. 1b
    Discriminator                                     Karras et al. 2017, with bilinear resampling
    losses: logistic with R1, WGAN-GP                 sec. 2.1, appendix C
    schedule, train                                   appendix C; style mixing: sec. 3.1
    generate                                          Figs. 3 (mixing), 4-5 (noise), 8 (truncation)
    evaluate                                          path length and separability: secs. 4.1-4.2

    python stylegan.py                                # toy faces, 2 CPU cores, minutes
    python stylegan.py --data FOLDER_OR_ZIP --size 256 --mirror
    python stylegan.py generate --checkpoint RUN --seeds 0-7
    python stylegan.py generate --checkpoint RUN --figure mixing --mix-rows 0-2 --mix-cols 3-7
    python stylegan.py evaluate --checkpoint RUN

Results: README. Differs from the paper, with the official code (NVlabs/stylegan): noise, bias and
leaky ReLU come before the normalisation, which Fig. 1 leaves open; R1 is that of images enlarged to
full size, so that it weighs four times as much after each doubling of the resolution. Differs from
both: a GPU computes the four highest resolutions in float16 and convolves in TF32 in the others;
--precision fp32 is the paper's way.
"""

import argparse
import bisect
import copy
import functools
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
import ops_cuda as ops
from common import UserError

# =============================================================================
# The paper's numbers
# =============================================================================

TRADITIONAL = dict(const_input=False, noise_inputs=False, mixing=0.0)
PROGAN = TRADITIONAL | dict(map_layers=0, use_styles=False, pixel_norm=True, instance_norm=False)
CONFIGS = {  # Table 1, each row what it changes of row F
    "A": PROGAN | dict(blur=False, loss="wgan-gp", start_size=4, kimg=12000),
    "B": PROGAN,
    "C": TRADITIONAL,
    "D": dict(noise_inputs=False, mixing=0.0),
    "E": dict(mixing=0.0),
    "F": {},
}
LOSSES = {  # what D's loss is regularized with; logistic: FFHQ and LSUN, wgan-gp: CelebA-HQ
    "logistic": dict(r1_gamma=10.0),
    "saturating": dict(r1_gamma=10.0),
    "wgan": {},
    "wgan-gp": dict(gp_lambda=10.0, lr_max=0.002),
    "hinge": {},
    "hinge-gp": dict(gp_lambda=10.0),
}
DRIFT = 0.001  # of wgan: keeps D's logits on real images near 0
# By resolution: images per step (of eight GPUs, 32 where none is given), factor of the learning
# rate (1), and thousands of images between snapshots.
BATCHES = {4: 512, 8: 256, 16: 128, 32: 64}
RATES = {128: 1.5, 256: 2, 512: 3, 1024: 3}
TICKS = {4: 160, 8: 140, 16: 120, 32: 100, 64: 80, 128: 60, 256: 40, 512: 30, 1024: 20}
LR, BETAS, EPS = 0.001, (0.0, 0.99), 1e-8  # Adam
REPEATS = 4  # steps between looks at the schedule
MIXING = 0.9  # sec. 3.1
EMA_KIMG = 10.0  # half-life of the weights' average, thousands of images
W_AVG_BETA = 0.995
PSI = 0.7  # of pictures, as of Fig. 2; figures that show a range have their own
PATHS = 100_000  # of path length
FP16_BLOCKS, CLAMP = 4, 256.0  # not the paper's: float16 as StyleGAN2-ADA has it, D's clamped

# What a plain `python stylegan.py` trains: small enough for two CPU cores and a few minutes.
TOY = dict(size=32, channel_base=512, channel_max=64, z_dim=64, w_dim=64)
TOY |= dict(kimg=110, train_kimg=20, fade_kimg=10, batches="8:16,16:16", batch=16, lr=0.003)
TOY |= dict(r1_gamma=0.3, ema_kimg=2.0, every=10)

# =============================================================================
# Networks
# =============================================================================
# Weights are N(0, 1), with lr_mul N(0, 1 / lr_mul^2), and scaled where they are used (equalized
# learning rate, Karras et al. 2017, sec. 4.1). Where a leaky ReLU follows, the scale holds its
# gain, sqrt(2).


class Linear(nn.Module):
    """A dense layer with equalized learning rate. forward(x): (N, I) -> (N, O).

    lr_mul: factor of the layer's learning rate; gain: None for that of the activation.
    """

    def __init__(self, I, O, act="linear", lr_mul=1.0, bias=True, gain=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(O)) if bias else None
        self.act, self.lr_mul = act, lr_mul
        self.gain = (gain or ops.ACTIVATIONS[act].gain) * lr_mul / math.sqrt(I)

    def forward(self, x):
        b = None if self.bias is None else self.bias * self.lr_mul
        if self.act == "linear":
            return F.linear(x, self.weight * self.gain, b)
        return ops.bias_act(F.linear(x, self.weight * self.gain), b, act=self.act, gain=1)


def upscale(x, factor=2):
    """Each pixel factor x factor times."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="nearest")


def downscale(x, factor=2):
    """Averages of factor x factor pixels."""
    return x if factor == 1 else F.avg_pool2d(x, factor)


class Conv2d(nn.Module):
    """A convolution of D, or to RGB, with equalized learning rate, bias and activation.

    forward(x): (N, I, H, W) -> (N, O, H, W), half of both sides if `down`: means of 2x2 pixels
    after the convolution, and with `blurred` the filter [1, 2, 1] before it
    """

    def __init__(self, I, O, k, act="linear", down=False, blurred=False, clamp=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I, k, k))
        self.bias = nn.Parameter(torch.zeros(O))
        self.gain = ops.ACTIVATIONS[act].gain / math.sqrt(I * k * k)
        self.act, self.down, self.blurred, self.clamp = act, down, blurred, clamp

    def forward(self, x):
        w = (self.weight * self.gain).to(x.dtype)
        if self.down:
            x = ops.conv2d_downscale(x, w, self.blurred)
        else:
            x = ops.conv2d(x, w, padding=w.shape[2] // 2)
        return ops.bias_act(x, self.bias, act=self.act, gain=1, clamp=self.clamp)


def normalize(x):
    """Each row to mean square 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """f: Z x C -> W (Fig. 1b), an MLP with a running mean of its output for truncation.

    forward(z, c=None, psi=1, cutoff=None) -> ws (N, num_ws, w_dim)
        z: (N, z_dim), N(0, 1); any scale if normalize_z and c_dim is 0
        c: (N, c_dim), None if c_dim is 0
        psi: 1 = no truncation, 0 = mean image, in the first `cutoff` layers (None: all)
    In training mode w_avg moves, unless update_avg=False (the second latents of style mixing).
    Raises ValueError if a conditional model gets no c.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, num_ws, num_layers=8, features=None, normalize_z=True,
        act="lrelu",
    ):  # fmt: skip
        super().__init__()
        self.c_dim, self.num_ws, self.normalize_z = c_dim, num_ws, normalize_z
        self.num_layers = num_layers
        if c_dim:  # labels as the official code has them: one more latent, learned, per class
            self.embed = nn.Parameter(torch.randn(c_dim, z_dim))
        inputs = z_dim * (2 if c_dim else 1)
        widths = [inputs] + [features or w_dim] * (num_layers - 1) + [w_dim]
        for i in range(num_layers):
            self.add_module(f"fc{i}", Linear(widths[i], widths[i + 1], act, lr_mul=0.01))
        if num_layers == 0 and inputs != w_dim:
            raise ValueError(f"without layers w has the {inputs} dimensions of z, not {w_dim}")
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z, c=None, psi=1.0, cutoff=None, update_avg=True):
        if self.c_dim:
            if c is None:
                raise ValueError(f"this model is conditional: c (N, {self.c_dim}) is missing")
            z = torch.cat([z, c @ self.embed], 1)
        w = normalize(z) if self.normalize_z else z
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        if self.training and update_avg:
            self.w_avg.copy_(w.detach().mean(0).lerp(self.w_avg, W_AVG_BETA))
        ws = w[:, None].repeat(1, self.num_ws, 1)
        if psi == 1:
            return ws
        truncated = self.w_avg.lerp(ws[:, :cutoff], psi)  # appendix B
        return torch.cat([truncated, ws[:, truncated.shape[1] :]], 1)


def instance_norm(x, scale=None, shift=None):
    """Every map of every image to mean 0 and variance 1, then times scale, plus shift, (N, C)
    each: AdaIN, Eq. (1)."""
    return ops.norm_act(x, scale, shift, eps=1e-8)


class Epilogue(nn.Module):
    """What every layer of G ends with: noise, bias, leaky ReLU, normalisation, style (Fig. 1b).

    forward(x, w, noise="random"): (N, C, res, res), (N, w_dim) -> (N, C, res, res)
    noise: "random", "const" (the stored map), "none", or a function of a shape that draws it.
    """

    def __init__(self, C, res, w_dim, use_noise, use_styles, pixel_norm, instance_norm):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(C))
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros(C))
            self.register_buffer("noise_const", torch.randn(res, res))
        if use_styles:
            self.affine = Linear(w_dim, 2 * C)
        self.use_noise, self.use_styles = use_noise, use_styles
        self.pixel_norm, self.instance_norm = pixel_norm, instance_norm

    def forward(self, x, w, noise="random"):
        noise_map, strength = None, None
        if self.use_noise and noise != "none":
            strength = self.noise_strength
            if noise == "const":
                noise_map = self.noise_const
            elif noise == "random":
                noise_map = torch.randn(len(x), 1, *x.shape[2:], device=x.device)
            else:
                noise_map = noise(len(x), 1, *x.shape[2:])
        # lrelu(x + noise_map * strength + bias)
        x = ops.fused_act(x, None, noise_map, strength, self.bias, "lrelu", gain=1)
        if self.pixel_norm:
            x = normalize(x.to(self.bias.dtype)).to(x.dtype)  # not in half precision
        scale, shift = self.affine(w).chunk(2, 1) if self.use_styles else (None, None)
        scale = None if scale is None else scale + 1  # y_s of Eq. (1): its bias begins at one
        if self.instance_norm:
            return instance_norm(x, scale, shift)
        if scale is None:
            return x
        return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


class SynthesisLayer(Epilogue):
    """A layer of G: a 3x3 convolution and the Epilogue. up: pixels are doubled before the
    convolution; blurred: and filtered by [1, 2, 1] after it."""

    def __init__(self, I, O, res, w_dim, up=False, blurred=True, **epilogue):
        super().__init__(O, res, w_dim, **epilogue)
        self.weight = nn.Parameter(torch.randn(O, I, 3, 3))
        self.gain = ops.SQRT2 / math.sqrt(I * 9)
        self.up, self.blurred = up, blurred

    def forward(self, x, w, noise="random"):
        weight = (self.weight * self.gain).to(x.dtype)
        if self.up:
            x = ops.upscale_conv2d(x, weight, self.blurred)
        else:
            x = ops.conv2d(x, weight, padding=1)
        return super().forward(x, w, noise)


def block_type(block):
    """The type that a block computes in: its half type on a GPU, else that of its weights."""
    weight = block.conv1.weight
    return (block.half if weight.is_cuda else None) or weight.dtype


class SynthesisBlock(nn.Module):
    """One resolution of G. forward(x, ws, noise) -> (N, O, res, res)

    x: (N, I, res / 2, res / 2), None in the first block, I = 0; ws: (N, w_dim) for each layer.
    """

    def __init__(self, I, O, res, w_dim, img_channels, const_input, half, blurred, **epilogue):
        super().__init__()
        self.half = half
        if I:
            self.conv0 = SynthesisLayer(I, O, res, w_dim, True, blurred, **epilogue)
        else:
            if const_input:
                self.const = nn.Parameter(torch.ones(O, res, res))
            else:  # the traditional input layer, of Table 1's rows A to C
                self.dense = Linear(w_dim, O * res * res, bias=False, gain=ops.SQRT2 / 4)
            self.conv0 = Epilogue(O, res, w_dim, **epilogue)
        self.conv1 = SynthesisLayer(O, O, res, w_dim, **epilogue)
        self.torgb = Conv2d(O, img_channels, 1)

    def forward(self, x, ws, noise="random"):
        if x is None and hasattr(self, "const"):
            x = self.const[None].repeat(len(ws[0]), 1, 1, 1)
        elif x is None:
            x = self.dense(ws[0]).unflatten(1, (-1, 4, 4))
        x = self.conv0(x.to(block_type(self)), ws[0], noise)
        return self.conv1(x, ws[-1], noise)

    def rgb(self, x):
        """(N, O, res, res) -> (N, img_channels, res, res), not in half precision"""
        img = self.torgb(x)
        return img.float() if img.dtype in (torch.float16, torch.bfloat16) else img


def channels(res, channel_base, channel_max):
    """Feature maps at a resolution: the same whatever the size of the network."""
    return min(channel_base // res, channel_max)


def resolutions(res):
    """4, 8, ..., res."""
    return [2**i for i in range(2, int(math.log2(res)) + 1)]


def half_type(res, img_resolution, half_res, half):
    """The type of the `half_res` highest resolutions, from 8; None elsewhere."""
    first = max(img_resolution * 2 >> half_res, 8)
    return getattr(torch, half) if half_res and res >= first else None


class SynthesisNetwork(nn.Module):
    """g: W -> images (Fig. 1b).

    forward(ws, noise="random") -> img (N, img_channels, res, res), about [-1, 1]
        ws: (N, num_ws, w_dim), two for each resolution, one in all without styles; noise: see
        Epilogue
    grown(ws, noise): the same at the resolution that was grown to, res / 2^floor(lod)
    """

    def __init__(
        self, w_dim, img_resolution, img_channels=3, channel_base=16384, channel_max=512, lod=0.0,
        half_res=0, half="float16", use_noise=True, use_styles=True, pixel_norm=False,
        instance_norm=True, const_input=True, blur=True,
    ):  # fmt: skip
        super().__init__()
        self.resolutions, self.lod = resolutions(img_resolution), lod
        self.register_buffer("fade", torch.tensor(lod % 1.0), persistent=False)
        self.num_ws = 2 * len(self.resolutions) if use_styles else 1
        epilogue = dict(use_noise=use_noise, use_styles=use_styles)
        epilogue |= dict(pixel_norm=pixel_norm, instance_norm=instance_norm)
        I = 0
        for res in self.resolutions:
            O = channels(res, channel_base, channel_max)
            kind = half_type(res, img_resolution, half_res, half)
            block = SynthesisBlock(
                I, O, res, w_dim, img_channels, const_input, kind, blur, **epilogue
            )
            self.add_module(f"b{res}", block)
            I = O

    def grown(self, ws, noise="random"):
        x, ws = None, ws.unbind(1)
        for i, res in enumerate(self.resolutions[: len(self.resolutions) - int(self.lod)]):
            block, before = getattr(self, f"b{res}"), x
            x = block(x, ws[2 * i : 2 * i + 2] if len(ws) > 1 else ws, noise)
        img = block.rgb(x)
        if self.lod % 1:  # fade in the last resolution (Karras et al. 2017, Fig. 2)
            img = img.lerp(upscale(getattr(self, f"b{res // 2}").rgb(before)), self.fade)
        return img

    def grow(self, lod):
        """Sets the level of detail, and as a tensor, for CUDA graphs, what is still to fade in."""
        self.lod = lod
        self.fade.fill_(lod % 1)

    def forward(self, ws, noise="random"):
        return upscale(self.grown(ws, noise), 2 ** int(self.lod))


class Generator(nn.Module):
    """mapping and synthesis. forward(z, c=None, psi=1, cutoff=None, noise="random") -> img

    Defaults are the paper's at 1024 pixels; see MappingNetwork and SynthesisNetwork. lod: level of
    detail, 0 = all resolutions, 1 = all but the highest, between: that one is faded in.
    """

    def __init__(
        self, z_dim=512, c_dim=0, w_dim=512, img_resolution=1024, img_channels=3, map_layers=8,
        map_features=None, normalize_z=True, map_act="lrelu", channel_base=16384, channel_max=512,
        lod=0.0, half_res=0, half="float16", use_noise=True, use_styles=True, pixel_norm=False,
        instance_norm=True, const_input=True, blur=True,
    ):  # fmt: skip
        given = dict(locals())
        super().__init__()
        self.config = {"kind": "G"} | {k: given[k] for k in given if k not in ("self", "__class__")}
        self.synthesis = SynthesisNetwork(
            w_dim, img_resolution, img_channels, channel_base, channel_max, lod, half_res, half,
            use_noise, use_styles, pixel_norm, instance_norm, const_input, blur,
        )  # fmt: skip
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim, c_dim, w_dim, self.num_ws, map_layers, map_features, normalize_z, map_act
        )

    def grow(self, lod):
        """Sets the level of detail."""
        self.config["lod"] = lod
        self.synthesis.grow(lod)

    def forward(self, z, c=None, psi=1.0, cutoff=None, noise="random"):
        return self.synthesis(self.mapping(z, c, psi, cutoff), noise)


def minibatch_std(x, group=4, features=1):
    """Appends feature maps with the standard deviation over a group of samples (Karras et al.
    2017, sec. 3), averaged over channels and pixels.

    x: (N, C, H, W) -> (N, C + features, H, W). group: its size, at most N, None for all of N; its
    members lie N / group apart.
    """
    N, C, H, W = x.shape
    G = min(group or N, N)
    if N % G:
        raise ValueError(f"a batch of {N} does not fall into groups of {G} (minibatch std)")
    y = x.reshape(G, N // G, features, C // features, H, W)
    y = (y - y.mean(0)).square().mean(0)  # Tensor.var takes several times as long on a CPU
    y = (y + 1e-8).sqrt().mean([2, 3, 4])  # (N / G, features)
    y = y.reshape(N // G, features, 1, 1).repeat(G, 1, H, W)
    return torch.cat([x, y.to(x.dtype)], 1)


class DiscriminatorBlock(nn.Module):
    """One resolution of D. forward(x): (N, I, res, res) -> (N, O, res / 2, res / 2)"""

    def __init__(self, I, O, img_channels, half, clamp, blurred):
        super().__init__()
        self.half = half
        self.fromrgb = Conv2d(img_channels, I, 1, "lrelu", clamp=clamp)
        self.conv0 = Conv2d(I, I, 3, "lrelu", clamp=clamp)
        self.conv1 = Conv2d(I, O, 3, "lrelu", down=True, blurred=blurred, clamp=clamp)

    def forward(self, x):
        return self.conv1(self.conv0(x.to(block_type(self))))

    def features(self, img):
        """(N, img_channels, res, res) -> (N, I, res, res)"""
        return self.fromrgb(img.to(block_type(self)))


class DiscriminatorEpilogue(nn.Module):
    """The 4x4 end of D: minibatch standard deviation, convolution, two dense layers.

    forward(x, c): (N, I, 4, 4) -> logits (N, 1); c: (N, c_dim) picks one of c_dim, or None
    O: width of the dense layer
    """

    def __init__(self, I, O, c_dim, img_channels, mbstd_group):
        super().__init__()
        self.mbstd_group = mbstd_group
        self.fromrgb = Conv2d(img_channels, I, 1, "lrelu")
        self.conv = Conv2d(I + bool(mbstd_group), I, 3, "lrelu")
        self.fc = Linear(I * 16, O, "lrelu")
        self.out = Linear(O, c_dim or 1)

    def features(self, img):
        """(N, img_channels, 4, 4) -> (N, I, 4, 4)"""
        return self.fromrgb(img)

    def forward(self, x, c):
        x = x.to(self.conv.weight.dtype)
        if self.mbstd_group:  # the largest group that the batch falls into
            group = next(g for g in range(min(self.mbstd_group, len(x)), 0, -1) if len(x) % g == 0)
            x = minibatch_std(x, group)
        logits = self.out(self.fc(self.conv(x).flatten(1)))
        return logits if c is None else (logits * c).sum(1, keepdim=True)  # Mescheder et al. 2018


class Discriminator(nn.Module):
    """D of Karras et al. 2017, with blur.

    forward(img, c=None) -> logits (N, 1); img: (N, img_channels, res, res), of full size, or the
    size that was grown to; c: (N, c_dim). Raises ValueError if a conditional model gets no c.
    """

    def __init__(
        self, c_dim=0, img_resolution=1024, img_channels=3, channel_base=16384, channel_max=512,
        lod=0.0, half_res=0, half="float16", clamp=None, mbstd_group=4, blur=True,
    ):  # fmt: skip
        given = dict(locals())
        super().__init__()
        self.config = {"kind": "D"} | {k: given[k] for k in given if k not in ("self", "__class__")}
        self.resolutions, self.lod = resolutions(img_resolution)[::-1], lod  # res, ..., 4
        self.register_buffer("fade", torch.tensor(lod % 1.0), persistent=False)
        widths = {r: channels(r, channel_base, channel_max) for r in self.resolutions}
        for res in self.resolutions[:-1]:
            kind = half_type(res, img_resolution, half_res, half)
            block = DiscriminatorBlock(
                widths[res], widths[res // 2], img_channels, kind, clamp, blur
            )
            self.add_module(f"b{res}", block)
        last = channels(2, channel_base, channel_max)
        self.b4 = DiscriminatorEpilogue(widths[4], last, c_dim, img_channels, mbstd_group)

    def grow(self, lod):
        """Sets the level of detail."""
        self.config["lod"] = self.lod = lod
        self.fade.fill_(lod % 1)

    def forward(self, img, c=None):
        if self.config["c_dim"] and c is None:
            raise ValueError(f"this model is conditional: c (N, {self.config['c_dim']}) is missing")
        grown = self.resolutions[int(self.lod) :]
        img = downscale(img, img.shape[2] // grown[0])
        x = getattr(self, f"b{grown[0]}").features(img)
        for res in grown[:-1]:
            x = getattr(self, f"b{res}")(x)
            if self.lod % 1 and res == grown[0]:  # fade in the first resolution
                coarse = getattr(self, f"b{res // 2}").features(downscale(img))
                x = x.lerp(coarse.to(x.dtype), self.fade.to(x.dtype))
        return self.b4(x, c if self.config["c_dim"] else None)


def build(config):
    """The network that a `config` describes: what its attribute of that name held."""
    kind = dict(G=Generator, D=Discriminator)[config["kind"]]
    return kind(**{k: v for k, v in config.items() if k != "kind"})


# =============================================================================
# Losses
# =============================================================================


def generator_loss(logits, kind="logistic"):
    """G's loss for each of its images (N,). kind: a key of LOSSES.

    logistic is the non-saturating one of Goodfellow et al. 2014, saturating their minimax one.
    """
    logits = logits.flatten()
    if kind == "logistic":
        return F.softplus(-logits)
    return -F.softplus(logits) if kind == "saturating" else -logits


def discriminator_loss(logits, real, kind="logistic"):
    """D's loss for each image (N,), real (True) or G's. kind: a key of LOSSES."""
    logits = logits.flatten()
    sign = -1 if real else 1
    if kind.startswith("wgan"):
        return sign * logits + (DRIFT * logits.square() if real else 0)
    if kind.startswith("hinge"):
        return F.relu(1 + sign * logits)
    return F.softplus(sign * logits)


def r1_penalty(logits, real):
    """|grad_x D(x)|^2 of each real image (N,) (Mescheder et al. 2018). Weigh it by r1_gamma / 2.

    logits: D(real), of real images that require a gradient.
    """
    with ops.no_weight_gradients():  # they come with the penalty's backward pass
        (grads,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return grads.square().sum([1, 2, 3])


def gradient_penalty(D, real, fake, u, c=None, target=1.0):
    """(|grad_x D(x)| / target - 1)^2 at x between real and fake images (N,) (Gulrajani et al.
    2017). u: (N, 1, 1, 1) in [0, 1), the place of x. Weigh it by gp_lambda."""
    mixed = real.lerp(fake, u).requires_grad_(True)
    norm = (r1_penalty(D(mixed, c), mixed) * share_of(D, mixed)).sqrt()
    return (norm / target - 1).square()


def share_of(D, img):
    """|grad_x D(x)|^2 at images enlarged to D's full size, where the official code takes it, as a
    share of that at the images as they are: each doubling spreads a gradient over four pixels."""
    return (img.shape[2] / D.config["img_resolution"]) ** 2


# =============================================================================
# Training
# =============================================================================
# Each phase adds the gradients of its losses, in rounds of at most --batch-gpu samples. All random
# choices are tensors, drawn in every step: so phases can be CUDA graphs, and choices equal for any
# number of processes, if the rounds are the same.

# images, age: so many images, and steps since Adam's reset, come before it
Stage = namedtuple("Stage", "lod res batch lr tick images age", defaults=(0, 0))


def schedule(
    kimg, size, start_size=8, train_kimg=600, fade_kimg=600, batch=32, batches=BATCHES,
    batch_max=None, lr=LR, rates=RATES, lr_max=math.inf, rampup_kimg=0, world=1,
):  # fmt: skip
    """The stage of training after so many thousands of images (Karras et al. 2017, appendix A).

    A resolution is trained for train_kimg, then the next one is faded in over fade_kimg; size of
    images, batch, rate and tick are its own as soon as its fade begins. batches, batch_max (per
    process), rates: by resolution.
    """
    duration = train_kimg + fade_kimg
    phase, rest = divmod(kimg, duration) if duration else (0, kimg)
    lod = math.log2(size) - math.log2(start_size) - phase
    if fade_kimg > 0:
        lod -= max(rest - train_kimg, 0) / fade_kimg
    lod = max(lod, 0.0)
    res = size >> math.floor(lod)
    batch = batches.get(res, batch)
    batch -= batch % world
    batch = min(batch, (batch_max or {}).get(res, batch) * world)
    lr = min(lr * rates.get(res, 1), lr_max)
    if rampup_kimg > 0:
        lr *= min(kimg / rampup_kimg, 1)
    return Stage(lod, res, batch, lr, TICKS.get(res, TICKS[4]))


def is_growth(lod, before):
    """Whether a fade begins or ends between two levels of detail."""
    return (math.floor(lod), math.ceil(lod)) != (math.floor(before), math.ceil(before))


def plan(kimg, **options):
    """The stages, of REPEATS steps each, of a training that sees so many thousands of images;
    options: of `schedule`."""
    found, images, age, before = [], 0, 0, -1
    while images < kimg * 1000:
        stage = schedule(images / 1000, **options)
        if stage.batch == 0:
            raise UserError(f"the batch of {stage.res} pixels is less than an image per process.")
        age, before = 0 if is_growth(stage.lod, before) else age, stage.lod
        found.append(stage._replace(images=images, age=age))
        images, age = images + REPEATS * stage.batch, age + REPEATS
    return found


def tensorflow_eps(age):
    """Adam's epsilon, `age` steps after a reset. TensorFlow adds it before it corrects the bias of
    the second moment, PyTorch after that. Gradients of the mapping network are small enough for
    it to matter."""
    return EPS / math.sqrt(1 - BETAS[1] ** age)


def faded(real, lod):
    """Real images (N, C, res, res) of the resolution grown to; during a fade, blended with their
    own half resolution."""
    t = lod % 1
    return real.lerp(upscale(downscale(real)), t) if t else real


def rounds(size, z, c):
    """(z, c) in pieces of `size` samples; None: all at once."""
    pieces = z.split(size or len(z))
    return zip(pieces, [None] * len(pieces) if c is None else c.split(size or len(z)), strict=True)


def mixed_ws(G, z, c, z2, crossover):
    """ws (N, num_ws, w_dim) of z, from layer `crossover` () on those of z2 (style mixing, StyleGAN
    sec. 3.1); crossover = num_ws mixes nothing."""
    ws = G.mapping(z, c)
    ws2 = G.mapping(z2, c, update_avg=False)
    first = torch.arange(ws.shape[1], device=ws.device) < crossover
    return torch.where(first[None, :, None], ws, ws2)


def mix(G, z, c, args, run):
    """ws of z, or with probability --mixing, of z up to a random layer of those that are grown and
    of fresh latents above; one layer for all samples of all processes."""
    if args.mixing == 0 or G.num_ws == 1:
        return G.mapping(z, c)
    gate, place = run.rand(2, shared=True)
    grown = G.num_ws - 2 * int(G.synthesis.lod)
    layer = 1 + (place * (grown - 1)).floor()  # 1 ... grown - 1
    crossover = torch.where(gate < args.mixing, layer, G.num_ws)
    return mixed_ws(G, z, c, run.randn(*z.shape), crossover)


def discriminator_phase(G, D, real, real_c, args, run, noise):
    """Gradients of D, with its penalties in every step. Returns {name: loss}, unweighted."""
    losses, n = {}, len(real)
    latents = rounds(args.batch_gpu, run.randn(n, G.config["z_dim"]), real_c)
    for (z, c), (x, _) in zip(latents, rounds(args.batch_gpu, real, None), strict=True):
        with torch.no_grad():  # in training mode: w_avg moves here, too, as officially
            fake = G.synthesis.grown(mix(G, z, c, args, run), noise)
        row = {}
        for is_real, img, gamma in ((False, fake, args.r2_gamma), (True, x, args.r1_gamma)):
            img = img.detach().requires_grad_(gamma > 0)
            logits = D(img, c)
            loss = discriminator_loss(logits, is_real, args.loss).mean()
            row["D_real" if is_real else "D_fake"] = loss
            if gamma:  # R1 of real images; R2, the same of fakes
                penalty = (r1_penalty(logits, img) * share_of(D, img)).mean()
                row["reg/r1" if is_real else "reg/r2"] = penalty
                loss = loss + gamma / 2 * penalty
            run.backward(loss * (len(x) / n))
        if args.gp_lambda:
            u = run.rand(len(x), 1, 1, 1)
            row["reg/gp"] = gradient_penalty(D, x, fake, u, c, args.gp_target).mean()
            run.backward(args.gp_lambda * row["reg/gp"] * (len(x) / n))
        for name, loss in row.items():
            losses.setdefault(name, []).append(loss.detach())
    return {name: torch.stack(of_rounds).mean() for name, of_rounds in losses.items()}


def generator_phase(G, D, n, sample_c, args, run, noise):
    """Gradients of G for n fakes. Returns its loss."""
    losses = []
    for z, c in rounds(args.batch_gpu, run.randn(n, G.config["z_dim"]), sample_c(n)):
        fake = G.synthesis.grown(mix(G, z, c, args, run), noise)
        loss = generator_loss(D(fake, c), args.loss).mean()
        run.backward(loss * (len(z) / n))
        losses.append(loss.detach())
    return torch.stack(losses).mean()


@torch.no_grad()
def update_ema(G_ema, G, beta):
    """G_ema = lerp(G, G_ema, beta); buffers (w_avg, noise maps) are copied."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - beta)
    torch._foreach_copy_(list(G_ema.buffers()), list(G.buffers()))


def train_step(G, D, G_ema, opts, real, real_c, sample_c, ema_beta, args, run, noise="random"):
    """One iteration: D, the average of G, G. Returns {name: loss}, unweighted.

    opts: of G and D; real: (N, C, res, res) in [-1, 1] at the resolution that was grown to;
    real_c: (N, c_dim), of the fakes that D sees, too, or None; sample_c(n): labels of n fakes;
    noise: see Epilogue, in training run.randn. `run` gives rand, randn, backward(loss), which adds
    gradients, and graph(phase, optimizer) -> a function of phase's arguments: the phase, from no
    gradients on, and a step of the optimizer with their means over all processes, 0 where there are
    none; what overflowed in float16 is made finite. A GPU repeats phases as CUDA graphs, so that
    all that changes must be tensors.
    """
    opt_G, opt_D = opts

    # ---- D, with R1 or WGAN-GP in every step --------------------------------------------------
    D.requires_grad_(True)
    update_D = run.graph(discriminator_phase, opt_D)  # the phase, then a step of opt_D
    losses = update_D(G, D, real, real_c, args, run, noise)

    # ---- the average of G, of which samples and scores are made: G as it was before this step --
    update_ema(G_ema, G, ema_beta)

    # ---- G; D only passes gradients on --------------------------------------------------------
    D.requires_grad_(False)
    update_G = run.graph(generator_phase, opt_G)
    return losses | {"G": update_G(G, D, len(real), sample_c, args, run, noise)}


SWITCHES = ("use_styles", "pixel_norm", "instance_norm", "const_input")  # of G, by --config


def new_networks(args, size, c_dim, half):
    """{"G", "D"} with fresh weights; half: "float16", "bfloat16" or None."""
    both = dict(c_dim=c_dim, img_resolution=size, img_channels=args.channels, blur=args.blur)
    both |= dict(channel_base=args.channel_base, channel_max=args.channel_max)
    both |= dict(half_res=FP16_BLOCKS, half=half) if half else {}
    names = ("z_dim", "w_dim", "map_layers", *SWITCHES)
    G = {name: getattr(args, name) for name in names} | dict(use_noise=args.noise_inputs)
    D = dict(mbstd_group=args.mbstd_group) | (dict(clamp=CLAMP) if half else {})
    return {"G": Generator(**both, **G), "D": Discriminator(**both, **D)}


def train(args):
    first = common.first_weights(args)
    given = load_networks(first)[0] if first else {}
    if args.channels is None:
        args.channels = next((net.config["img_channels"] for net in given.values()), 3)
    fill_options(args, given)
    run = common.Run("stylegan", args, __file__, own_half=True)
    run.log_every = 1000
    run.fixed = ("batch", "checkpoint", "config", "loss", "start_size", "train_kimg", "fade_kimg")
    run.fixed += ("batches", "batch_max")
    toy = common.TOY_CLASSES if args.cond else common.TOY_FACES
    source = common.open_images(args.data, args.size, toy)

    # ---- the schedule, and data: image n is a pure function of (seed, n) ----------------------
    data, size = common.square_pictures(args, source, args.channels)
    if given:
        args.start_size = min(args.start_size, size)
    stages = plan_of(args, size, run.world)
    run.images = functools.partial(images_before, stages)
    labels = common.one_hot(args, source) if args.cond else None
    all_labels = None if labels is None else torch.from_numpy(labels).to(run.device)
    levels = {res: data.shrunk(size // res) for res in resolutions(size)}

    def image(n):
        stage = stages[bisect.bisect(stages, n, key=lambda s: s.images) - 1]
        epoch, i = divmod(n, len(data))
        k = common.shuffled(len(data), args.seed, epoch)[i]
        rng = common.item_rng(args.seed, epoch, i)
        pixels = common.crop_and_flip(levels[stage.res][k], None, args.mirror, rng)
        return (pixels,) if labels is None else (pixels, labels[k])

    def sample_c(n):
        """Labels of n random images, for fakes."""
        return None if labels is None else all_labels[(run.rand(n) * len(all_labels)).long()]

    # ---- networks, their average, optimisers --------------------------------------------------
    nets = new_networks(args, size, 0 if labels is None else labels.shape[1], run.half)
    nets["G_ema"] = copy.deepcopy(nets["G"]).eval().requires_grad_(False)
    if given:
        common.copy_matching(nets, given, run.say)
    G, D, G_ema = (net.to(run.device, memory_format=run.order) for net in nets.values())
    # Their epsilon moves (tensorflow_eps), which it cannot in a CUDA graph.
    opts = {name: run.adam([nets[name]], LR, BETAS, EPS, capturable=False) for name in "GD"}

    examples = common.sample_inputs(G_ema, labels, args.seed)
    start = run.restore(nets, opts, {}, data.names)
    penalties = dict(R1=args.r1_gamma, R2=args.r2_gamma, GP=args.gp_lambda)
    run.say(
        f"{len(data)} images of {size}x{size}; G has {common.count(G):,} parameters,"
        f" D {common.count(D):,};"
        f" from {stages[0].res} to {stages[-1].res} pixels, in batches of"
        f" {', '.join(str(n) for n in dict.fromkeys(s.batch for s in stages))};"
        f" loss {args.loss}{''.join(f', {name} {x:.3g}' for name, x in penalties.items() if x)}"
    )
    most = max(s.batch for s in stages)
    if len(data) < most:
        run.say(f"only {len(data)} images: a batch of {most} holds each more than once")
    if start == 0:
        run.save_picture(common.grid(data.all(len(examples[0])), 8), "reals")

    for step, (real, *real_c) in run.batches(image, start, len(stages) * REPEATS):
        real_c = real_c[0] if real_c else None
        stage = stages[step // REPEATS]
        age = stage.age + step % REPEATS + 1

        # ---- growth: where a fade begins or ends Adam forgets, and other layers are trained -----
        for net in nets.values():
            net.grow(stage.lod)
        if age == 1:
            run.forget_graphs()
            for opt in opts.values():
                opt.state.clear()
            if stage.res > min(levels):
                levels[stage.res // 2].forget()  # cached pictures of the size before
        for opt in opts.values():
            opt.param_groups[0]["eps"] = tensorflow_eps(age)
        run.set_lr(opts.values(), stage.lr)

        losses = train_step(
            G, D, G_ema, opts.values(), faded(real, stage.lod), real_c, sample_c,
            0.5 ** (stage.batch / (args.ema_kimg * 1000)), args, run, run.randn,
        )  # fmt: skip

        kimg = run.images(run.steps_done) / 1000
        run.log(losses, kimg=kimg, res=stage.res, lod=round(stage.lod, 3))
        keep = run.due(args.keep_every * 1000) or run.steps_done == run.total
        if keep or run.due((args.every or stage.tick) * 1000):
            share = stage.batch // run.world
            n = min(args.batch_gpu or share, share)  # at once, as in training
            run.save_picture(common.grid(common.sample(G_ema, *examples, n), 8))
            common.score_samples(run, G_ema, data, labels, n)
            for net in (G, G_ema):
                # Each rank's moved with its own samples.
                net.mapping.w_avg.copy_(run.mean(net.mapping.w_avg))
            run.save(keep=keep)
    run.say(f"samples and checkpoint are in {run.folder}")


def fill_options(args, nets):
    """Options that were left out: those of the networks to start from, else of --config."""
    row = CONFIGS[args.config or "F"]
    options = dict(channel_base=16384, channel_max=512, z_dim=512, w_dim=512, map_layers=8)
    options |= dict(use_styles=True, pixel_norm=False, instance_norm=True, const_input=True)
    options |= dict(noise_inputs=True, blur=True, mixing=MIXING, loss="logistic", start_size=8)
    options |= dict(kimg=25000, r1_gamma=0.0, r2_gamma=0.0, gp_lambda=0.0) | row
    loss = LOSSES[args.loss or options["loss"]]
    options |= {name: value for name, value in loss.items() if name in options}
    if nets:  # their layers, from the resolution that they have grown to
        held = dict(nets[max(nets)].config)  # of G_ema, else G, else D
        held["start_size"] = held["img_resolution"] >> int(held["lod"])
        held["noise_inputs"] = held.get("use_noise", options["noise_inputs"])
        layers = (*SWITCHES, "noise_inputs", "blur")
        if args.config and any(held.get(k, v) != v for k, v in row.items() if k in layers):
            raise UserError(
                f"--checkpoint has other layers than row {args.config}: leave --config out."
            )
        options |= {k: v for k, v in held.items() if k in options}
    common.set_missing(args, options)
    if "r1_gamma" not in loss:
        args.r1_gamma = args.r2_gamma = 0.0
    if "gp_lambda" not in loss:
        args.gp_lambda = 0.0


def plan_of(args, size, world):
    """The `plan` of the options, which are checked."""
    if args.map_layers == 0 and (args.cond or args.w_dim != args.z_dim):
        raise UserError("--map-layers 0 makes w of z alone: --w-dim as --z-dim, and no --cond.")
    if args.start_size not in resolutions(size):
        raise UserError(f"--start-size {args.start_size}: one of 4, 8, ..., {size} is needed.")
    stages = plan(
        args.kimg, size=size, start_size=args.start_size, train_kimg=args.train_kimg,
        fade_kimg=args.fade_kimg, batch=args.batch, batches=table(args.batches),
        batch_max=table(args.batch_max), lr=args.lr,
        lr_max=LOSSES[args.loss].get("lr_max", math.inf), rampup_kimg=args.lr_rampup, world=world,
    )  # fmt: skip
    for batch in {s.batch for s in stages}:
        if args.batch_gpu and batch // world % min(args.batch_gpu, batch // world):
            raise UserError(f"--batch-gpu {args.batch_gpu} does not divide {batch // world}.")
    return stages


def images_before(stages, step):
    """How many images come before a step."""
    k = min(step // REPEATS, len(stages) - 1)
    return stages[k].images + (step - k * REPEATS) * stages[k].batch


def table(text):
    """{resolution: number} of a text as "8:256,16:128"."""
    pairs = [pair.split(":") for pair in (text or "").split(",") if pair]
    found = {int(res): common.positive_int(n) for res, n in pairs}
    if unknown := found.keys() - TICKS.keys():
        raise ValueError(f"no such resolution: {unknown}")
    return found


def table_text(text):
    """A text that `table` understands, as a run folder keeps it."""
    try:
        table(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: write 8:256,16:128, say") from None
    return text


# =============================================================================
# Official checkpoints
# =============================================================================


SUPPORTED = {  # official options that no network here can differ in
    "nonlinearity": ("lrelu",), "mapping_nonlinearity": ("lrelu", "relu"), "use_wscale": (True, 1),
    "mapping_lrmul": (0.01,), "blur_filter": ([1, 2, 1], None, []),
}  # fmt: skip


def official_tensors(arrays, fused="auto"):
    """{our name: tensor} of {official name: tensor} of the TensorFlow release's G or D.

    fused: its option fused_scale. Where that applies (auto: from 128 pixels on) an upsampling
    convolution of G turns its kernel by 180 degrees, compared with one of doubled pixels.
    """
    size = max([int(m[1]) for name in arrays if (m := re.search(r"(\d+)x\1/", name))], default=4)
    G = any(name.startswith(("mapping/", "synthesis/")) for name in arrays)
    names = (  # pattern in a variable's name, ours
        (r"^dlatent_avg$", "mapping.w_avg"),
        (r"^mapping/LabelConcat/weight$", "mapping.embed"),
        (r"^mapping/Dense(\d+)/", r"mapping.fc\1."),
        (
            r"synthesis/noise(\d+)$",
            lambda m: f"synthesis/b{4 << int(m[1]) // 2}.conv{int(m[1]) % 2}.noise_const",
        ),
        (r"4x4/Const/const$", "b4.const"),
        (r"4x4/Dense/weight$", "b4.dense.weight"),
        (r"4x4/(Const|Dense)/", "b4.conv0."),
        (r"4x4/Conv/", "b4.conv1." if G else "b4.conv."),
        (r"4x4/Dense0/", "b4.fc."),
        (r"4x4/Dense1/", "b4.out."),
        (r"(\d+)x\1/Conv([01])(_up|_down)?/", r"b\1.conv\2."),
        (r"(To|From)RGB_lod(\d+)/", lambda m: f"b{size >> int(m[2])}.{m[1].lower()}rgb."),
        (r"Noise/weight$", "noise_strength"),
        (r"StyleMod/", "affine."),
        (r"^synthesis/", "synthesis."),
    )
    found = {}
    for name, t in arrays.items():
        up = re.search(r"(\d+)x\1/Conv0_up/weight$", name)
        if name.endswith("weight") and t.ndim > 1 and "LabelConcat" not in name:
            t = t.permute(3, 2, 0, 1) if t.ndim == 4 else t.T  # of (kh, kw, I, O), (I, O)
        if up and (int(up[1]) >= 128 if fused == "auto" else fused):
            t = t.flip([2, 3])
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        found[name] = t.reshape(t.shape[1:]) if name.endswith("const") and len(t) == 1 else t
    return found


def from_official(arrays, options=None):
    """A ready G or D from {official name: tensor} of the TensorFlow release (NVlabs/stylegan).

    Sizes are read off names and shapes; what leaves no trace there (normalisation, blur, fused
    resampling, minibatch std group) off `options`, the official arguments, if given. The level of
    detail of a network that was still growing is kept. Raises ValueError for anything else.
    """
    options = options or {}
    if any(re.search(r"mod_weight$|^(synthesis\.)?b4\.", name) for name in arrays):
        raise ValueError("these are tensors of a StyleGAN2: use stylegan2.py")
    for name, known in SUPPORTED.items():
        if name in options and options[name] not in known:
            raise ValueError(f"its {name} is {options[name]}; {known[0]} is what is known here")
    lods = [float(t) for name, t in arrays.items() if name.split("/")[-1] == "lod"]
    arrays = {name: t for name, t in arrays.items() if name.split("/")[-1] != "lod"}
    arrays = official_tensors(arrays, options.get("fused_scale", "auto"))
    net = build(official_config(arrays, options) | dict(lod=max(lods, default=0.0)))
    common.fill(net, arrays, optional=("noise_const", "w_avg"))
    return net


def official_config(arrays, options):
    """The config of the G or D that holds these tensors, with our names."""
    shape = {name: tuple(t.shape) for name, t in arrays.items()}
    G = "synthesis.b4.torgb.weight" in shape
    rgb = r"synthesis\.b(\d+)\.torgb\.weight" if G else r"b(\d+)\.fromrgb\.weight"
    found = (re.fullmatch(rgb, name) for name in shape)
    widths = {int(m[1]): shape[m[0]][1 if G else 0] for m in found if m}
    if sorted(widths) != resolutions(max(widths, default=0) or 1):
        raise ValueError("no layers 4x4, 8x8, ... of a StyleGAN network")
    size, most = max(widths), max(widths.values())
    narrow = [r * w for r, w in widths.items() if w < most]
    config = dict(channel_max=most, channel_base=max(narrow, default=size * most))
    last = most if G else shape["b4.fc.weight"][0]
    if last > most:  # D's dense layer alone is wider
        config = dict(channel_max=last, channel_base=max(4 * most, 2 * last))
    if widths != {r: channels(r, **config) for r in widths}:
        raise ValueError(f"{widths} channels are not those of a StyleGAN network")
    config |= dict(img_resolution=size, blur=bool(options.get("blur_filter", True)))
    if not G:
        c_dim = shape["b4.out.weight"][0]
        group = options.get("mbstd_group_size") or 4
        config |= dict(img_channels=shape[f"b{size}.fromrgb.weight"][1])
        config |= dict(mbstd_group=group if shape["b4.conv.weight"][1] > widths[4] else 0)
        return dict(kind="D", c_dim=options.get("label_size", c_dim if c_dim > 1 else 0), **config)
    layers = [n for n in shape if re.fullmatch(r"mapping\.fc\d+\.weight", n)]
    c_dim, z_dim = shape.get("mapping.embed", (0, 0))
    w_dim = inputs = shape["mapping.w_avg"][0]
    if layers:
        w_dim = shape[f"mapping.fc{len(layers) - 1}.weight"][0]
        inputs = shape["mapping.fc0.weight"][1]
    return dict(
        kind="G", c_dim=c_dim, z_dim=z_dim or inputs, w_dim=w_dim, map_layers=len(layers),
        map_features=shape["mapping.fc0.weight"][0] if len(layers) > 1 else None,
        normalize_z=options.get("normalize_latents", True),
        map_act=options.get("mapping_nonlinearity", "lrelu"),
        img_channels=shape[f"synthesis.b{size}.torgb.weight"][0],
        use_noise="synthesis.b4.conv1.noise_strength" in shape,
        use_styles="synthesis.b4.conv1.affine.weight" in shape,
        const_input="synthesis.b4.const" in shape,
        pixel_norm=options.get("use_pixel_norm", False),
        instance_norm=options.get("use_instance_norm", True), **config,
    )  # fmt: skip


# =============================================================================
# generate, evaluate
# =============================================================================


def load_networks(path):
    """({"G", "D", "G_ema": network}, options of its training) of a checkpoint, a run, or an
    official file."""
    return common.load_gan(path, "stylegan", build, from_official)


def bands(G):
    """{name: layers} of coarse, middle and fine styles: those of 4-8, 16-32 and 64-1024 pixels
    (sec. 3.1), which smaller networks have fewer of."""
    n = len(G.synthesis.resolutions)
    coarse = min(2, -(-n // 3))
    middle = min(2, n - coarse - 1)
    ends = {
        "coarse": (0, coarse),
        "middle": (coarse, coarse + middle),
        "fine": (coarse + middle, n),
    }
    return {k: list(range(2 * a, 2 * b)) for k, (a, b) in ends.items() if b > a}


def figure_mixing(args, G, c):
    """Fig. 3: coarse, middle or fine styles of each column's picture in those of the rows."""
    if not (args.mix_rows and args.mix_cols) or G.num_ws == 1:
        raise UserError("--figure mixing needs --mix-rows, --mix-cols, and a network with styles.")
    rows, columns = (
        common.ws_of_seeds(G, c, seeds, args.psi, args.cutoff)
        for seeds in (args.mix_rows, args.mix_cols)
    )
    first, top = (common.synthesize(G, ws, args.noise) for ws in (rows, columns))
    parts = bands(G)
    table = {"": torch.cat([torch.full_like(first[:1], 255), *[first] * len(parts)])}
    for seed, w, image in zip(args.mix_cols, columns, top, strict=True):
        column = [image[None]]
        for layers in parts.values():
            mixed = rows.clone()
            mixed[:, layers] = w[layers]
            column.append(common.synthesize(G, mixed, args.noise))
        table[f"seed {seed}"] = torch.cat(column)
    names = [f"{part} {seed}" for part in parts for seed in args.mix_rows]
    return table, ["", *names]


def figure_noise(args, G, c, realisations=100):
    """Figs. 4 and 5: noise in all layers, twice, and the deviation of its pixels, times 4; in none;
    in the finer and the coarser half of the resolutions."""
    if not G.config["use_noise"]:
        raise UserError("--figure noise: this network has no noise.")
    ws = common.ws_of_seeds(G, c, args.seeds, args.psi, args.cutoff)
    half = len(G.synthesis.resolutions) // 2
    limit, device = G.synthesis.resolutions[half], ws.device
    generator = torch.Generator(device)

    def noise(low=0, high=math.inf):
        def draw(*shape):
            maps = torch.randn(shape, generator=generator, device=device)
            return maps * (low <= shape[-1] < high)

        return draw

    def pictures(draw, seed=0):
        generator.manual_seed(seed)
        return common.synthesize(G, ws, draw, generators=[generator])

    total = squares = 0
    for seed in range(realisations):
        grey = pictures(noise(), seed).double().mean(1, keepdim=True)
        total, squares = total + grey, squares + grey.square()
    variance = squares / realisations - (total / realisations).square()
    deviation = (4 * variance.relu().sqrt()).clamp(max=255).round().byte().expand(-1, 3, -1, -1)
    return {
        "noise": pictures(noise()), "again": pictures(noise(), 1),
        "deviation x 4": deviation[:, : G.config["img_channels"]], "none": pictures("none"),
        f"from {limit} px": pictures(noise(limit)), f"below {limit}": pictures(noise(0, limit)),
    }, [f"seed {seed}" for seed in args.seeds]  # fmt: skip


def figure_truncation(args, G, c):
    """Fig. 8: all layers truncated, down to psi = -1, the opposite of each picture."""
    table = {}
    for psi in (1.0, 0.7, 0.5, 0.0, -0.5, -1.0):
        ws = common.ws_of_seeds(G, c, args.seeds, psi)
        table[f"psi {psi:g}"] = common.synthesize(G, ws, args.noise)
    return table, [f"seed {seed}" for seed in args.seeds]


FIGURES = {"mixing": figure_mixing, "noise": figure_noise, "truncation": figure_truncation}


def generate(args):
    """Pictures of seeds, a figure of the paper, or an interpolation film."""
    G, c, _ = common.load_generator(args, load_networks)
    if args.psi is None:
        args.psi = 1.0 if args.figure or not G.config["use_styles"] else PSI
    if not args.figure:
        common.generate(args, G, c)
        return
    if args.film or args.projected or args.mix_layers:
        raise UserError("--figure goes without --film, --projected and --mix-layers.")
    common.out_folder(args)
    path = Path(args.out) / f"{args.figure}.png"
    common.save_sheet(path, *FIGURES[args.figure](args, G, c))
    print(path)


def evaluate(args):
    """fd8, FID and KID, precision and recall, path lengths and linear separability of untruncated
    samples. Path lengths are of the face, as in the official code: of paths in Z and in W, whole
    (full) or near their ends."""
    paths = {
        f"ppl_{space}{'full' if full else 'end'}": dict(space=space, full=full, crop=True, n=PATHS)
        for full in (True, False)
        for space in "zw"
    }
    common.evaluate_generator(args, load_networks, build, paths)


def main(argv=None):
    sizes = ("channel_base", "channel_max", "z_dim", "w_dim", "map_layers", "noise_inputs")
    cli = common.CommandLine("stylegan.py", __doc__, {"toy": TOY}, sizes)
    number, above_0, from_0 = common.positive_int, common.positive, common.not_negative

    p = cli.command("train", train, "train on one set of pictures (default command)")
    common.add_train_options(
        p, batch=32, every="160 to 20 kimg, by resolution,", default_every=None,
        gpu_precision="fp16+tf32", half=common.OWN_HALF,
    )  # fmt: skip
    common.add_stylegan_train_options(p)
    p.add("--config", choices=list(CONFIGS), help="row of Table 1: F; layers are a --checkpoint's")
    p.add("--mirror", action="store_true", help="flip images at random")
    p.add("--channels", type=int, choices=(1, 3), help="3, or 1: greyscale")
    p.add("--kimg", type=number, help="length, in thousands of images: 25000, config A 12000")
    p.add("--start-size", type=number, help="pixels at first: 8, config A 4, or a --checkpoint's")
    p.add("--train-kimg", type=number, default=600, help="of each resolution, before it grows")
    p.add("--fade-kimg", type=common.not_negative_int, default=600, help="to fade in the next one")
    batches = ",".join(f"{res}:{n}" for res, n in BATCHES.items())
    p.add("--batches", type=table_text, default=batches, help="RES:N,...: there, not --batch")
    p.add("--batch-max", type=table_text, help="RES:N,...: limits per process")
    p.add("--loss", choices=list(LOSSES), help="logistic (FFHQ); wgan-gp: as for CelebA-HQ")
    p.add("--r1-gamma", type=from_0, help="weight of R1, with logistic and saturating: 10")
    p.add("--r2-gamma", type=from_0, help="likewise, of R2: 0")
    p.add("--gp-lambda", type=from_0, help="weight of the gradient penalty, with ...-gp: 10")
    p.add("--gp-target", type=above_0, default=1.0, help="norm of the gradient that it asks for")
    rates = "times 1.5 at 128 pixels, 2 at 256, 3 at 512 and 1024; wgan-gp: up to 0.002"
    p.add("--lr", type=above_0, default=LR, help=rates)
    p.add("--lr-rampup", type=from_0, default=0.0, help="kimg over which the rate rises from 0")
    p.add("--mixing", type=common.probability, help="of styles, probability: 0.9, rows A to E 0")
    p.add("--ema-kimg", type=above_0, default=EMA_KIMG, help="half-life of G's average")
    p.add("--mbstd-group", type=common.not_negative_int, default=4, help="0: no minibatch std")
    p.add("--channel-base", type=number, help="channels times side: 16384")
    p.add("--map-layers", type=common.not_negative_int, help="of mapping: 8, rows A and B 0")
    noisy = dict(action=argparse.BooleanOptionalAction)
    p.add("--noise-inputs", **noisy, help="in every layer of G: on, rows A to D off")

    p = cli.command("generate", generate, "pictures of seeds, figures of the paper, or a film")
    common.add_generate_options(
        p, psi=None, cutoff=8, psi_rule=f"; default: {PSI}, of figures and rows A and B 1"
    )
    figures = "of the paper: mixing (Fig. 3), noise (Figs. 4, 5), truncation (Fig. 8)"
    p.add("--figure", choices=list(FIGURES), help=figures)

    p = cli.command(
        "evaluate", evaluate, "fd8, FID, KID, precision, recall, path length, linear separability"
    )
    common.add_evaluate_options(p)
    common.add_sample_scores_options(p, "fd8,fid,pr,path,ppl,ls")

    args = cli.parse(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))
