"""StyleGAN2, "Analyzing and Improving the Image Quality of StyleGAN" (Karras, Laine, Aittala,
Hellsten, Lehtinen, Aila 2019, arXiv:1912.04958).

In this file, in the order of the signal              paper
    MappingNetwork                                    StyleGAN sec. 2, Fig. 1b
    modulated_conv2d, SynthesisLayer                  sec. 2.2, Eqs. (1)-(3), Fig. 2d
    SynthesisNetwork, Discriminator                   sec. 4.1, Fig. 7 (orig, skip, resnet), Table 2
    logistic_loss, r1_penalty                         StyleGAN's, which StyleGAN2 keeps
    path_lengths, path_length_phase                   sec. 3.2, Eq. (4), appendix B
    train                                             sec. 3.1 (lazy regularization), appendix B
    project                                           sec. 5, appendix D

    python stylegan2.py                               # toy faces, 2 CPU cores, minutes
    python stylegan2.py --data FOLDER_OR_ZIP --size 256 --mirror
    python stylegan2.py generate --checkpoint RUN --seeds 0-7 --psi 0.7
    python stylegan2.py project --checkpoint RUN --input FACE.png
    python stylegan2.py edit --checkpoint RUN --direction "mouth open,hair.light"
    python stylegan2.py evaluate --checkpoint RUN

Results: README. Differs from the paper, with the official PyTorch code (NVlabs/
stylegan2-ada-pytorch): path length every 4 steps (paper: 8); fp16 in the four top resolutions on a
GPU; labels are embedded and normalised apart from z, and D projects on them. Unlike it: by default
convolutions in the other resolutions are TF32.
"""

import argparse
import copy
import math
import sys
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

CONFIGS = {  # Table 1: the last two rows
    "E": dict(channel_base=16384, r1_gamma=100.0),
    "F": dict(channel_base=32768, r1_gamma=10.0),
}
LR, BETAS = 0.002, (0.0, 0.99)  # Adam, appendix B
R1_EVERY, PL_EVERY = 16, 4  # lazy regularization, sec. 3.1; G's interval is the official code's
PL_WEIGHT, PL_DECAY, PL_SHRINK = 2.0, 0.01, 2  # appendix B; path lengths of half a batch
MIXING = 0.9  # style mixing, StyleGAN sec. 3.1
EMA_KIMG = 10.0  # half-life of the weights' average, thousands of images
W_AVG_BETA = 0.995
FP16_BLOCKS, CLAMP = 4, 256.0  # resolutions in half precision, and the limit of their values

# What a plain `python stylegan2.py` trains: small enough for two CPU cores and a few minutes.
TOY = dict(size=32, channel_base=512, channel_max=64, z_dim=64, w_dim=64, map_layers=2)
TOY |= dict(noise_inputs=False)  # cartoons have no stochastic detail: noise would stay as specks
TOY |= dict(kimg=60, batch=16, lr=0.003, r1_gamma=0.3, ema_kimg=2.0, ema_rampup=0.05, every=10)

# =============================================================================
# Networks
# =============================================================================
# Weights are N(0, 1) and scaled where they are used (equalized learning rate, Karras et al. 2017,
# sec. 4.1). Names of parameters are those of the official PyTorch checkpoints.

FIR = (1, 3, 3, 1)  # the resampling filter, along each axis


def fir_filter():
    """FIR as a separable filter of sum 1, for a buffer that no checkpoint holds."""
    return ops.setup_filter(FIR, separable=True)


class Linear(nn.Module):
    """A dense layer with equalized learning rate. forward(x): (N, I) -> (N, O).

    lr_mul: factor of the layer's learning rate; bias: initial value, None for no bias.
    """

    def __init__(self, I, O, act="linear", lr_mul=1.0, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I) / lr_mul)
        self.bias = None if bias is None else nn.Parameter(torch.full((O,), float(bias)))
        self.act, self.gain, self.lr_mul = act, lr_mul / math.sqrt(I), lr_mul

    def forward(self, x):
        w = self.weight.to(x.dtype).mT
        if self.bias is None:
            x = x @ w * self.gain
        else:  # lr_mul * b + gain * x w in one kernel: small layers cost launches, not arithmetic
            x = torch.addmm(self.bias.to(x.dtype), x, w, beta=self.lr_mul, alpha=self.gain)
        return x if self.act == "linear" else ops.bias_act(x, act=self.act)


class Conv2d(nn.Module):
    """A convolution of D (and of skips) with equalized learning rate, resampling and activation.

    forward(x, gain=1): (N, I, H, W) -> (N, O, H * up / down, ...); gain scales result and clamp.
    """

    def __init__(self, I, O, k, act="linear", up=1, down=1, clamp=None, bias=True, fir=FIR):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I, k, k))
        self.bias = nn.Parameter(torch.zeros(O)) if bias else None
        self.register_buffer("fir", ops.setup_filter(fir, separable=True), persistent=False)
        self.gain, self.act, self.clamp = 1 / math.sqrt(I * k * k), act, clamp
        self.up, self.down, self.pad = up, down, k // 2

    def forward(self, x, gain=1.0):
        # Where nothing follows the convolution its weight takes the gain: no pass over x for that.
        plain = self.bias is None and self.act == "linear" and self.clamp is None
        w = (self.weight * (self.gain * gain if plain else self.gain)).to(x.dtype)
        # Like the official code, convolve where it upsamples and correlate elsewhere.
        x = ops.conv2d_resample(
            x, w, self.fir, self.up, self.down, self.pad, flip_weight=self.up == 1
        )
        if plain:
            return x
        clamp = None if self.clamp is None else self.clamp * gain
        act_gain = ops.ACTIVATIONS[self.act].gain * gain
        return ops.bias_act(x, self.bias, act=self.act, gain=act_gain, clamp=clamp)


def normalize(x):
    """Each row to mean square 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """f: Z x C -> W (StyleGAN, Fig. 1b), an MLP with a running mean of its output for truncation.

    forward(z, c=None, psi=1, cutoff=None) -> ws (N, num_ws, w_dim), or (N, w_dim) without num_ws
        z: (N, z_dim), any scale, normalised inside, None if z_dim is 0; c: (N, c_dim), None if 0
        psi: 1 = no truncation, 0 = mean image, in the first `cutoff` layers (None: all)
    In training mode w_avg moves, unless update_avg=False (the second latents of style mixing).
    Raises ValueError if a conditional model gets no c.
    Source: StyleGAN sec. 2 and appendix B; labels: NVlabs/stylegan2-ada-pytorch.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, num_ws, num_layers=8, embed_features=None, layer_features=None,
        lr_mul=0.01, w_avg_beta=W_AVG_BETA,
    ):  # fmt: skip
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws, self.w_avg_beta = z_dim, c_dim, num_ws, w_avg_beta
        embed_features = (embed_features or w_dim) if c_dim else 0
        if c_dim:
            self.embed = Linear(c_dim, embed_features)
        widths = [z_dim + embed_features] + [layer_features or w_dim] * (num_layers - 1) + [w_dim]
        for i in range(num_layers):
            self.add_module(f"fc{i}", Linear(widths[i], widths[i + 1], "lrelu", lr_mul))
        self.num_layers = num_layers
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z, c=None, psi=1.0, cutoff=None, update_avg=True):
        parts = [normalize(z)] if self.z_dim else []
        if self.c_dim:
            if c is None:
                raise ValueError(f"this model is conditional: c (N, {self.c_dim}) is missing")
            parts.append(normalize(self.embed(c)))
        w = torch.cat(parts, 1)
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        if self.num_ws is None:
            return w
        if self.training and update_avg and self.w_avg_beta is not None:
            self.w_avg.copy_(w.detach().mean(0).lerp(self.w_avg, self.w_avg_beta))
        ws = w[:, None].repeat(1, self.num_ws, 1)
        if psi == 1:
            return ws
        truncated = self.w_avg.lerp(ws[:, :cutoff], psi)  # StyleGAN, appendix B
        return torch.cat([truncated, ws[:, truncated.shape[1] :]], 1)


def modulated_conv2d(
    x, weight, style, up=1, down=1, pad=0, fir=None, demodulate=True, flip_weight=True
):
    """Weight modulation and demodulation, sec. 2.2.

    x: (N, I, H, W); weight: (O, I, k, k); style: (N, I), around 1.
    Returns (N, O, H * up / down, ...) and the demodulation (N, O) that it is still to be multiplied
    by, None without: the caller does so in one pass with noise, bias and activation.

    Eq. (1), w' = style * w, is applied to the input channels and Eq. (3), the division by
    |w'|, to the output channels instead of the weights: the same, since convolution is linear.
    """
    O, I, k, _ = weight.shape
    if x.dtype == torch.float16 and demodulate:
        # Demodulation cancels scales of weight and style, and their gradients with them; these keep
        # x in the range of float16.
        with torch.no_grad():
            w_max = torch.linalg.vector_norm(weight, math.inf, (1, 2, 3), keepdim=True)
            w_max = w_max * math.sqrt(I * k * k)
            style_max = style.abs().amax(1, keepdim=True)  # (N, 1)
        weight, style = weight / w_max, style / style_max
    demodulation = None
    if demodulate:
        energy = weight.square().sum([2, 3])  # (O, I)
        demodulation = (style.square() @ energy.T + 1e-8).rsqrt()  # (N, O), Eq. (3)
    x = ops.fused_act(x, scale=style)  # Eq. (1)
    x = ops.conv2d_resample(x, weight.to(x.dtype), fir, up, down, pad, flip_weight=flip_weight)
    return x, demodulation


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU (Fig. 2d).

    forward(x, w, noise="random", gain=1): (N, I, H, W), (N, w_dim) -> (N, O, res, res)
    noise: "random", "const" (the stored map), "none", or a function of a shape that draws it.
    """

    def __init__(self, I, O, w_dim, res, up=1, use_noise=True, clamp=None):
        super().__init__()
        self.affine = Linear(w_dim, I, bias=1.0)
        self.weight = nn.Parameter(torch.randn(O, I, 3, 3))
        self.bias = nn.Parameter(torch.zeros(O))
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise_const", torch.randn(res, res))
        self.register_buffer("fir", fir_filter(), persistent=False)
        self.up, self.use_noise, self.clamp = up, use_noise, clamp

    def forward(self, x, w, noise="random", gain=1.0):
        style = self.affine(w)
        # The kernel of an upsampling layer is a true convolution's, the others correlate.
        x, demodulation = modulated_conv2d(
            x, self.weight, style, up=self.up, pad=1, fir=self.fir, flip_weight=self.up == 1
        )
        noise_map, strength = None, None
        if self.use_noise and noise != "none":
            strength = self.noise_strength
            if noise == "const":
                noise_map = self.noise_const
            elif noise == "random":
                noise_map = torch.randn(len(x), 1, *x.shape[2:], device=x.device)
            else:
                noise_map = noise(len(x), 1, *x.shape[2:])
        clamp = None if self.clamp is None else self.clamp * gain
        # gain * lrelu(x * demodulation + noise_map * strength + bias), clamped
        return ops.fused_act(
            x, demodulation, noise_map, strength, self.bias, "lrelu",
            gain=ops.SQRT2 * gain, clamp=clamp,
        )  # fmt: skip


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to an image, without demodulation, noise or activation.

    forward(x, w): (N, I, H, W), (N, w_dim) -> (N, img_channels, H, W) float32
    """

    def __init__(self, I, O, w_dim, clamp=None):
        super().__init__()
        self.affine = Linear(w_dim, I, bias=1.0)
        self.weight = nn.Parameter(torch.randn(O, I, 1, 1))
        self.bias = nn.Parameter(torch.zeros(O))
        self.clamp = clamp

    def forward(self, x, w):
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        # Here the weights are the smaller thing to scale: 1x1 kernels.
        weight = (self.weight.flatten(1) * style[:, None, :]).to(x.dtype)  # (N, O, I), Eq. (1)
        img = ops.to_image(x, weight)  # the convolution
        img = ops.bias_act(img, self.bias, clamp=self.clamp)
        return img.float() if img.dtype in (torch.float16, torch.bfloat16) else img


def block_type(block):
    """The type that a block computes in: its half type on a GPU, else that of its weights."""
    weight = block.conv1.weight
    return (block.half if weight.is_cuda else None) or weight.dtype


class SynthesisBlock(nn.Module):
    """One resolution of G (Fig. 7). forward(x, img, ws, noise) -> x, img

    x: (N, I, res / 2, res / 2), None in the first block, I = 0; img: RGB so far, or None;
    ws: one (N, w_dim) for each convolution and one for the image, which the next block shares.
    """

    def __init__(self, I, O, w_dim, res, img_channels, architecture, last, half, use_noise, clamp):
        super().__init__()
        self.architecture, self.half = architecture, half
        layer = dict(w_dim=w_dim, res=res, use_noise=use_noise, clamp=clamp)
        if I == 0:
            self.const = nn.Parameter(torch.randn(O, res, res))
        else:
            self.conv0 = SynthesisLayer(I, O, up=2, **layer)
        self.conv1 = SynthesisLayer(O, O, **layer)
        if last or architecture == "skip":
            self.torgb = ToRGB(O, img_channels, w_dim, clamp)
        if I and architecture == "resnet":
            self.skip = Conv2d(I, O, 1, up=2, bias=False)
        self.register_buffer("fir", fir_filter(), persistent=False)

    def forward(self, x, img, ws, noise="random"):
        if x is None:
            x = self.const[None].to(block_type(self)).repeat(len(ws[0]), 1, 1, 1)
            x = self.conv1(x, ws[0], noise)
        else:
            x = x.to(block_type(self))
            if self.architecture == "resnet":
                y = self.skip(x, gain=math.sqrt(0.5))
                x = self.conv0(x, ws[0], noise)
                x = y + self.conv1(x, ws[1], noise, gain=math.sqrt(0.5))
            else:
                x = self.conv1(self.conv0(x, ws[0], noise), ws[1], noise)
        if img is not None:
            img = ops.upsample2d(img, self.fir)
        if hasattr(self, "torgb"):
            y = self.torgb(x, ws[-1])
            img = y if img is None else img + y
        return x, img


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
    """g: W -> images (sec. 4.1, Fig. 7), architecture "skip" (default), "resnet" or "orig".

    forward(ws, noise="random") -> img (N, img_channels, res, res), about [-1, 1]
        ws: (N, num_ws, w_dim); noise: see SynthesisLayer
    """

    def __init__(
        self, w_dim, img_resolution, img_channels=3, channel_base=32768, channel_max=512,
        architecture="skip", half_res=0, half="float16", clamp=None, use_noise=True,
    ):  # fmt: skip
        super().__init__()
        self.resolutions = resolutions(img_resolution)
        I, self.num_ws = 0, 2 * len(self.resolutions)
        for res in self.resolutions:
            O, last = channels(res, channel_base, channel_max), res == img_resolution
            kind = half_type(res, img_resolution, half_res, half)
            block = SynthesisBlock(
                I, O, w_dim, res, img_channels, architecture, last, kind, use_noise, clamp
            )
            self.add_module(f"b{res}", block)
            I = O

    def forward(self, ws, noise="random"):
        x, img, ws = None, None, ws.unbind(1)
        for i, res in enumerate(self.resolutions):  # a block's last w is the next one's first, too
            x, img = getattr(self, f"b{res}")(x, img, ws[max(2 * i - 1, 0) : 2 * i + 2], noise)
        return img


class Generator(nn.Module):
    """mapping and synthesis. forward(z, c=None, psi=1, cutoff=None, noise="random") -> img

    Defaults are config F at 1024 pixels; see MappingNetwork and SynthesisNetwork.
    """

    def __init__(
        self, z_dim=512, c_dim=0, w_dim=512, img_resolution=1024, img_channels=3, map_layers=8,
        channel_base=32768, channel_max=512, architecture="skip", half_res=0, half="float16",
        clamp=None, use_noise=True,
    ):  # fmt: skip
        given = dict(locals())
        super().__init__()
        self.config = {"kind": "G"} | {k: given[k] for k in given if k not in ("self", "__class__")}
        self.synthesis = SynthesisNetwork(
            w_dim, img_resolution, img_channels, channel_base, channel_max, architecture, half_res,
            half, clamp, use_noise,
        )  # fmt: skip
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, map_layers)

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
    """One resolution of D (Fig. 7). forward(x, img) -> x (N, O, res / 2, res / 2), img

    x: (N, I, res, res), None in the first block; img: what FromRGB reads here, or None.
    """

    def __init__(self, I, O, img_channels, architecture, first, half, clamp):
        super().__init__()
        self.architecture, self.half = architecture, half
        if first or architecture == "skip":
            self.fromrgb = Conv2d(img_channels, I, 1, "lrelu", clamp=clamp)
        self.conv0 = Conv2d(I, I, 3, "lrelu", clamp=clamp)
        self.conv1 = Conv2d(I, O, 3, "lrelu", down=2, clamp=clamp)
        if architecture == "resnet":
            self.skip = Conv2d(I, O, 1, down=2, bias=False)
        self.register_buffer("fir", fir_filter(), persistent=False)

    def forward(self, x, img):
        dtype = block_type(self)
        x = None if x is None else x.to(dtype)
        if hasattr(self, "fromrgb"):
            y = self.fromrgb(img.to(dtype))
            x = y if x is None else x + y
            img = ops.downsample2d(img, self.fir) if self.architecture == "skip" else None
        if self.architecture == "resnet":  # both branches times sqrt(1/2): variance stays 1
            y = self.skip(x, gain=math.sqrt(0.5))
            x = y + self.conv1(self.conv0(x), gain=math.sqrt(0.5))
        else:
            x = self.conv1(self.conv0(x))
        return x, img


class DiscriminatorEpilogue(nn.Module):
    """The 4x4 end of D: minibatch standard deviation, convolution, two dense layers.

    forward(x, img, cmap) -> logits (N, 1); cmap: (N, cmap_dim) of a conditional D, or None
    """

    def __init__(self, I, img_channels, architecture, cmap_dim, mbstd_group, mbstd_features, clamp):
        super().__init__()
        self.mbstd_group, self.mbstd_features, self.cmap_dim = mbstd_group, mbstd_features, cmap_dim
        if architecture == "skip":
            self.fromrgb = Conv2d(img_channels, I, 1, "lrelu", clamp=clamp)
        self.conv = Conv2d(I + mbstd_features, I, 3, "lrelu", clamp=clamp)
        self.fc = Linear(I * 16, I, "lrelu")
        self.out = Linear(I, cmap_dim or 1)

    def forward(self, x, img, cmap):
        x = x.to(self.conv.weight.dtype)
        if img is not None:
            x = x + self.fromrgb(img)
        if self.mbstd_features:
            x = minibatch_std(x, self.mbstd_group, self.mbstd_features)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if cmap is None:
            return x
        return (x * cmap).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)  # projection on labels


class Discriminator(nn.Module):
    """D (sec. 4.1, Fig. 7), architecture "resnet" (default), "skip" or "orig".

    forward(img, c=None) -> logits (N, 1); img: (N, img_channels, res, res); c: (N, c_dim)
    Labels: a mapping network and a projection (Miyato and Koyama 2018), as
    NVlabs/stylegan2-ada-pytorch has them. Raises ValueError if a conditional model gets no c.
    """

    def __init__(
        self, c_dim=0, img_resolution=1024, img_channels=3, channel_base=32768, channel_max=512,
        architecture="resnet", half_res=0, half="float16", clamp=None, cmap_dim=None, map_layers=8,
        mbstd_group=4, mbstd_features=1,
    ):  # fmt: skip
        given = dict(locals())
        super().__init__()
        self.config = {"kind": "D"} | {k: given[k] for k in given if k not in ("self", "__class__")}
        widths = {r: channels(r, channel_base, channel_max) for r in resolutions(img_resolution)}
        cmap_dim = (cmap_dim or widths[4]) if c_dim else 0
        self.resolutions = resolutions(img_resolution)[:0:-1]  # res, ..., 8
        for res in self.resolutions:
            block = DiscriminatorBlock(
                widths[res], widths[res // 2], img_channels, architecture,
                res == img_resolution, half_type(res, img_resolution, half_res, half), clamp,
            )  # fmt: skip
            self.add_module(f"b{res}", block)
        self.b4 = DiscriminatorEpilogue(
            widths[4], img_channels, architecture, cmap_dim, mbstd_group, mbstd_features, clamp
        )
        if c_dim:
            self.mapping = MappingNetwork(0, c_dim, cmap_dim, None, map_layers, w_avg_beta=None)

    def forward(self, img, c=None):
        cmap = self.mapping(None, c) if self.config["c_dim"] else None
        x = None
        for res in self.resolutions:
            x, img = getattr(self, f"b{res}")(x, img)
        return self.b4(x, img, cmap)


def build(config):
    """The network that a `config` describes: what its attribute of that name held."""
    kind = dict(G=Generator, D=Discriminator)[config["kind"]]
    return kind(**{k: v for k, v in config.items() if k != "kind"})


# =============================================================================
# Losses
# =============================================================================


def logistic_loss(logits, real):
    """-log sigmoid of +-logits: how far D is from calling the images real (True) or not. (N,)

    The non-saturating loss of G, and either half of D's (Goodfellow et al. 2014).
    """
    return F.softplus(-logits if real else logits).flatten()


def r1_penalty(logits, real):
    """|grad_x D(x)|^2 of each real image (N,) (Mescheder et al. 2018). Weigh it by r1_gamma / 2.

    logits: D(real), of real images that require a gradient.
    """
    with ops.no_weight_gradients():  # they come with the penalty's backward pass
        (grads,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return grads.square().sum([1, 2, 3])


def path_lengths(G, ws, y, noise="random"):
    """|J_w^T y| of each sample (N,), Eq. (4). ws: (N, num_ws, w_dim); y: (N, C, H, W) ~ N(0, 1).

    y is divided by the image side and squares are averaged over layers, as in the official code
    (NVlabs/stylegan2: training/loss.py), which makes the effective weight 2 / (res^2 num_ws).
    """
    img = G.synthesis(ws, noise)
    y = y / math.sqrt(img.shape[2] * img.shape[3])
    with ops.no_weight_gradients():  # they come with the penalty's backward pass
        (J,) = torch.autograd.grad((img * y).sum(), ws, create_graph=True)
    return J.square().sum(2).mean(1).sqrt()


# =============================================================================
# Training
# =============================================================================
# Each phase adds the gradients of its loss, in rounds of at most --batch-gpu samples, whose means
# sum up, as in the official code: Adam does not mind the factor. All random choices are tensors,
# drawn in every step: so phases can be CUDA graphs, and choices equal for any number of processes,
# if the rounds are the same.


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
    """ws of z, or with probability --mixing, of z up to a random layer and of fresh latents above;
    one layer for all samples of all processes."""
    if args.mixing == 0:
        return G.mapping(z, c)
    gate, place = run.rand(2, shared=True)
    layer = 1 + (place * (G.num_ws - 1)).floor()  # 1 ... num_ws - 1
    crossover = torch.where(gate < args.mixing, layer, G.num_ws)
    return mixed_ws(G, z, c, run.randn(*z.shape), crossover)


def generator_phase(G, D, n, sample_c, args, run, noise):
    """Gradients of G for n fakes: -log D(G(z)). Returns the loss."""
    losses = []
    for z, c in rounds(args.batch_gpu, run.randn(n, G.config["z_dim"]), sample_c(n)):
        fake = G.synthesis(mix(G, z, c, args, run), noise)
        loss = logistic_loss(D(fake, c), real=True).mean()
        run.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def path_length_phase(G, pl_mean, n, sample_c, args, run, noise):
    """Gradients of G for path length regularization (StyleGAN2 sec. 3.2): n / PL_SHRINK samples."""
    losses, at_once = [], min(args.batch_gpu or n, n)
    size = at_once // PL_SHRINK  # of each round
    n_pl = n // at_once * size
    res, C = G.config["img_resolution"], G.config["img_channels"]
    for z, c in rounds(size, run.randn(n_pl, G.config["z_dim"]), sample_c(n_pl)):
        ws = mix(G, z, c, args, run)
        lengths = path_lengths(G, ws, run.randn(len(z), C, res, res), noise)
        # The running mean includes these lengths and passes their gradients on, as officially.
        mean = pl_mean.lerp(run.mean(lengths.mean()), PL_DECAY)
        penalty = (lengths - mean).square().mean()
        run.backward(penalty * args.pl_weight * args.pl_every)
        pl_mean.copy_(torch.where(mean.isfinite(), mean, pl_mean).detach())  # float16 may overflow
        losses.append(penalty.detach())
    return torch.stack(losses).mean()


def discriminator_phase(G, D, real, real_c, sample_c, args, run, noise):
    """Gradients of D: -log(1 - D(G(z))) - log D(x). Returns the two losses (2,)."""
    losses, n = [], len(real)
    latents = rounds(args.batch_gpu, run.randn(n, G.config["z_dim"]), sample_c(n))
    for (z, c), (x, x_c) in zip(latents, rounds(args.batch_gpu, real, real_c), strict=True):
        with torch.no_grad():  # in training mode: w_avg moves here, too, as officially
            fake = G.synthesis(mix(G, z, c, args, run), noise)
        loss_fake = logistic_loss(D(fake, c), real=False).mean()
        run.backward(loss_fake)
        loss_real = logistic_loss(D(x, x_c), real=True).mean()
        run.backward(loss_real)
        losses.append(torch.stack([loss_fake.detach(), loss_real.detach()]))
    return torch.stack(losses).mean(0)


def r1_phase(D, real, real_c, args, run):
    """Gradients of D for R1 on the real images."""
    losses = []
    for x, c in rounds(args.batch_gpu, real, real_c):
        x = x.detach().requires_grad_(True)
        penalty = r1_penalty(D(x, c), x).mean()
        run.backward(penalty * (args.r1_gamma / 2) * args.r1_every)
        losses.append(penalty.detach())
    return torch.stack(losses).mean()


def train_step(G, D, opts, pl_mean, real, real_c, sample_c, step, args, run, noise="random"):
    """One iteration: G, every --pl-every steps path length, D, every --r1-every steps R1, each with
    an Adam step of its own (lazy regularization, sec. 3.1). Returns {name: loss}, unweighted.

    opts: of G and D; pl_mean: (), moved in place; real: (N, C, H, W) in [-1, 1]; real_c: (N, c_dim)
    or None; sample_c(n): labels of n fakes; noise: see SynthesisLayer, in training run.randn. `run`
    gives rand, randn, mean, backward(loss), which adds gradients, and graph(phase, optimizer) -> a
    function of phase's arguments: the phase, from no gradients on, and a step of the optimizer with
    their means over all processes, 0 where there are none; what overflowed in float16 is made
    finite. A GPU repeats both as one CUDA graph, so that all that changes must be tensors.
    """
    losses, n, (opt_G, opt_D) = {}, len(real), opts

    # ---- G; D only passes gradients on --------------------------------------------------------
    D.requires_grad_(False)
    update_G = run.graph(generator_phase, opt_G)  # the phase, then a step of opt_G
    losses["G"] = update_G(G, D, n, sample_c, args, run, noise)
    if args.pl_weight and step % args.pl_every == 0:
        regularize_G = run.graph(path_length_phase, opt_G)
        losses["reg/pl"] = regularize_G(G, pl_mean, n, sample_c, args, run, noise)
        losses["reg/pl_mean"] = pl_mean.clone()

    # ---- D, on fakes of the new G -------------------------------------------------------------
    D.requires_grad_(True)
    update_D = run.graph(discriminator_phase, opt_D)
    both = update_D(G, D, real, real_c, sample_c, args, run, noise)
    losses["D_fake"], losses["D_real"] = both
    if args.r1_gamma and step % args.r1_every == 0:
        regularize_D = run.graph(r1_phase, opt_D)
        losses["reg/r1"] = regularize_D(D, real, real_c, args, run)
    return losses


def lazy_adam(run, net, lr, every):
    """Adam with the rate times, and betas to the power of, k / (k + 1), since every k steps come
    with one more, of the regularizer (StyleGAN2 appendix B)."""
    share = every / (every + 1)
    return run.adam([net], lr * share, tuple(beta**share for beta in BETAS))


@torch.no_grad()
def update_ema(G_ema, G, beta):
    """G_ema = lerp(G, G_ema, beta); buffers (w_avg, noise maps) are copied."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - beta)
    torch._foreach_copy_(list(G_ema.buffers()), list(G.buffers()))


def new_networks(args, size, c_dim, half):
    """{"G", "D"} with fresh weights; half: "float16", "bfloat16" or None."""
    both = dict(c_dim=c_dim, img_resolution=size, img_channels=args.channels)
    both |= dict(channel_base=args.channel_base, channel_max=args.channel_max)
    if half:
        both |= dict(half_res=FP16_BLOCKS, half=half, clamp=CLAMP)
    G = dict(z_dim=args.z_dim, w_dim=args.w_dim, map_layers=args.map_layers, architecture=args.G)
    G |= dict(use_noise=args.noise_inputs)
    D = dict(architecture=args.D, mbstd_group=args.mbstd_group, map_layers=args.D_map_layers)
    return {"G": Generator(**both, **G), "D": Discriminator(**both, **D)}


def train(args):
    first = common.first_weights(args)
    given = load_networks(first)[0] if first else {}
    if args.channels is None:
        args.channels = next((net.config["img_channels"] for net in given.values()), 3)
    fill_options(args, given)
    run = common.Run("stylegan2", args, __file__, own_half=True)
    run.log_every, run.fixed = 1000, ("batch", "checkpoint", "config")
    check_options(args, run.world)
    toy = common.TOY_CLASSES if args.cond else common.TOY_FACES
    source = common.open_images(args.data, args.size, toy)

    # ---- data: image n is a pure function of (seed, n) ----------------------------------------
    data, size = common.square_pictures(args, source, args.channels)
    labels = common.one_hot(args, source) if args.cond else None
    all_labels = None if labels is None else torch.from_numpy(labels).to(run.device)

    def image(n):
        epoch, i = divmod(n, len(data))
        k = common.shuffled(len(data), args.seed, epoch)[i]
        rng = common.item_rng(args.seed, epoch, i)
        pixels = common.crop_and_flip(data[k], None, args.mirror, rng)
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
    opts = {
        "G": lazy_adam(run, G, args.lr, args.pl_every),
        "D": lazy_adam(run, D, args.lr, args.r1_every),
    }
    pl_mean = torch.zeros((), device=run.device)

    start = run.restore(nets, opts, {"pl": common.Held(mean=pl_mean)}, data.names)
    share = args.batch // run.world
    n = min(args.batch_gpu or share, share)  # what D sees at once
    run.say(
        f"{len(data)} images of {size}x{size}; G has {common.count(G):,} parameters,"
        f" D {common.count(D):,};"
        f" batch {args.batch}, {n} at a time on {run.world} processes"
    )
    if len(data) < args.batch:
        run.say(f"only {len(data)} images: a batch of {args.batch} holds each more than once")
    examples = common.sample_inputs(G_ema, labels, args.seed)
    if start == 0:
        run.save_picture(common.grid(data.all(len(examples[0])), 8), "reals")
        common.score_samples(run, G_ema, data, labels, n)

    for step, (real, *real_c) in run.batches(image, start, -(-args.kimg * 1000 // args.batch)):
        real_c = real_c[0] if real_c else None
        losses = train_step(
            G, D, opts.values(), pl_mean, real, real_c, sample_c, step, args, run, run.randn
        )

        # ---- the average of G, of which samples and scores are made ---------------------------
        half_life = args.ema_kimg * 1000
        if args.ema_rampup:  # an average over less than was seen so far
            half_life = min(half_life, step * args.batch * args.ema_rampup)
        update_ema(G_ema, G, 0.5 ** (args.batch / max(half_life, 1e-8)))

        run.log(losses, kimg=run.steps_done * args.batch / 1000)
        keep = run.due(args.keep_every * 1000) or run.steps_done == run.total
        if keep or run.due(args.every * 1000):
            run.save_picture(common.grid(common.sample(G_ema, *examples, n), 8))
            common.score_samples(run, G_ema, data, labels, n)
            for net in (G, G_ema):  # each rank's moved with its own samples
                net.mapping.w_avg.copy_(run.mean(net.mapping.w_avg))
            run.save(keep=keep)
    run.say(f"samples and checkpoint are in {run.folder}")


def fill_options(args, nets):
    """Options that were left out: those of the networks to start from, else of --config."""
    options = dict(channel_max=512, z_dim=512, w_dim=512, map_layers=8, G="skip", D="resnet")
    options |= dict(D_map_layers=8, noise_inputs=True) | CONFIGS[args.config]
    common.set_missing(args, options | common.stylegan2_options(nets))


def check_options(args, world):
    share = args.batch // world
    n = min(args.batch_gpu or share, share)
    if share % n:
        raise UserError(f"--batch-gpu {n} does not divide the {share} of a process.")
    if n % min(args.mbstd_group, n):
        raise UserError(
            f"--mbstd-group {args.mbstd_group} does not divide the {n} images that D sees at once."
        )
    if args.pl_weight and n < PL_SHRINK:
        raise UserError(f"path length needs {PL_SHRINK} images at once: or pass --pl-weight 0.")


# =============================================================================
# Official checkpoints
# =============================================================================


def from_official(arrays, options=None):
    """A ready G or D from {official name: tensor} of stylegan2-ada-pytorch and stylegan3, of the
    TensorFlow stylegan2 and stylegan2-ada, or of rosinality/stylegan2-pytorch.

    Widths, depth and architecture are read off names and shapes; what leaves no trace there
    (clamping, half precision, minibatch std group) off `options`, the official arguments, if given.
    Where a file has no w_avg it is the mean of 10,000 w. Raises ValueError for anything else.
    """
    arrays = common.stylegan2_names(arrays, options or {})
    net = build(common.stylegan2_config(arrays, options or {}))
    common.fill(net, arrays, optional=("noise_const", "w_avg"))
    if net.config["kind"] == "G" and "mapping.w_avg" not in arrays:
        net.mapping.w_avg.copy_(common.w_statistics(net)[0])
    return net


# =============================================================================
# generate, project, edit, evaluate
# =============================================================================


def load_networks(path):
    """({"G", "D", "G_ema": network}, options of its training) of a checkpoint, a run, or an
    official file."""
    return common.load_gan(path, ("stylegan2", "stylegan2_ada"), build, from_official)


def project(args):
    """Finds the ws whose image is nearest to a picture (sec. 5, appendix D)."""
    common.out_folder(args)
    G, c, _ = common.load_generator(args, load_networks)
    device, size, out = next(G.parameters()).device, G.config["img_resolution"], Path(args.out)
    target = common.read_square(args.input, size, G.config["img_channels"])
    common.keep_originals([out / "target.png", out / "projected.png"], "--out", args.input)
    real = common.to_float(target[None], device)
    lpips = common.lpips_or_explain(args, size, device)
    distance = common.distance_to(real, lpips)
    mean, std = common.w_statistics(G, None if c is None else c.to(device))
    start = mean[None] if args.space == "w" else mean.repeat(G.num_ws, 1)
    noises, frames = common.noise_maps(G), []

    def show(step, image, d):
        if step % args.film_every == 0 or step == args.steps - 1:
            frames.append(common.grid(torch.stack([target, common.to_uint8(image[0]).cpu()]), 2))
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step + 1}/{args.steps}: distance {d.item():.4f}", flush=True)

    path, _ = common.project(
        lambda ws: G.synthesis(ws, "const"), distance, start, std, G.num_ws, noises.values(),
        steps=args.steps, lr=args.lr, on_step=show,
        generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    w = path[-1].expand(G.num_ws, -1)[None]
    arrays = {"w": w} | noises
    common.save_arrays(out / "projected.npz", **{k: a.cpu().numpy() for k, a in arrays.items()})
    common.save_png(out / "target.png", common.to_picture(target))
    common.save_png(out / "projected.png", common.to_picture(common.synthesize(G, w)[0]))
    common.save_film(out / "progress.webp", frames)
    print(f"projected.npz, projected.png, target.png and progress.webp are in {out}")


def generate(args):
    """Pictures of seeds, the style-mixing table of StyleGAN's Fig. 3, or an interpolation film."""
    common.generate(args, *common.load_generator(args, load_networks)[:2])


def edit(args):
    """Directions of attributes in W, and where pictures change along them."""
    common.edit_generator(args, *common.load_generator(args, load_networks))


def evaluate(args):
    """fd8, FID and KID, precision and recall, and path length of untruncated samples, against
    pictures that are mirrored at random if training mirrored them."""
    common.evaluate_generator(args, load_networks, build)


def main(argv=None):
    sizes = ("channel_base", "channel_max", "z_dim", "w_dim", "map_layers", "noise_inputs")
    cli = common.CommandLine("stylegan2.py", __doc__, {"toy": TOY}, sizes)
    number, above_0, from_0 = common.positive_int, common.positive, common.not_negative

    p = cli.command("train", train, "train on one set of pictures (default command)")
    common.add_train_options(
        p, batch=32, every="kimg", default_every=200,
        gpu_precision="fp16+tf32", half=common.OWN_HALF,
    )  # fmt: skip
    common.add_stylegan_train_options(p)
    p.add("--config", choices=list(CONFIGS), default="F", help="widths and R1 weight of Table 1")
    p.add("--mirror", action="store_true", help="flip images at random")
    p.add("--channels", type=int, choices=(1, 3), help="3, or 1: greyscale")
    p.add("--kimg", type=number, default=25000, help="length, in thousands of images")
    p.add("--G", choices=("skip", "resnet", "orig"), help="architecture, Fig. 7: skip")
    p.add("--D", choices=("resnet", "skip", "orig"), help="likewise: resnet")
    p.add("--lr", type=above_0, default=LR)
    p.add("--r1-gamma", type=from_0, help="weight of R1: config F 10, E 100")
    p.add("--r1-every", type=number, default=R1_EVERY, help="steps between R1")
    pl = "of path length, unstable in batches below 8; 0: off"
    p.add("--pl-weight", type=from_0, default=PL_WEIGHT, help=pl)
    p.add("--pl-every", type=number, default=PL_EVERY, help="steps between path lengths")
    p.add("--mixing", type=common.probability, default=MIXING, help="probability of style mixing")
    p.add("--ema-kimg", type=above_0, default=EMA_KIMG, help="half-life of G's average")
    p.add("--ema-rampup", type=from_0, help="limit of it, as a share of the images seen")
    p.add("--mbstd-group", type=number, default=4, help="of minibatch standard deviation")
    p.add("--channel-base", type=number, help="channels times side: config F 32768, E 16384")
    p.add("--map-layers", type=number, help="depth of the mapping network: 8")
    p.add("--D-map-layers", type=common.not_negative_int, help="likewise for D's labels: 8")
    noisy = dict(action=argparse.BooleanOptionalAction)
    p.add("--noise-inputs", **noisy, help="StyleGAN's noise in every layer of G: yes")

    p = cli.command("generate", generate, "pictures of seeds, a style-mixing table, or a film")
    common.add_generate_options(p)

    p = cli.command("project", project, "find the latent of a picture, in W or W+")
    common.add_generator_options(p)
    p.add("--input", required=True, help="a picture: cropped and resized to the model's size")
    p.add("--space", choices=("w", "w+"), default="w", help="w+: every layer its own w")
    p.add("--steps", type=number, default=1000)
    p.add("--lr", type=above_0, default=0.1)
    p.add("--seed", type=common.one_seed, default=0)
    p.add("--film-every", type=number, default=10, help="steps between frames of progress.webp")
    common.add_vgg_options(p)

    p = cli.command("edit", edit, "move along directions of attributes, measure what changes where")
    common.add_generator_options(p)
    p.add("--seeds", type=common.seeds, default="0-7", help="of the pictures to show, as in 0-7,42")
    common.add_edit_options(p)
    p.add("--data", help="with label maps; default: what the checkpoint was trained on")
    p.set_defaults(cache="off")  # pictures are read once
    common.add_labelled_options(p)

    p = cli.command("evaluate", evaluate, "fd8, FID, KID, precision, recall and path length")
    common.add_evaluate_options(p)
    common.add_sample_scores_options(p)

    args = cli.parse(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))
