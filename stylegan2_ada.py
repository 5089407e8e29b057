"""StyleGAN2-ADA, "Training Generative Adversarial Networks with Limited Data" (Karras, Aittala,
Hellsten, Laine, Lehtinen, Aila 2020, arXiv:2006.06676).

In this file, beside the networks of StyleGAN2        paper
    CONFIGS                                           appendix D
    AugmentPipe                                       sec. 2, appendix B: T, the 18 transformations
    consistency_loss                                  sec. 2.1: bCR, which the paper compares with
    adapt                                             sec. 3: r_t, and p that follows it
    freeze                                            sec. 4.2, Freeze-D for transfer learning
    overfitting                                       Fig. 1, Eq. (1)
    train                                             Fig. 2b: D sees all images through T

    python stylegan2_ada.py                           # 200 toy faces, 2 CPU cores, minutes
    python stylegan2_ada.py --data FOLDER_OR_ZIP --size 256 --mirror
    python stylegan2_ada.py --data NEW --checkpoint FFHQ.pkl --freezed 10
    python stylegan2_ada.py generate --checkpoint RUN --seeds 0-7 --psi 0.7
    python stylegan2_ada.py timelapse --checkpoint RUN
    python stylegan2_ada.py evaluate --checkpoint RUN
    python stylegan2.py project --checkpoint RUN --input FACE.png

Results: README. Differs from the paper, with the official PyTorch code (NVlabs/
stylegan2-ada-pytorch): r_t counts the logits of R1 steps, too; p may pass 1; D maps labels by eight
layers; flips and turns pass through the wavelet resampler and so are not exact to the pixel. Unlike
it: by default convolutions in the lower resolutions are TF32.
"""

import argparse
import copy
import functools
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import ops_cuda as ops
from common import UserError

# =============================================================================
# The paper's numbers
# =============================================================================

BETAS = (0.0, 0.99)  # Adam, StyleGAN2 appendix B
R1_EVERY, PL_EVERY = 16, 4  # lazy regularization, StyleGAN2 sec. 3.1; official code
PL_WEIGHT, PL_DECAY, PL_SHRINK = 2.0, 0.01, 2  # path lengths of half a batch
MIXING = 0.9  # style mixing, StyleGAN sec. 3.1
W_AVG_BETA = 0.995
FP16_BLOCKS, CLAMP = 4, 256.0  # resolutions in half precision, and the limit of their values
ADA_TARGET, ADA_EVERY = 0.6, 4  # of r_t, sec. 3; steps between changes of p
ADA_KIMG, ADA_KIMG_TRANSFER = 500, 100  # thousands of images in which p may go from 0 to 1
LEAKS = 0.8  # p from which on augmentations tend to appear in generated images, sec. 2.2
BCR_WEIGHT, BCR_SHIFT = 10.0, 1 / 32  # Zhao et al., arXiv:2002.04724; shift / image's side

# fmt: off
CONFIGS = {  # appendix D and the official train.py; gpus: how many share the batch there
    "stylegan2": dict(gpus=8, batch=32, mbstd_group=4, channel_base=32768, map_layers=8,
                      lr=0.002, r1_gamma=10.0, ema_kimg=10.0),
    "paper256": dict(gpus=8, batch=64, mbstd_group=8, channel_base=16384, map_layers=8,
                     lr=0.0025, r1_gamma=1.0, ema_kimg=20.0),
    "paper512": dict(gpus=8, batch=64, mbstd_group=8, channel_base=32768, map_layers=8,
                     lr=0.0025, r1_gamma=0.5, ema_kimg=20.0),
    "paper1024": dict(gpus=8, batch=32, mbstd_group=4, channel_base=32768, map_layers=8,
                      lr=0.002, r1_gamma=2.0, ema_kimg=10.0),
    "cifar": dict(gpus=2, batch=64, mbstd_group=32, channel_base=32768, map_layers=2,
                  lr=0.0025, r1_gamma=0.01, ema_kimg=500.0, ema_rampup=0.05, kimg=100_000,
                  pl_weight=0.0, mixing=0.0, D="orig"),
}
# fmt: on


def auto_config(res, gpus, batch=None):
    """--config auto, of the official train.py: sensible values for a resolution and a number of
    GPUs. They follow a --batch that is given, where officially they would stay as without it."""
    batch = batch or max(min(gpus * min(4096 // res, 32), 64), gpus)
    return dict(
        gpus=gpus, batch=batch, mbstd_group=min(batch // gpus, 4), map_layers=2,
        channel_base=32768 if res >= 512 else 16384, lr=0.002 if res >= 1024 else 0.0025,
        r1_gamma=0.0002 * res**2 / batch, ema_kimg=batch * 10 / 32, ema_rampup=0.05,
    )  # fmt: skip


# What a plain `python stylegan2_ada.py` trains: 200 faces, on two CPU cores in minutes.
TOY = dict(size=32, subset=200, channel_base=512, channel_max=64, z_dim=64, w_dim=64)
TOY |= dict(noise_inputs=False)  # cartoons have no stochastic detail: noise would stay as specks
TOY |= dict(kimg=60, batch=16, lr=0.003, r1_gamma=0.3, ema_kimg=2.0, ada_kimg=30, every=5)

# =============================================================================
# Networks
# =============================================================================
# Those of StyleGAN2 (arXiv:1912.04958), whose sections, figures and equations are meant here.
#
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
# Augmentation
# =============================================================================
# D sees images only through a random T, or it would learn the few there are by heart. G does not
# learn to draw augmented ones where real and generated images pass through the same T, and T, as a
# map of distributions, can be undone (sec. 2.2, appendix C): each transformation is left out with
# probability 1 - p, which makes even those invertible that would not be so at p = 1.

CATEGORIES = {  # appendix B: what each --augpipe is made of, in the order in which it is applied
    "blit": ("xflip", "rotate90", "xint"),
    "geom": ("scale", "rotate", "aniso", "xfrac"),
    "color": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "filter": ("imgfilter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
}
UNIONS = ("blit", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc")  # each has one category more
PIPES = CATEGORIES | dict(zip(UNIONS, itertools.accumulate(CATEGORIES.values()), strict=True))

STRENGTHS = dict(
    xint_max=0.125,  # of the image's side, uniform to both sides
    scale_std=0.2,  # of log2
    rotate_max=1.0,  # of half a turn, uniform to both sides
    aniso_std=0.2,  # of log2
    xfrac_std=0.125,  # of the image's side
    brightness_std=0.2,  # of values in [-1, 1]
    contrast_std=0.5,  # of log2
    hue_max=1.0,  # of half a turn, uniform to both sides
    saturation_std=1.0,  # of log2
    imgfilter_bands=(1.0, 1.0, 1.0, 1.0),  # multipliers of p, from the lowest octave to the highest
    imgfilter_std=1.0,  # of log2
    noise_std=0.1,  # of the noise's deviation, half normal
    cutout_size=0.5,  # of the image's side
)

# sym6, the orthogonal wavelet whose lowpass resamples images; LOW, HIGH: of sym2.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
LOW, HIGH = np.array([[-1, 0, 9, 16, 9, 0, -1], [1, 0, -9, 16, -9, 0, 1]]) / 32
BAND_POWER = np.array([10, 1, 1, 1]) / 13  # expected, of natural images with their 1/f spectrum


def octave_bands():
    """The bandpass filters (4, 43) of the image-space filtering, from the lowest octave, [0, pi/8],
    to the highest, [pi/2, pi]. They add up to a unit impulse."""

    def spread(h, k):  # k - 1 zeros between taps
        row = np.zeros(k * (len(h) - 1) + 1)
        row[::k] = h
        return row

    low = np.convolve(spread(LOW, 2), LOW)
    rows = [
        np.convolve(spread(LOW, 4), low), np.convolve(spread(HIGH, 4), low),
        np.convolve(spread(HIGH, 2), LOW), HIGH,
    ]  # fmt: skip
    return np.stack([np.pad(row, (43 - len(row)) // 2) for row in rows])


def scaling(*factors):
    """k factors (N,) -> homogeneous (N, k + 1, k + 1)."""
    return torch.diag_embed(torch.stack([*factors, torch.ones_like(factors[0])], 1))


def translation(t):
    """(N, k) -> homogeneous (N, k + 1, k + 1)."""
    k = t.shape[1]
    return torch.eye(k + 1, dtype=t.dtype, device=t.device) + F.pad(t[:, :, None], (k, 0, 0, 1))


def rotation(theta):
    """Angles (N,) -> homogeneous (N, 3, 3)."""
    cos, sin, none = theta.cos(), theta.sin(), torch.zeros_like(theta)
    rows = [cos, -sin, none, sin, cos, none, none, none, torch.ones_like(theta)]
    return torch.stack(rows, 1).unflatten(1, (3, 3))


def vector(like, *values):
    """(k,) of numbers, filled in on the device of `like`: a copy from the host would wait."""
    return torch.stack([like.new_full((), value) for value in values])


class Draws:
    """Random numbers, and the maximum over processes, for a single one; common.Run has them for
    several."""

    def __init__(self, device, seed=None):
        self.device = device
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def rand(self, n, *shape):
        return torch.rand(n, *shape, generator=self.generator, device=self.device)

    def randn(self, n, *shape):
        return torch.randn(n, *shape, generator=self.generator, device=self.device)

    def maximum(self, x):
        return x


class AugmentPipe(nn.Module):
    """T, the 18 transformations of appendix B, each applied to each image with probability p.

    forward(img, draws=None) -> images of the same shape, twice differentiable in img
        img: (N, C, H, W), floats in [-1, 1] (results may lie outside); C is 3, or 1, then without
        hue and saturation; any C without colours. draws: where random numbers come from.
    pipe: a name of PIPES, or {transformation: multiplier of p}; strengths: see STRENGTHS. p is a
    buffer, to be changed in place; a transformation's own, p times its multiplier, acts as 1 above
    1. Nothing waits for the GPU.
    Raises ValueError for other numbers of channels, TypeError for unknown names. `imgfilter` needs
    sides of 22 or more.
    """

    def __init__(self, pipe="bgc", p=0.0, **strengths):
        super().__init__()
        if isinstance(pipe, str):
            pipe = dict.fromkeys(PIPES.get(pipe, (pipe,)), 1.0)
        self.multipliers, self.strengths = dict(pipe), STRENGTHS | strengths
        known = set(PIPES["bgcfnc"])
        if unknown := [*(set(self.multipliers) - known), *(set(strengths) - set(STRENGTHS))]:
            raise TypeError(f"AugmentPipe knows no {', '.join(map(str, unknown))}")
        self.register_buffer("p", torch.tensor(float(p)))
        constants = dict(
            lowpass=ops.setup_filter(SYM6),
            bands=octave_bands(),
            power=BAND_POWER,
            grey=np.pad(np.full((3, 3), 1 / 3), (0, 1)),  # projects RGB on its grey axis v
            cross=np.pad([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], (0, 1)) / math.sqrt(3),  # v x RGB
        )
        for name, value in constants.items():
            value = torch.as_tensor(value, dtype=self.p.dtype)
            self.register_buffer(name, value, persistent=False)

    def forward(self, img, draws=None):
        draws = draws or Draws(img.device)
        img = self.warp(img, draws)
        img = self.recolor(img, draws)
        return self.corrupt(self.equalize(img, draws), draws)

    def has(self, *names):
        return any(self.multipliers.get(name) for name in names)

    def pick(self, name, value, identity, draws, share=1.0):
        """Per sample: value with probability share * p, else identity."""
        p = self.multipliers[name] * share * self.p
        if name == "rotate":  # it has two chances, which together make p
            p = 1 - (1 - p).clamp(0, 1).sqrt()
        chosen = draws.rand(len(value)) < p
        chosen = chosen.reshape(-1, *[1] * (value.ndim - 1))
        return torch.where(chosen, value.to(self.p.dtype), identity)

    # ---- geometry --------------------------------------------------------------------------------

    def geometry(self, N, W, H, draws):
        """(N, 3, 3), from output to input positions: in pixels from the image's centre, x to the
        right, y down. The first transformation meets the image first."""
        s, pick = self.strengths, functools.partial(self.pick, draws=draws)
        size = vector(self.p, W, H)
        G = torch.eye(3, dtype=self.p.dtype, device=self.p.device).expand(N, 3, 3)

        def turn():
            return pick("rotate", (2 * draws.rand(N) - 1) * (math.pi * s["rotate_max"]), 0.0)

        if self.has("xflip"):
            flip = pick("xflip", (2 * draws.rand(N)).floor(), 0.0)
            G = G @ scaling(1 - 2 * flip, torch.ones_like(flip))
        if self.has("rotate90"):
            quarters = pick("rotate90", (4 * draws.rand(N)).floor(), 0.0)
            G = G @ rotation(quarters * (math.pi / 2))
        if self.has("xint"):
            t = pick("xint", (2 * draws.rand(N, 2) - 1) * s["xint_max"], 0.0)
            G = G @ translation(-(t * size).round())
        if self.has("scale"):
            factor = pick("scale", (draws.randn(N) * s["scale_std"]).exp2(), 1.0)
            G = G @ scaling(1 / factor, 1 / factor)
        if self.has("rotate"):  # before and after the anisotropic scaling: it may have any axis
            G = G @ rotation(turn())
        if self.has("aniso"):
            factor = pick("aniso", (draws.randn(N) * s["aniso_std"]).exp2(), 1.0)
            G = G @ scaling(1 / factor, factor)
        if self.has("rotate"):
            G = G @ rotation(turn())
        if self.has("xfrac"):
            t = pick("xfrac", draws.randn(N, 2) * s["xfrac_std"], 0.0)
            G = G @ translation(-t * size)
        return G

    def warp(self, img, draws):
        """All of the geometry at once: the image, continued by reflection, is upsampled by the
        wavelet's lowpass, read bilinearly at twice the resolution, and downsampled again."""
        if not self.has(*PIPES["bg"]):
            return img
        N, _, H, W = img.shape
        G = self.geometry(N, W, H, draws)[:, :2]  # (N, 2, 3)
        rim = len(self.lowpass) // 4  # half of the filter's length, in pixels of the image

        # How far beyond the image the batch reaches to the left and up, to the right and down; at
        # most to where a second reflection would begin. What lies further is 0.
        half = (vector(G, W, H) - 1) / 2
        spread, shift = G[:, :, :2].abs() @ half, G[:, :, 2]  # of the corners, (N, 2)
        reach = torch.stack([spread - shift, spread + shift]).amax(1)  # (2, 2): side, axis
        reach = draws.maximum(reach + 2 * rim - half)  # over all processes
        reach = reach.clamp(min=0).minimum(2 * half).ceil()
        x = ops.warp(img, G, reach, self.lowpass)  # at twice the resolution, with a rim
        return ops.downsample2d(x, self.lowpass, padding=-2 * rim, flip_filter=True)

    # ---- colours ---------------------------------------------------------------------------------

    def colors(self, N, C, draws):
        """(N, 4, 4), homogeneous maps of RGB."""
        s, pick = self.strengths, functools.partial(self.pick, draws=draws)
        I = torch.eye(4, dtype=self.p.dtype, device=self.p.device)
        M = I.expand(N, 4, 4)
        if self.has("brightness"):
            b = pick("brightness", draws.randn(N) * s["brightness_std"], 0.0)
            M = translation(b[:, None].expand(-1, 3)) @ M
        if self.has("contrast"):
            c = pick("contrast", (draws.randn(N) * s["contrast_std"]).exp2(), 1.0)
            M = scaling(c, c, c) @ M
        if self.has("lumaflip"):
            flip = pick("lumaflip", (2 * draws.rand(N)).floor(), 0.0)
            M = (I - 2 * flip[:, None, None] * self.grey) @ M
        if self.has("hue") and C > 1:  # about the grey axis, by Rodrigues' formula
            theta = pick("hue", (2 * draws.rand(N) - 1) * (math.pi * s["hue_max"]), 0.0)
            theta, K = theta[:, None, None], self.cross
            M = (I + theta.sin() * K + (1 - theta.cos()) * (K @ K)) @ M
        if self.has("saturation") and C > 1:
            c = pick("saturation", (draws.randn(N) * s["saturation_std"]).exp2(), 1.0)
            M = (self.grey + (I - self.grey) * c[:, None, None]) @ M
        return M

    def recolor(self, img, draws):
        if not self.has(*PIPES["color"]):
            return img
        N, C, H, W = img.shape
        if C not in (1, 3):
            raise ValueError(f"colours are augmented in images of 1 or 3 channels, not {C}")
        M = self.colors(N, C, draws)[:, :3].to(img.dtype)  # (N, 3, 4)
        A, b = M[:, :, :3], M[:, :, 3:]
        if C == 1:  # what becomes of the mean of three equal channels
            A, b = A.sum(2, keepdim=True).mean(1, keepdim=True), b.mean(1, keepdim=True)
        return (A @ img.flatten(2) + b).reshape(N, C, H, W)

    # ---- image-space filtering -------------------------------------------------------------------

    def gains(self, N, draws):
        """Factors (N, 4) of the four octaves, which keep the expected power of the image."""
        gains = torch.ones(N, 4, dtype=self.p.dtype, device=self.p.device)
        for i, share in enumerate(self.strengths["imgfilter_bands"]):
            t = (draws.randn(N) * self.strengths["imgfilter_std"]).exp2()
            t = self.pick("imgfilter", t, 1.0, draws, share)
            band = torch.arange(4, device=t.device) == i
            t = torch.where(band, t[:, None], 1.0)  # (N, 4)
            gains = gains * t / (self.power * t.square()).sum(1, keepdim=True).sqrt()
        return gains

    def equalize(self, img, draws):
        if not self.has("imgfilter"):
            return img
        N, C, H, W = img.shape
        taps = (self.gains(N, draws) @ self.bands).to(img.dtype)  # (N, 43)
        taps = taps.repeat_interleave(C, 0)[:, None, None]
        x = F.pad(img, [taps.shape[-1] // 2] * 4, "reflect").flatten(0, 1)[None]
        x = ops.conv2d(x, taps, groups=N * C)
        x = ops.conv2d(x, taps.mT, groups=N * C)
        return x.reshape(N, C, H, W)

    # ---- noise and cutout ------------------------------------------------------------------------

    def corrupt(self, img, draws):
        N, C, H, W = img.shape
        if self.has("noise"):
            sigma = draws.randn(N).abs() * self.strengths["noise_std"]
            sigma = self.pick("noise", sigma, 0.0, draws)[:, None, None, None]
            img = img + (sigma * draws.randn(N, C, H, W)).to(img.dtype)
        if self.has("cutout"):
            size = self.p.new_full((N, 1), self.strengths["cutout_size"])
            size = self.pick("cutout", size, 0.0, draws)
            centre = draws.rand(N, 2)
            x, y = ((torch.arange(n, device=img.device) + 0.5) / n for n in (W, H))
            outside_x = (x - centre[:, :1]).abs() >= size / 2  # (N, W)
            outside_y = (y - centre[:, 1:]).abs() >= size / 2  # (N, H)
            img = img * (outside_x[:, None, None, :] | outside_y[:, None, :, None])
        return img


# =============================================================================
# Losses
# =============================================================================
# All but the last are StyleGAN2's, which the sections and equations belong to.


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


def consistency_loss(D, S, seen, c, logits, draws):
    """bCR (Zhao et al., arXiv:2002.04724): how much D's logits (N, 1) of the images `seen` change
    when S shifts these. (N,)

    With colours or turns as S, G would be free to paint them, too (sec. 2.1): a leak.
    """
    return (D(S(seen, draws), c) - logits).square().flatten()


# =============================================================================
# Training
# =============================================================================
# Each phase adds the gradients of its loss, in rounds of at most --batch-gpu samples, whose means
# sum up, as in the official code: Adam does not mind the factor. All random choices are tensors,
# drawn in every step: so phases can be CUDA graphs, and choices equal for any number of processes,
# if the rounds are the same.
# T(img, run) draws anew for every sample and every call; G's gradients reach it through T.


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


def generator_phase(G, D, T, n, sample_c, args, run, noise):
    """Gradients of G for n fakes: -log D(T(G(z))). Returns the loss."""
    losses = []
    for z, c in rounds(args.batch_gpu, run.randn(n, G.config["z_dim"]), sample_c(n)):
        fake = G.synthesis(mix(G, z, c, args, run), noise)
        loss = logistic_loss(D(T(fake, run), c), real=True).mean()
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


def discriminator_phase(G, D, T, S, real, real_c, sample_c, args, run, noise):
    """Gradients of D: -log(1 - D(T(G(z)))) - log D(T(x)), and with --bcr-weight the consistency
    under S. Returns {name: value} and D's logits (N, 1) of real images."""
    rows, logits_real, n = [], [], len(real)
    latents = rounds(args.batch_gpu, run.randn(n, G.config["z_dim"]), sample_c(n))
    for (z, c), (x, x_c) in zip(latents, rounds(args.batch_gpu, real, real_c), strict=True):
        with torch.no_grad():  # in training mode: w_avg moves here, too, as officially
            fake = G.synthesis(mix(G, z, c, args, run), noise)
        row = {}
        for kind, img, label in (("fake", fake, c), ("real", x, x_c)):
            seen = T(img, run)
            logits = D(seen, label)
            loss = logistic_loss(logits, real=kind == "real")
            row[f"D_{kind}"] = loss.detach()
            row |= {f"D/{kind}": logits.detach(), f"D/sign_{kind}": logits.detach().sign()}
            if args.bcr_weight:
                moved = consistency_loss(D, S, seen, label, logits, run)
                row[f"reg/bcr_{kind}"] = moved.detach()
                loss = loss + args.bcr_weight * moved
            run.backward(loss.mean())
        logits_real.append(row["D/real"])
        rows.append({name: values.mean() for name, values in row.items()})
    stats = {k: torch.stack([row[k] for row in rows]).mean() for k in rows[0]}
    return stats, torch.cat(logits_real)


def r1_phase(D, T, real, real_c, args, run):
    """Gradients of D for R1 on the real images, with respect to what T gets, not what it makes of
    it. Returns the penalty and D's logits (N, 1)."""
    losses, logits_real = [], []
    for x, c in rounds(args.batch_gpu, real, real_c):
        x = x.detach().requires_grad_(True)
        logits = D(T(x, run), c)
        penalty = r1_penalty(logits, x).mean()
        run.backward(penalty * (args.r1_gamma / 2) * args.r1_every)
        losses.append(penalty.detach())
        logits_real.append(logits.detach())
    return torch.stack(losses).mean(), torch.cat(logits_real)


@torch.no_grad()
def adapt(p, r_t, target, images, kimg, cap=None):
    """One step of p (): up if r_t = E[sign D(T(x))] > target, D overfitting, else down (sec. 3).

    images: seen since the last step; kimg: thousands of images in which p may go from 0 to 1; cap:
    None lets p pass 1, as officially, from where it takes as long to come back.
    """
    p.copy_((p + (r_t - target).sign() * (images / (kimg * 1000))).clamp(0, cap))


def train_step(
    G, D, T, S, opts, pl_mean, signs, real, real_c, sample_c, step, args, run, noise="random"
):
    """One iteration: G, every --pl-every steps path length, D, every --r1-every steps R1, each with
    an Adam step of its own (lazy regularization); every --ada-every steps p moves. Returns {name:
    value}, unweighted.

    opts: of G and D; T, S: AugmentPipe, S for --bcr-weight; pl_mean (), signs (2,), the sum and the
    number of signs since the last change of p, and T.p: moved in place; real: (N, C, H, W) in
    [-1, 1]; real_c: (N, c_dim) or None; sample_c(n): labels of n fakes; noise: see SynthesisLayer,
    in training run.randn. `run` gives rand, randn, maximum, mean, backward(loss), which adds
    gradients, and graph(phase, optimizer) -> a function of phase's arguments: the phase, from no
    gradients on, and a step of the optimizer with their means over all processes, 0 where there are
    none; what overflowed in float16 is made finite. A GPU repeats both as one CUDA graph, so that
    all that changes must be tensors.
    """
    n, (opt_G, opt_D) = len(real), opts

    # ---- G; D only passes gradients on --------------------------------------------------------
    D.requires_grad_(False)
    update_G = run.graph(generator_phase, opt_G)  # the phase, then a step of opt_G
    losses = {"G": update_G(G, D, T, n, sample_c, args, run, noise)}
    if args.pl_weight and step % args.pl_every == 0:  # of images as they are: G alone is judged
        regularize_G = run.graph(path_length_phase, opt_G)
        losses["reg/pl"] = regularize_G(G, pl_mean, n, sample_c, args, run, noise)
        losses["reg/pl_mean"] = pl_mean.clone()

    # ---- D, on fakes of the new G -------------------------------------------------------------
    D.requires_grad_(True)
    update_D = run.graph(discriminator_phase, opt_D)
    stats, logits_real = update_D(G, D, T, S, real, real_c, sample_c, args, run, noise)
    losses |= stats
    if args.r1_gamma and step % args.r1_every == 0:
        regularize_D = run.graph(r1_phase, opt_D)
        losses["reg/r1"], more = regularize_D(D, T, real, real_c, args, run)
        logits_real = torch.cat([logits_real, more])

    # ---- p: is D too sure of the training images? ---------------------------------------------
    signs[0] += logits_real.sign().sum()
    signs[1] += logits_real.numel()
    losses["ada/p"] = T.p.clone()
    if (step + 1) % args.ada_every == 0:
        total, count = run.mean(signs)
        losses["ada/r_t"] = r_t = total / count
        signs.zero_()
        if args.aug == "ada":
            images = args.ada_every * args.batch
            adapt(T.p, r_t, args.ada_target, images, args.ada_kimg, args.ada_cap)
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


def freeze(D, n):
    """Freeze-D (sec. 4.2; Mo et al., arXiv:2002.10964): the first n layers of D, counted from the
    image, become buffers, which no optimiser moves. UserError if D's blocks have fewer."""
    names = ("fromrgb", "conv0", "conv1", "skip")
    blocks = [getattr(D, f"b{res}") for res in D.resolutions]
    layers = [getattr(b, name) for b in blocks for name in names if hasattr(b, name)]
    if n > len(layers):
        raise UserError(f"--freezed {n}: D has {len(layers)} layers before its 4x4 end.")
    for layer in layers[:n]:
        for name, p in list(layer.named_parameters()):
            delattr(layer, name)
            layer.register_buffer(name, p.detach())


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


@torch.no_grad()
def overfitting(D, T, sets, size):
    """What Fig. 1 shows: {"D/train", "D/heldout", "D/generated"}, mean logits through T, and r_v,
    Eq. (1), where pictures are held out and D takes training images for more real than fakes.

    sets: {name: uint8 images (N, C, H, W), labels (N, c_dim) or None}, N a multiple of `size`, of
    which D sees so many at once as in training (minibatch std).
    """
    device, row = T.p.device, {}
    for name, (images, labels) in sets.items():
        draws, scores = Draws(device, seed=0), []
        for x, c in rounds(size, images, labels):
            x, c = common.to_float(x, device), None if c is None else c.to(device)
            scores.append(D(T(x, draws), c))
        row[f"D/{name}"] = torch.cat(scores).mean().item()
    if "heldout" in sets and row["D/train"] > row["D/generated"]:
        gap = row["D/train"] - row["D/generated"]
        row["r_v"] = (row["D/train"] - row["D/heldout"]) / gap
    return row


CURVES = {  # the panels of progress.png: names in log.jsonl and metrics.jsonl
    "mean logits of D: real and fake in training": ("D/real", "D/fake"),
    "mean logits of D, the paper's Fig. 1": ("D/train", "D/heldout", "D/generated"),
    "r_t and signs of D": ("ada/r_t", "D/sign_real", "D/sign_fake"),
    "p": ("ada/p",),
    "R1": ("reg/r1",),
    "path length": ("reg/pl_mean", "reg/pl"),
    "losses": ("loss/G", "loss/D_real", "loss/D_fake"),
    "distance to real pictures": ("fd8", "fid"),
}


def train(args):
    first = common.first_weights(args)
    given = load_networks(first)[0] if first else {}
    if args.channels is None:
        args.channels = next((net.config["img_channels"] for net in given.values()), 3)
    toy = common.TOY_CLASSES if args.cond else common.TOY_FACES
    source = common.open_images(args.data, args.size, toy)
    pictures, size = common.square_pictures(args, source, args.channels)
    if not args.resume:  # which keeps what it began with, on any number of processes
        fill_options(args, given, size, common.world_size())
    run = common.Run("stylegan2_ada", args, __file__, own_half=True)
    run.log_every, run.fixed = 1000, ("batch", "checkpoint", "config")
    check_options(args, size, run.world)

    # ---- data: image n is a pure function of (seed, n) ----------------------------------------
    labels = common.one_hot(args, source) if args.cond else None
    chosen, held_out = common.split(len(pictures), args.subset, args.seed)
    N, copies = len(chosen), 2 if args.mirror else 1  # pictures N ... 2 N - 1 are mirrored
    all_labels = None if labels is None else torch.from_numpy(labels[chosen]).to(run.device)

    def image(n):
        epoch, i = divmod(n, copies * N)
        k = common.shuffled(copies * N, args.seed, epoch)[i]
        pixels = pictures[chosen[k % N]]
        if k >= N:
            pixels = pixels[:, ::-1]
        return (pixels,) if labels is None else (pixels, labels[chosen[k % N]])

    def sample_c(n):
        """Labels of n random images, for fakes."""
        return None if labels is None else all_labels[(run.rand(n) * N).long()]

    # ---- networks, their average, augmentation, optimisers ------------------------------------
    nets = new_networks(args, size, 0 if labels is None else labels.shape[1], run.half)
    nets["G_ema"] = copy.deepcopy(nets["G"]).eval().requires_grad_(False)
    if given:
        common.copy_matching(nets, given, run.say)
    freeze(nets["D"], args.freezed)
    G, D, G_ema = (net.to(run.device, memory_format=run.order) for net in nets.values())
    pipe = args.augpipe if args.aug in ("ada", "fixed") else {}
    T = AugmentPipe(pipe, args.ada_p).to(run.device)
    S = AugmentPipe({"xint": 1}, 1, xint_max=BCR_SHIFT).to(run.device)
    opts = {
        "G": lazy_adam(run, G, args.lr, args.pl_every),
        "D": lazy_adam(run, D, args.lr, args.r1_every),
    }
    pl_mean = torch.zeros((), device=run.device)
    signs = torch.zeros(2, dtype=torch.float64, device=run.device)

    fid = inception = None
    if args.fid_samples and run.rank == 0:
        inception = common.load_inception_or_explain(args.inception, run.device)
    examples = common.sample_inputs(nets["G"], labels, args.seed)
    reals = common.stack([pictures[chosen[i % N]] for i in range(len(examples[0]))])
    state = common.Held(pl_mean=pl_mean, signs=signs, p=T.p)
    start = run.restore(nets, opts, {"state": state}, pictures.names)
    if args.aug != "ada":
        T.p.fill_(args.ada_p)  # on --resume that may have changed
    run.say(
        f"{N} images of {size}x{size}, {len(held_out)} held out; G has {common.count(G):,}"
        f" parameters, D {common.count(D):,}; batch {args.batch}, {args.batch_gpu} at a time on"
        f" {run.world} processes, R1 {args.r1_gamma:.3g}, --aug {args.aug}"
    )
    if N < args.batch:
        run.say(f"only {N} images: a batch of {args.batch} holds each more than once")
    if inception:  # statistics of the real pictures are found once
        batches = functools.partial(pictures.batches, args.batch_gpu)
        fid = inception, args.fid_samples, common.real_statistics(batches, inception)

    def snapshot():
        """Samples, scores and curves of this moment."""
        if run.rank > 0:
            return
        n = args.batch_gpu  # what D sees at once
        run.save_picture(common.grid(common.sample(G_ema, *examples, n), 8))
        fakes = common.sample_inputs(G_ema, labels, 20_000, max(500 // n, 1) * n)
        sets = {"generated": (common.sample(G_ema, *fakes, n), fakes[1])}
        for name, some in (("train", chosen[:500]), ("heldout", held_out[:500])):
            if len(some):
                some = np.resize(some, max(len(some) // n, 1) * n)  # few are repeated
                c = None if labels is None else torch.from_numpy(labels[some])
                sets[name] = (common.stack([pictures[i] for i in some]), c)
        row = overfitting(D, T, sets, n)
        common.score_samples(run, G_ema, pictures, labels, n, fid=fid, **row)
        common.save_curves(run.folder, CURVES, args.batch)
        if args.aug == "ada" and T.p > LEAKS:
            run.say(
                f"p is {T.p.item():.2f}: above {LEAKS} augmentations tend to leak into the"
                " samples, colours first. Look at them; --augpipe bg, a lower --ada-target or"
                f" --ada-cap {LEAKS} help."
            )

    if start == 0:
        run.save_picture(common.grid(reals, 8), "reals")
        snapshot()

    for step, (real, *real_c) in run.batches(image, start, -(-args.kimg * 1000 // args.batch)):
        real_c = real_c[0] if real_c else None
        losses = train_step(
            G, D, T, S, opts.values(), pl_mean, signs, real, real_c, sample_c, step, args, run,
            run.randn,
        )  # fmt: skip

        # ---- the average of G, of which samples and scores are made ---------------------------
        half_life = args.ema_kimg * 1000
        if args.ema_rampup:  # an average over less than was seen so far
            half_life = min(half_life, step * args.batch * args.ema_rampup)
        update_ema(G_ema, G, 0.5 ** (args.batch / max(half_life, 1e-8)))

        run.log(losses, kimg=run.steps_done * args.batch / 1000)
        keep = run.due(args.keep_every * 1000) or run.steps_done == run.total
        if keep or run.due(args.every * 1000):
            snapshot()
            for own in (G.mapping.w_avg, G_ema.mapping.w_avg, signs):  # of each rank's samples
                own.copy_(run.mean(own))
            run.save(keep=keep)
    run.say(f"samples, progress.png and checkpoint are in {run.folder}")


def fill_options(args, nets, size, gpus):
    """Options that were left out: those of the networks to start from, else of --config."""
    options = dict(channel_max=512, z_dim=512, w_dim=512, G="skip", D="resnet", D_map_layers=8)
    options |= dict(noise_inputs=True)
    options |= dict(kimg=25000, pl_weight=PL_WEIGHT, mixing=MIXING, ema_rampup=None)
    auto = args.config == "auto"
    options |= auto_config(size, gpus, args.batch) if auto else CONFIGS[args.config]
    options["ada_kimg"] = ADA_KIMG
    options["bcr_weight"] = BCR_WEIGHT if args.aug == "bcr" else 0.0
    if args.batch is None:  # fewer GPUs than there were take their share in rounds
        options["batch_gpu"] = options["batch"] // options["gpus"]
    if nets:  # transfer learning, as officially
        options |= dict(ada_kimg=ADA_KIMG_TRANSFER, ema_rampup=None)
    del options["gpus"]
    common.set_missing(args, options | common.stylegan2_options(nets))


def check_options(args, size, world):
    share = args.batch // world
    n = args.batch_gpu = min(args.batch_gpu or share, share)
    if share % n:
        raise UserError(f"--batch-gpu {n} does not divide the {share} of a process.")
    if n % min(args.mbstd_group, n):
        raise UserError(
            f"--mbstd-group {args.mbstd_group} does not divide the {n} images that D sees at once."
        )
    if args.pl_weight and n < PL_SHRINK:
        raise UserError(f"path length needs {PL_SHRINK} images at once: or pass --pl-weight 0.")
    if args.aug == "fixed" and not args.ada_p:
        raise UserError("--aug fixed needs --ada-p, above 0 and at most 1.")
    if args.ada_cap is not None and args.ada_p > args.ada_cap:
        raise UserError(f"--ada-p {args.ada_p} is above --ada-cap {args.ada_cap}.")
    if args.freezed and not args.checkpoint:
        raise UserError(f"--freezed {args.freezed} without --checkpoint: they would stay random.")
    if args.aug in ("noaug", "bcr") and args.ada_p:
        raise UserError(f"--ada-p {args.ada_p} has no use with --aug {args.aug}.")
    if "imgfilter" in PIPES[args.augpipe] and size < 32:
        raise UserError(
            f"--augpipe {args.augpipe} filters images of 32 pixels or more, not {size}."
        )


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
# generate, timelapse, evaluate
# =============================================================================


def load_networks(path):
    """({"G", "D", "G_ema": network}, options of its training) of a checkpoint, a run, or an
    official file."""
    return common.load_gan(path, ("stylegan2", "stylegan2_ada"), build, from_official)


def generate(args):
    """Pictures of seeds, the style-mixing table of StyleGAN's Fig. 3, or an interpolation film."""
    common.generate(args, *common.load_generator(args, load_networks)[:2])


def evaluate(args):
    """fd8, FID and KID, precision and recall, and path length of untruncated samples; all pictures,
    not mirrored: the official fid50k_full."""
    common.evaluate_generator(args, load_networks, build, full=True)


def main(argv=None):
    sizes = ("channel_base", "channel_max", "z_dim", "w_dim", "map_layers", "noise_inputs")
    cli = common.CommandLine("stylegan2_ada.py", __doc__, {"toy": TOY}, sizes)
    number, above_0, from_0 = common.positive_int, common.positive, common.not_negative

    p = cli.command("train", train, "train on one set of pictures (default command)")
    common.add_train_options(
        p, batch=None, every="kimg", default_every=200,
        gpu_precision="fp16+tf32", half=common.OWN_HALF,
    )  # fmt: skip
    common.add_stylegan_train_options(p)
    configs = ("auto", *CONFIGS)
    p.add("--config", "--cfg", choices=configs, default="auto", help="auto: by size and GPUs")
    augs = ("ada", "noaug", "fixed", "bcr")
    p.add("--aug", choices=augs, default="ada", help="bcr: consistency regularization instead")
    p.add("--augpipe", choices=list(PIPES), default="bgc", help="transformations of D's images")
    p.add("--ada-p", "--p", type=common.probability, default=0.0, help="first p; --aug fixed: p")
    p.add("--ada-target", "--target", type=common.finite, default=ADA_TARGET, help="of r_t")
    p.add("--ada-kimg", type=above_0, help="kimg for p to go from 0 to 1: 500; transfer 100")
    p.add("--ada-every", type=number, default=ADA_EVERY, help="steps between changes of p")
    p.add("--ada-cap", type=from_0, help="the highest p: no limit, as officially")
    p.add("--bcr-weight", type=from_0, help="of consistency: 0; --aug bcr: 10")
    p.add("--mirror", action="store_true", help="add the mirror image of every picture")
    p.add("--subset", type=number, help="train on so many pictures, hold out the others: all")
    p.add("--channels", type=int, choices=(1, 3), help="3, or 1: greyscale")
    p.add("--kimg", type=number, help="length, in thousands of images: 25000; cifar 100000")
    p.add("--freezed", type=common.not_negative_int, default=0, help="layers of D to freeze")
    p.add("--G", choices=("skip", "resnet", "orig"), help="architecture: skip")
    p.add("--D", choices=("resnet", "skip", "orig"), help="likewise: resnet; cifar orig")
    p.add("--lr", type=above_0, help="that of --config, 0.0025 or 0.002")
    p.add("--r1-gamma", "--gamma", type=from_0, help="weight of R1: that of --config")
    p.add("--r1-every", type=number, default=R1_EVERY, help="steps between R1")
    p.add("--pl-weight", type=from_0, help="of path length, 0: off; default 2, cifar 0")
    p.add("--pl-every", type=number, default=PL_EVERY, help="steps between path lengths")
    p.add("--mixing", type=common.probability, help="chance of style mixing: 0.9; cifar 0")
    p.add("--ema-kimg", type=above_0, help="half-life of G's average: that of --config")
    p.add("--ema-rampup", type=from_0, help="limit of it, as a share of the images seen")
    p.add("--mbstd-group", type=number, help="of minibatch std: that of --config")
    p.add("--channel-base", type=number, help="channels times side: 32768 or 16384")
    p.add("--map-layers", type=number, help="depth of the mapping network: 2 or 8")
    p.add("--D-map-layers", type=common.not_negative_int, help="likewise for D's labels: 8")
    noisy = dict(action=argparse.BooleanOptionalAction)
    p.add("--noise-inputs", **noisy, help="StyleGAN's noise in every layer of G: yes")
    p.add("--fid-samples", type=number, help="FID of so many samples at every snapshot: no FID")
    p.add("--inception", help="weights of FID's network, where they cannot be fetched")

    p = cli.command("generate", generate, "pictures of seeds, a style-mixing table, or a film")
    common.add_generate_options(p)

    p = cli.command("timelapse", common.timelapse, "a film of the sample grid over training")
    p.add("--checkpoint", metavar="RUN", required=True, help="a run folder")
    p.add("--out", default="timelapse.webp", help=".webp, .gif or .png file to write")
    p.add("--fps", type=above_0, default=10.0, help="snapshots a second")
    p.add("--width", type=number, default=1024, help="pixels at most")

    p = cli.command("evaluate", evaluate, "fd8, FID, KID, precision, recall and path length")
    common.add_evaluate_options(p)
    common.add_sample_scores_options(p, reals="all")

    args = cli.parse(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))
