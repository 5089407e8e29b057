"""SemanticStyleGAN, "SemanticStyleGAN: Learning Compositional Generative Priors for Controllable
Image Synthesis and Editing" (Shi, Yang, Wan, Shen 2021, arXiv:2112.02236).

In this file, in the order of the signal              paper
    MappingNetwork                                    sec. 3.1: z to a code for each region
    LocalGenerators                                   sec. 3.1, Fig. 3: one small MLP per region
    fusion_weights                                    sec. 3.2: a softmax of pseudo-depths
    RenderNet                                         sec. 3.3: image and segmentation of features
    Discriminator                                     sec. 3.4: two branches, image and segmentation
    logistic_loss, r1_penalties, path_lengths         sec. 3.4, StyleGAN2's
    mask_loss                                         sec. 3.3: segmentation stays near the masks
    mixed_ws, train                                   sec. 3.4, 4; adaptation: sec. 4.4
    compose, edit, invert, evaluate                   sec. 4.2, 4.3: what the regions are good for

    python semantic_stylegan.py                       # toy faces and their regions, 2 CPU cores
    python semantic_stylegan.py --data FOLDER --size 256       # with images/ and labels/
    python semantic_stylegan.py prepare --input CelebAMask-HQ  # the paper's data, then:
    python semantic_stylegan.py --data celebamask_hq           # 512 pixels
    python semantic_stylegan.py compose --checkpoint RUN --seeds 0-3
    python semantic_stylegan.py edit --checkpoint RUN --region hair --seeds 0-7
    python semantic_stylegan.py invert --checkpoint RUN --input FACE.png
    python semantic_stylegan.py evaluate --checkpoint RUN

Names. K regions ("classes"), region 0 is the background. z -> w; ws (N, num_ws, w_dim) are two base
codes, which all regions but the background share, then structure and texture of each region; codes
(N, K * layers, w_dim) have a row for every layer of every local generator.

Results: README. Differs from the paper, with the official code (seasonSH/SemanticStyleGAN): the
background has no depth and no base code; see-through regions are added on top of the others; the
renderer has neither styles nor a loss on its own residual: masks are held near the average of the
segmentation. Differs from both: D takes batches of any size (groups of the minibatch standard
deviation are as large as divides them); adaptation can really --freeze the local generators, which
the official --freeze-local does for the average alone.
"""

import argparse
import copy
import functools
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import ops_cuda as ops
from common import UserError

# =============================================================================
# The paper's numbers
# =============================================================================

LR, BETAS = 0.002, (0.0, 0.99)  # Adam, before the correction for lazy regularization
R1_EVERY, PL_EVERY = 16, 4  # lazy regularization, StyleGAN2 sec. 3.1; official code
R1_IMG, R1_SEG = 10.0, 1000.0  # D reacts to masks far more strongly than to images, sec. 3.4
PL_WEIGHT, PL_DECAY, PL_SHRINK = 0.5, 0.01, 2  # official code; path lengths of half a batch
LAMBDA_MASK = 100.0  # of mask_loss
MIXING = 0.3  # of a batch: codes of two latents in one face
EMA_BETA = 0.5 ** (32 / 10_000)  # half-life of 312 steps, whatever the batch
ITERS, BATCH = 200_000, 16
ADAPT_ITERS = 2000  # adaptation to other pictures stops early, by eye
SCORED = 500  # pictures that a snapshot is scored against

FACES = (  # CelebAMask-HQ's 19 classes in 13 groups, official order
    "background", "face", "eye", "eyebrow", "mouth", "nose", "ear", "hair", "neck", "cloth",
    "glasses", "hat", "earring",
)  # fmt: skip
SEE_THROUGH = ("glasses", "earring")  # what lies behind them is drawn, too

# What a plain `python semantic_stylegan.py` trains: small enough for two CPU cores and minutes.
TOY = dict(size=32, coarse_size=16, min_size=8, layers=6, base_layers=1, depth_layers=4)
TOY |= dict(local_channels=16, coarse_channels=64, channel_base=1024, channel_max=64, w_dim=64)
TOY |= dict(map_layers=2, noise_inputs=False)  # cartoons have no stochastic detail
TOY |= dict(batch=8, r1_img=0.5, r1_seg=20.0)
TOY_ITERS, TOY_EVERY = 7500, 1500

# =============================================================================
# Networks
# =============================================================================
# Weights are N(0, 1) and scaled where they are used (equalized learning rate, Karras et al. 2017,
# sec. 4.1).

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
    """Z -> W, an MLP (StyleGAN, Fig. 1b), one w for all codes.

    forward(z, psi=1) -> ws (N, num_ws, w_dim); z: (N, w_dim), any scale, normalised inside;
    psi: 1 = no truncation, 0 = the mean face, towards w_avg, the mean of w, which is not saved:
    update_w_avg sets it.
    """

    def __init__(self, w_dim, num_ws, num_layers=8, lr_mul=0.01):
        super().__init__()
        self.num_ws, self.num_layers = num_ws, num_layers
        for i in range(num_layers):
            self.add_module(f"fc{i}", Linear(w_dim, w_dim, "lrelu", lr_mul))
        self.register_buffer("w_avg", torch.zeros(w_dim), persistent=False)

    def forward(self, z, psi=1.0):
        w = normalize(z)
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        if psi != 1:
            w = self.w_avg.lerp(w, psi)
        return w[:, None].repeat(1, self.num_ws, 1)


class FourierFeatures(nn.Module):
    """Where a pixel is: x, y in [-1, 1], and sines and cosines of 1, 2, 4, ... times them, mapped
    to C channels. forward() -> (C, side * side); frequencies: how many."""

    def __init__(self, C, side, frequencies):
        super().__init__()
        places = torch.linspace(-1, 1, side)
        y, x = torch.meshgrid(places, places, indexing="ij")
        xy = torch.stack([x, y]).flatten(1)  # (2, side^2)
        waves = [f(2**k * xy) for k in range(frequencies) for f in (torch.sin, torch.cos)]
        self.register_buffer("features", torch.cat([xy, *waves]), persistent=False)
        self.weight = nn.Parameter(torch.randn(C, len(self.features)))

    def forward(self):
        return self.weight / math.sqrt(len(self.features)) @ self.features


class LocalLayer(nn.Module):
    """A layer of K local generators at once: a modulated 1x1 convolution, bias, leaky ReLU.

    forward(x, w) -> (N, K, O, P); x: (N, K, I, P), or (I, P) for all; w: (N, K, w_dim)
    P: pixels. Demodulation as in StyleGAN2 sec. 2.2; noise would make regions flicker, so none.
    """

    def __init__(self, K, I, O, w_dim):
        super().__init__()
        self.affine_weight = nn.Parameter(torch.randn(K, I, w_dim))
        self.affine_bias = nn.Parameter(torch.ones(K, I))
        self.weight = nn.Parameter(torch.randn(K, O, I))
        self.bias = nn.Parameter(torch.zeros(K, O))

    def forward(self, x, w):
        N, (K, O, I) = len(w), self.weight.shape
        # The style A w / sqrt(w_dim) + b of all regions in one product, over sqrt(I), which is the
        # equalized scale of `weight`.
        style = torch.baddbmm(
            self.affine_bias[:, None], w.transpose(0, 1), self.affine_weight.mT,
            beta=1 / math.sqrt(I), alpha=1 / math.sqrt(I * w.shape[2]),
        ).transpose(0, 1)  # (N, K, I)  # fmt: skip
        weight = self.weight * style.contiguous()[:, :, None]  # (N, K, O, I)
        weight = weight * (weight.square().sum(3, keepdim=True) + 1e-8).rsqrt()  # demodulated
        weight = weight.flatten(0, 1)  # (N * K, O, I)
        if x.ndim == 2:
            x = (weight.flatten(0, 1) @ x).view(N, K * O, -1, 1)
        else:
            x = torch.bmm(weight, x.flatten(0, 1)).view(N, K * O, -1, 1)
        return ops.bias_act(x, self.bias.flatten(), act="lrelu").view(N, K, O, -1)


class Head(nn.Module):
    """A linear read-out of each of K generators' features, with a learned scale per input channel:
    what is left of StyleGAN2's ToRGB without styles. `weights()` -> (K, O, I) with that scale."""

    def __init__(self, K, I, O):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, O, I))
        self.modulation = nn.Parameter(torch.ones(K, I))
        self.bias = nn.Parameter(torch.zeros(K, O))

    def weights(self):
        return self.weight * (self.modulation / math.sqrt(self.weight.shape[2]))[:, None]


class LocalGenerators(nn.Module):
    """g_1 ... g_K (sec. 3.1, Fig. 3b): what each region looks like everywhere, and how near it is.

    forward(x, codes) -> h (N, K, C, P), the last hidden features, depth (N, K, P), 0 for region 0
        x: (I, P) or (N, K, I, P), see FourierFeatures; codes: (N, K, layers, w_dim)
    features(h, a) -> sum over k of a_k f_k (N, O, P), with f_k = to_feature_k(h_k); a: (N, K, P)
    P: pixels; layers after the first depth_layers make the texture alone, and with detach_texture
    send no gradients back to those.
    """

    def __init__(self, K, I, C, O, w_dim, layers=10, depth_layers=6, detach_texture=False):
        super().__init__()
        widths = [I] + [C] * layers
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.ModuleList([LocalLayer(K, i, o, w_dim) for i, o in pairs])
        self.to_feature, self.to_depth = Head(K, C, O), Head(K - 1, C, 1)
        self.depth_layers, self.detach_texture = depth_layers, detach_texture

    def forward(self, x, codes):
        for i, (layer, w) in enumerate(zip(self.layers, codes.unbind(2), strict=True), 1):
            x = layer(x, w)
            if i == self.depth_layers:
                weight = F.pad(self.to_depth.weights(), (0, 0, 0, 0, 1, 0))  # (K, 1, C)
                bias = F.pad(self.to_depth.bias, (0, 0, 1, 0))  # of the background: 0 everywhere
                depth = (weight @ x)[:, :, 0] + bias
                x = x.detach() if self.detach_texture else x
        return x, depth

    def features(self, h, a):
        # Linear in h, so that the sum is one product, and K maps of O channels never exist.
        weight = self.to_feature.weights().transpose(0, 1).flatten(1)  # (O, K * C)
        h = (h * a[:, :, None]).flatten(1, 2)  # (N, K * C, P)
        bias = (a.mT @ self.to_feature.bias).mT  # (N, O, P); in memory, as the sum, channels last
        return bias + torch.bmm(weight.expand(len(h), -1, -1), h)


def fusion_weights(depth, shown=None, see_through=()):
    """m (N, K, ...), each region's mask, and a, its weight among the features (sec. 3.2).

    depth: (N, K, ...), larger is nearer; shown: (N, K), or (K,) for all samples, of 0 and 1:
    regions to draw; None: all of them
    see_through: numbers of regions that do not hide what is behind them: their weights come on top
    of those of the others, which add up to 1 by themselves, as the masks do in any case (but for
    1e-8 where all that is shown is far behind).
    """
    m = depth.softmax(1)
    if shown is not None:
        m = m * shown.reshape(*shown.shape, *[1] * (m.ndim - 2))
        m = m / (m.sum(1, keepdim=True) + 1e-8)
    if not see_through:
        return m, m
    places = torch.arange(m.shape[1], device=m.device).view(-1, *[1] * (m.ndim - 2))
    clear = sum(places == k for k in see_through) > 0
    solid = torch.where(clear, 0, m)
    return m, torch.where(clear, m, solid / (solid.sum(1, keepdim=True) + 1e-8))


class RenderLayer(nn.Module):
    """A 3x3 convolution, demodulated as StyleGAN2's but without a style; noise, bias, leaky ReLU.

    forward(x, noise): (N, I, H, W) -> (N, O, H * up, ...)
    noise: "random", "const" (the stored map), or a function of a shape that draws it
    """

    def __init__(self, I, O, res, up=1, use_noise=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I, 3, 3))
        self.modulation = nn.Parameter(torch.ones(I))
        self.bias = nn.Parameter(torch.zeros(O))
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise_const", torch.randn(res, res))
        self.register_buffer("fir", fir_filter(), persistent=False)
        self.up, self.use_noise = up, use_noise

    def forward(self, x, noise="random"):
        w = self.weight * (self.modulation / math.sqrt(self.weight[0].numel()))[:, None, None]
        w = w * (w.square().sum([1, 2, 3], keepdim=True) + 1e-8).rsqrt()
        x = ops.conv2d_resample(x, w, self.fir, self.up, 1, 1, flip_weight=self.up == 1)
        image, strength = None, None
        if self.use_noise:
            image, strength = self.noise_const, self.noise_strength
            if noise != "const":
                shape = (len(x), 1, *x.shape[2:])
                image = torch.randn(shape, device=x.device) if noise == "random" else noise(*shape)
        # sqrt(2) * lrelu(x + image * strength + bias)
        return ops.fused_act(x, None, image, strength, self.bias, "lrelu")


class RenderNet(nn.Module):
    """R (sec. 3.3, Fig. 3c): features of the fused regions to an image and its segmentation.

    forward(f, coarse, noise) -> img (N, 3, size, size), seg (N, K, size, size), neither limited to
        [-1, 1]; f: (N, I, h, h), h = coarse_size; coarse: (N, K, h, h), the masks, in [-1, 1];
        noise: see RenderLayer. channels: {side: channels}
    f is averaged to min_size and comes in once more where the side is its own. With
    `residual_refine` what the renderer says of the regions is added to the masks.
    """

    def __init__(
        self, K, I, size, coarse_size, min_size, channels, residual_refine, use_noise=True
    ):
        super().__init__()
        self.coarse_size, self.min_size = coarse_size, min_size
        self.residual_refine = residual_refine
        self.layers, self.to_rgb, self.to_seg = (nn.ModuleList() for _ in range(3))
        C, res = I, min_size
        while res < size:
            C, res, O = C + I * (res == coarse_size), res * 2, channels[res * 2]
            self.layers.append(RenderLayer(C, O, res, 2, use_noise))
            self.layers.append(RenderLayer(O, O, res, 1, use_noise))
            self.to_rgb.append(Head(1, O, 3))
            self.to_seg.append(Head(1, O, K))
            C = O
        self.register_buffer("fir", fir_filter(), persistent=False)

    def forward(self, f, coarse, noise="random"):
        # Convolutions are slow where their weights have another memory order.
        f = f.contiguous(memory_format=ops.memory_order(self.layers[0].weight))
        x, out = F.avg_pool2d(f, self.coarse_size // self.min_size), None
        for k, heads in enumerate(zip(self.to_rgb, self.to_seg, strict=True)):
            if x.shape[2] == self.coarse_size:
                x = torch.cat([x, f], 1)
            x = self.layers[2 * k + 1](self.layers[2 * k](x, noise), noise)
            # image and segmentation in one convolution
            weight = torch.cat([head.weights()[0] for head in heads])  # (3 + K, C)
            y = ops.conv2d(x, weight[:, :, None, None])
            y = ops.bias_act(y, torch.cat([head.bias[0] for head in heads]))
            out = y if out is None else y + ops.upsample2d(out, self.fir)
            if self.residual_refine and x.shape[2] == self.coarse_size:
                out = out + F.pad(coarse, (0, 0, 0, 0, 3, 0))
        return out.split([3, out.shape[1] - 3], 1)


def channel_table(base=32768, most=512, size=1024):
    """{side: channels} of renderer and discriminator: 512 up to 64 pixels, then halved with each
    doubling; a larger table than needed does no harm."""
    return {2**i: min(base // 2**i, most) for i in range(2, int(math.log2(size)) + 1)}


Picture = namedtuple("Picture", "img seg coarse depth")


class Generator(nn.Module):
    """mapping, local generators, fusion and renderer (Fig. 3).

    mapping(z, psi=1) -> ws (N, num_ws, w_dim); see MappingNetwork, expand and synthesis
    synthesis(ws, noise="random", shown=None) -> Picture
        ws: (N, num_ws, w_dim), or (N, K * layers, w_dim), the codes of `expand`
        noise: see RenderLayer; shown: see fusion_weights
    Picture: img (N, 3, size, size), about [-1, 1], seg (N, K, size, size), whose largest number is
        the region, coarse (N, K, coarse_size, coarse_size), the masks in [-1, 1], and depth, of
        the same shape, larger is nearer, 0 for the background

    Defaults are the published model's, but for 256 pixels instead of 512. regions: their names;
    channels: {side: channels} of the renderer, None for channel_table(); layers of each local
    generator, local_channels wide, make coarse_channels features of coarse_size^2 pixels;
    depth_layers: those that decide the shape, the first base_layers of them with the codes that
    regions share; see_through: as in fusion_weights. Raises ValueError for what does not fit.
    """

    def __init__(
        self, size=256, regions=FACES, w_dim=512, map_layers=8, channels=None, coarse_size=64,
        min_size=16, layers=10, base_layers=2, depth_layers=6, local_channels=64,
        coarse_channels=512, residual_refine=True, detach_texture=False, see_through=(10, 12),
        use_noise=True,
    ):  # fmt: skip
        K, channels = len(regions), channels or channel_table()
        if not base_layers <= depth_layers <= layers:
            raise ValueError(f"{base_layers} base and {depth_layers} depth layers of {layers}")
        if not min_size < coarse_size < size or any(
            side % min_size or (side // min_size).bit_count() > 1 for side in (coarse_size, size)
        ):
            sides = f"min_size {min_size}, coarse_size {coarse_size}, size {size}"
            raise ValueError(f"sides must grow by doubling: {sides}")
        if base_layers + 2 * K == K * layers:
            raise ValueError(f"{K} regions of {layers} layers: ws and codes would be of one width")
        if not all(0 < k < K for k in see_through):
            raise ValueError(f"see-through regions {see_through}: they go from 1 to {K - 1}")
        super().__init__()
        self.config = dict(
            kind="G", size=size, regions=list(regions), w_dim=w_dim, map_layers=map_layers,
            channels=channels, coarse_size=coarse_size, min_size=min_size, layers=layers,
            base_layers=base_layers, depth_layers=depth_layers, local_channels=local_channels,
            coarse_channels=coarse_channels, residual_refine=residual_refine,
            detach_texture=detach_texture, see_through=list(see_through), use_noise=use_noise,
        )  # fmt: skip
        self.num_ws = base_layers + 2 * K
        self.mapping = MappingNetwork(w_dim, self.num_ws, map_layers)
        self.position = FourierFeatures(local_channels, coarse_size, int(math.log2(size)))
        self.local = LocalGenerators(
            K, local_channels, local_channels, coarse_channels, w_dim, layers, depth_layers,
            detach_texture,
        )  # fmt: skip
        self.render = RenderNet(
            K, coarse_channels, size, coarse_size, min_size, channels, residual_refine, use_noise
        )

    def expand(self, ws):
        """(N, num_ws, w_dim) -> codes (N, K * layers, w_dim), a row for each layer."""
        base_layers, depth_layers, layers = (
            self.config[name] for name in ("base_layers", "depth_layers", "layers")
        )
        base, regions = ws[:, None, :base_layers], ws[:, base_layers:, None].unflatten(1, (-1, 2))
        structure, texture = regions.unbind(2)  # (N, K, 1, w_dim)
        own = structure[:, :1].expand(-1, -1, base_layers, -1)  # the background has no base
        first = torch.cat([own, base.expand(-1, structure.shape[1] - 1, -1, -1)], 1)
        structure = structure.expand(-1, -1, depth_layers - base_layers, -1)
        texture = texture.expand(-1, -1, layers - depth_layers, -1)
        return torch.cat([first, structure, texture], 2).flatten(1, 2)

    def synthesis(self, ws, noise="random", shown=None):
        config = self.config
        codes = self.expand(ws) if ws.shape[1] == self.num_ws else ws
        codes = codes.unflatten(1, (len(config["regions"]), config["layers"]))
        h, depth = self.local(self.position(), codes)
        m, a = fusion_weights(depth, shown, config["see_through"])
        side = (config["coarse_size"],) * 2
        coarse = (2 * m - 1).unflatten(2, side)
        img, seg = self.render(self.local.features(h, a).unflatten(2, side), coarse, noise)
        return Picture(img, seg, coarse, depth.unflatten(2, side))

    def forward(self, z, psi=1.0, noise="random", shown=None):
        return self.synthesis(self.mapping(z, psi), noise, shown)


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


def largest_divisor(n, most):
    """The largest divisor of n that is at most `most`."""
    return next(k for k in range(min(n, most), 0, -1) if n % k == 0)


class DiscriminatorBlock(nn.Module):
    """A residual block of D, to half the side. forward(x): (N, I, H, W) -> (N, O, H / 2, W / 2)"""

    def __init__(self, I, O):
        super().__init__()
        self.conv0 = Conv2d(I, I, 3, "lrelu")
        self.conv1 = Conv2d(I, O, 3, "lrelu", down=2)
        self.skip = Conv2d(I, O, 1, down=2, bias=False)

    def forward(self, x):
        y = self.skip(x, gain=math.sqrt(0.5))  # both branches times sqrt(1/2): variance stays 1
        return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


class Discriminator(nn.Module):
    """D (sec. 3.4): a branch for the image and one for its segmentation, which meet at 4x4 pixels.

    forward(img, seg=None) -> logits (N, 1); img: (N, 3, size, size), seg: (N, K, size, size), None:
    the image alone, for pictures without labels.
    """

    def __init__(self, size=256, classes=13, channels=None, mbstd_group=4):
        super().__init__()
        channels = channels or channel_table()
        self.config = dict(kind="D", size=size, classes=classes, channels=channels)
        self.config |= dict(mbstd_group=mbstd_group)
        sides = [2**i for i in range(int(math.log2(size)), 1, -1)]  # size, ..., 4
        pairs = [(channels[res], channels[res // 2]) for res in sides[:-1]]

        def branch(I):
            blocks = [DiscriminatorBlock(*pair) for pair in pairs]
            return nn.Sequential(Conv2d(I, channels[size], 1, "lrelu"), *blocks)

        self.of_img, self.of_seg = branch(3), branch(classes)
        self.conv = Conv2d(channels[4] + 1, channels[4], 3, "lrelu")
        self.fc = Linear(channels[4] * 16, channels[4], "lrelu")
        self.out = Linear(channels[4], 1)

    def forward(self, img, seg=None):
        x = self.of_img(img)
        if seg is not None:
            x = x + self.of_seg(seg)
        x = minibatch_std(x, largest_divisor(len(x), self.config["mbstd_group"]))
        return self.out(self.fc(self.conv(x).flatten(1)))


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


def r1_penalties(logits, *reals):
    """|grad D|^2 of each real image, and of each segmentation (N,), if both are given (Mescheder et
    al. 2018). Weigh them by R1_IMG / 2 and R1_SEG / 2.

    logits: D(*reals), of tensors that require a gradient.
    """
    with ops.no_weight_gradients():  # they come with the penalty's backward pass
        grads = torch.autograd.grad(logits.sum(), reals, create_graph=True)
    return [g.square().sum([1, 2, 3]) for g in grads]


def mask_loss(seg, coarse):
    """How far the segmentation, averaged to the masks' side, is from the masks: mean square. The
    paper's |delta m|^2 of the renderer's residual, to first order (sec. 3.3). A scalar; seg: (N, K,
    size, size), coarse: (N, K, h, h), both around [-1, 1]."""
    return (coarse - F.avg_pool2d(seg, seg.shape[2] // coarse.shape[2])).square().mean()


def path_lengths(img, codes, y):
    """|J_w^T y| of each sample (N,), StyleGAN2 Eq. (4), of img (N, 3, H, W) alone. y: ~ N(0, 1), of
    its shape; codes: (N, K * layers, w_dim), what img was made of; all rows count alike.

    y is divided by the image side and squares are averaged over rows, as in the official code.
    """
    y = y / math.sqrt(img.shape[2] * img.shape[3])
    with ops.no_weight_gradients():  # they come with the penalty's backward pass
        (J,) = torch.autograd.grad((img * y).sum(), codes, create_graph=True)
    return J.square().sum(2).mean(1).sqrt()


# =============================================================================
# Training
# =============================================================================
# All random choices are tensors, drawn in every step: so phases can be CUDA graphs, and choices
# equal for any number of processes.


def mixed_ws(ws, ws2, r):
    """Style mixing of a model of regions: ws (N, num_ws, w_dim) with codes of ws2 where r says so.

    r: (N, K) of 0: both codes of the region stay, 1: its texture is ws2's, 2: structure and
    texture are. Base codes stay, and a region never has another's structure with its own texture.
    """
    K = r.shape[1]
    base, regions = ws.split([ws.shape[1] - 2 * K, 2 * K], 1)
    other = ws2[:, -2 * K :].unflatten(1, (K, 2))
    takes = torch.stack([r == 2, r >= 1], 2)[..., None]  # (N, K, 2, 1): structure, texture
    regions = torch.where(takes, other, regions.unflatten(1, (K, 2)))
    return torch.cat([base, regions.flatten(1, 2)], 1)


def mix(G, n, args, run):
    """codes (n, K * layers, w_dim) of n latents; with probability --mixing, drawn once for the
    batch, each mixes two."""
    z, z2 = (run.randn(n, G.config["w_dim"]) for _ in range(2))
    mixes = run.rand(1, shared=True) < args.mixing
    r = (3 * run.rand(n, len(G.config["regions"]))).floor()
    ws, ws2 = G.mapping(torch.cat([z, z2])).chunk(2)
    return G.expand(mixed_ws(ws, ws2, torch.where(mixes, r, 0)))


def discriminator_phase(G, D, real, seg, args, run, noise):
    """Gradients of D: -log D(x) - log(1 - D(G(z))). Returns both losses and mean logits (4,)."""
    with torch.no_grad():
        fake = G.synthesis(mix(G, len(real), args, run), noise)
    logits_real = D(real, seg)
    loss_real = logistic_loss(logits_real, real=True).mean()
    run.backward(loss_real)
    logits_fake = D(fake.img, None if seg is None else fake.seg)
    loss_fake = logistic_loss(logits_fake, real=False).mean()
    run.backward(loss_fake)
    return torch.stack([loss_real, loss_fake, logits_real.mean(), logits_fake.mean()]).detach()


def r1_phase(D, real, seg, args, run):
    """Gradients of D for R1 on the real images. Returns R1 of images and of segmentations."""
    reals = [x.detach().requires_grad_(True) for x in (real, seg) if x is not None]
    found = [penalty.mean() for penalty in r1_penalties(D(*reals), *reals)]
    weights = (args.r1_img, args.r1_seg)
    r1 = sum(weight / 2 * x for weight, x in zip(weights, found, strict=False))
    run.backward(r1 * args.r1_every)
    return torch.stack(found).detach()


def generator_phase(G, D, n, labelled, args, run, noise):
    """Gradients of G for n fakes: -log D(G(z)), and the mask loss. Returns both."""
    fake = G.synthesis(mix(G, n, args, run), noise)
    loss = logistic_loss(D(fake.img, fake.seg if labelled else None), real=True).mean()
    mask = mask_loss(fake.seg, fake.coarse)
    run.backward(loss + args.lambda_mask * mask)
    return torch.stack([loss, mask]).detach()


def path_length_phase(G, pl_mean, n, args, run, noise):
    """Gradients of G, but for its mapping network, for the path lengths of n fakes. Returns the
    penalty and the mean length."""
    with torch.no_grad():
        codes = mix(G, n, args, run)
    img = G.synthesis(codes.requires_grad_(True), noise).img
    lengths = path_lengths(img, codes, run.randn(*img.shape))
    # The running mean includes these lengths and passes their gradients on, as officially.
    mean = pl_mean.lerp(run.mean(lengths.mean()), PL_DECAY)
    penalty = (lengths - mean).square().mean()
    run.backward(penalty * args.pl_weight * args.pl_every)
    pl_mean.copy_(mean.detach())
    return torch.stack([penalty, lengths.mean()]).detach()


def train_step(G, D, opts, pl_mean, real, seg, step, args, run, noise="random"):
    """One iteration: D, every --r1-every steps R1, G, every --pl-every steps path length, each with
    an Adam step of its own (lazy regularization). Returns {name: loss}, unweighted.

    opts: of G's mapping network, of the rest of G, and of D; pl_mean: (), moved in place; real:
    (N, 3, size, size) in [-1, 1]; seg: (N, K, size, size), 1 where the region is, else -1, or None:
    D sees images alone (adaptation, sec. 4.4); noise: see RenderLayer, in training run.randn. `run`
    gives rand, randn, mean, backward(loss), which adds gradients, and graph(phase, *optimizers) ->
    a function of phase's arguments: the phase, from no gradients on, and a step of the optimizers
    with their means over all processes, 0 where there are none. A GPU repeats both as one CUDA
    graph, so that all that changes must be tensors.
    """
    losses, n, (opt_mapping, opt_G, opt_D) = {}, len(real), opts

    # ---- D: images with their segmentations ----------------------------------------------------
    D.requires_grad_(True)
    update_D = run.graph(discriminator_phase, opt_D)  # the phase, then a step of opt_D
    found = update_D(G, D, real, seg, args, run, noise)
    losses["D_real"], losses["D_fake"], losses["D/real"], losses["D/fake"] = found
    if step % args.r1_every == 0 and (args.r1_img or args.r1_seg):
        regularize_D = run.graph(r1_phase, opt_D)
        found = regularize_D(D, real, seg, args, run)
        losses |= zip(("reg/r1_img", "reg/r1_seg"), found, strict=False)

    # ---- G; D only passes gradients on --------------------------------------------------------
    D.requires_grad_(False)
    update_G = run.graph(generator_phase, opt_mapping, opt_G)
    losses["G"], losses["mask"] = update_G(G, D, n, seg is not None, args, run, noise)
    if step % args.pl_every == 0 and args.pl_weight:
        # The codes are given: the mapping network has no part in this.
        regularize_G = run.graph(path_length_phase, opt_G)
        found = regularize_G(G, pl_mean, max(1, n // PL_SHRINK), args, run, noise)
        losses["reg/pl"], losses["reg/pl_length"] = found
        losses["reg/pl_mean"] = pl_mean.clone()
    return losses


@torch.no_grad()
def update_ema(G_ema, G, beta):
    """G_ema = lerp(G, G_ema, beta), parameters alone: noise maps stay as they are."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - beta)


def average_of(G):
    """A copy for the running average of G's weights, with noise maps of its own."""
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    for name, noise in G_ema.named_buffers():
        if name.endswith("noise_const"):
            noise.normal_()
    return G_ema


def lazy(lr, every):
    """Adam's rate and betas to the power of k / (k + 1), since every k steps come with one more, of
    the regularizer (StyleGAN2 appendix B)."""
    share = every / (every + 1)
    return lr * share, tuple(beta**share for beta in BETAS)


def new_networks(args, size, regions):
    """{"G", "D", "G_ema"} with fresh weights. Sides of masks that were left out, args.coarse_size
    and min_size, are set from that of images."""
    channels = channel_table(args.channel_base, args.channel_max, size)
    args.coarse_size = args.coarse_size or min(64, size // 2)
    args.min_size = args.min_size or min(16, args.coarse_size // 2)
    try:
        G = Generator(
            size, regions, args.w_dim, args.map_layers, channels, args.coarse_size, args.min_size,
            args.layers, args.base_layers, args.depth_layers, args.local_channels,
            args.coarse_channels, args.residual_refine, args.detach_texture,
            see_through_of(args, regions), args.noise_inputs,
        )  # fmt: skip
    except ValueError as e:
        raise UserError(f"these options make no network: {e}.") from None
    D = Discriminator(size, len(regions), channels, args.mbstd_group)
    return {"G": G, "D": D, "G_ema": average_of(G)}


def train(args):
    first = common.first_weights(args)
    given = load_networks(args, first)[0] if first else {}
    fill_options(args, given)
    run = common.Run("semantic_stylegan", args, __file__)
    run.log_every = 50 * args.batch
    toy = common.TOY_FACES if args.adapt else common.TOY_LABELLED
    source = common.open_data(args.data, size=args.size, toy=toy)

    # ---- data: picture n is a pure function of (seed, n) --------------------------------------
    if args.adapt:  # pictures alone
        data, size = common.square_pictures(args, common.images_of(source))
        regions = args.regions.split(",")
    else:
        data, size, regions = common.labelled_pictures(args, source)
        args.regions = ",".join(regions)

    def item(n):
        epoch, i = divmod(n, len(data))
        k = common.shuffled(len(data), args.seed, epoch)[i]
        rng = common.item_rng(args.seed, epoch, i)
        if args.adapt:
            return (common.crop_and_flip(data[k], None, args.mirror, rng),)
        flip = args.mirror or args.aug
        return common.augment_pair(*data[k], rng, flip=flip, affine=args.aug, swap=data.swap)

    # ---- networks, their average, optimisers --------------------------------------------------
    nets = new_networks(args, size, regions)
    if given:
        common.copy_matching(nets, given, run.say)
    G, D, G_ema = (net.to(run.device, memory_format=run.order) for net in nets.values())
    trained, averages = [G.position, G.local, G.render], [(G_ema, G)]
    if args.freeze_local or args.freeze:
        averages = [(G_ema.mapping, G.mapping), (G_ema.render, G.render)]
    if args.freeze:
        trained = [G.render]
        for net in (G.position, G.local):
            net.requires_grad_(False)
    adam_G, adam_D = lazy(args.lr, args.pl_every), lazy(args.lr, args.r1_every)  # rate, betas
    # Two of G: path length moves all of it but the mapping network, whose moments stay, too.
    opts = {"mapping": run.adam([G.mapping], *adam_G), "G": run.adam(trained, *adam_G)}
    opts |= {"D": run.adam([D], *adam_D)}
    pl_mean = torch.zeros((), device=run.device)

    if not args.resume:
        data.all(SCORED)  # wrong pictures and maps, as far as these show them, leave no run folder
    start = run.restore(nets, opts, {"pl": common.Held(mean=pl_mean)}, data.names)
    run.say(
        f"{len(data)} pictures of {size}x{size}; regions: {', '.join(regions)}; "
        f"G has {common.count(G):,} parameters, D {common.count(D):,}"
    )
    if len(data) < args.batch:
        run.say(f"only {len(data)} pictures: a batch of {args.batch} holds each more than once")
    if start == 0:
        show_reals(run, data)
        score(run, G_ema, data)

    for step, (real, *labels) in run.batches(item, start, args.iters):
        seg = common.one_hot_seg(labels[0], len(regions), run.order) if labels else None
        losses = train_step(G, D, opts.values(), pl_mean, real, seg, step, args, run, run.randn)

        # ---- the average of G, of which samples and scores are made ---------------------------
        for average, net in averages:
            update_ema(average, net, args.ema_beta)

        run.log(losses)
        keep = run.due(args.keep_every * args.batch) or run.steps_done == run.total
        if keep or run.due(args.every * args.batch):
            show_samples(run, G_ema)
            score(run, G_ema, data)
            run.save(keep=keep)
    run.say(f"samples and checkpoint are in {run.folder}")


def show_reals(run, data):
    """A sheet of pictures and, if there are, their label maps."""
    found = data.all(16)
    images = found[0] if isinstance(found, tuple) else found
    maps = [common.color_labels(found[1])] if isinstance(found, tuple) else []
    run.save_picture(common.grid(torch.cat([images, *maps]), len(images)), "reals")


def show_samples(run, G):
    """A sheet of 16 faces, a column each: image, segmentation, masks, and the depth of every region
    (each map from its least to its largest value)."""
    if run.rank == 0:
        z = common.latents(range(run.args.seed, run.args.seed + 16), G.config["w_dim"])
        found = pictures(G, G.mapping(z.to(run.device)))
        side = G.config["size"]
        maps = [common.inferno(depth) for depth in found.depth[:, 1:].unbind(1)]
        small = [common.color_labels(found.coarse), *maps]
        rows = [found.img, common.color_labels(found.seg), *(F.interpolate(x, side) for x in small)]
        run.save_picture(common.grid(torch.cat(rows), 16))


def score(run, G, data, n=SCORED):
    """Prints and keeps fd8 of n samples against at most as many of the pictures."""
    if run.rank == 0:
        found = data.all(n)
        real = found[0] if isinstance(found, tuple) else found
        fake = pictures(G, ws_of(G, range(10_000, 10_000 + n))).img
        row = {"n_real": len(real), "n_fake": n, "fd8": common.fd8(real, fake)}
        run.save_scores(row)
        run.say(common.describe_scores(row))


SHAPES = dict(  # of networks, where neither options nor a --checkpoint say otherwise
    w_dim=512, map_layers=8, coarse_size=None, min_size=None, layers=10, base_layers=2,
    depth_layers=6,
    local_channels=64, coarse_channels=512, channel_base=32768, channel_max=512,
    residual_refine=True, detach_texture=False, noise_inputs=True,
)  # fmt: skip


def fill_options(args, given):
    """Options that were left out: those of the networks to start from, else of SHAPES; and what
    adaptation and toy data have of their own."""
    options, G, size = dict(SHAPES), given.get("G_ema"), args.size
    if args.adapt and not args.resume and not {"G", "D", "G_ema"} <= given.keys():
        raise UserError("--adapt goes on from a --checkpoint that holds G, D and G_ema.")
    if not args.adapt and (args.freeze_local or args.freeze):
        raise UserError("--freeze-local and --freeze are of --adapt.")
    if args.adapt and args.aug:
        raise UserError("--aug is of pictures with label maps: --adapt knows --mirror alone.")
    if args.freeze_local and args.freeze:
        raise UserError("--freeze-local is of the average alone, --freeze of both: pass one.")
    if G:
        config, table = G.config, G.config["channels"]
        options |= {k: v for k, v in config.items() if k in options}
        options |= dict(channel_base=max(res * C for res, C in table.items()))
        options |= dict(channel_max=max(table.values()), noise_inputs=config["use_noise"])
        options |= dict(size=config["size"])
        options["see_through"] = ",".join(config["regions"][k] for k in config["see_through"])
    if G and args.adapt:
        args.regions = ",".join(config["regions"])
        if size not in (None, config["size"]):
            raise UserError(f"--adapt: the checkpoint makes {config['size']} pixels, not {size}.")
    options |= dict(mirror=False, lambda_mask=LAMBDA_MASK)
    options |= dict(iters=ITERS, every=2000, keep_every=10_000)
    if args.data.split("/")[0] == "toy":
        options |= dict(iters=TOY_ITERS, every=TOY_EVERY)
    if args.adapt:
        options |= dict(mirror=True, lambda_mask=0.0)
        options |= dict(iters=ADAPT_ITERS, every=100, keep_every=200)
    common.set_missing(args, options)


def see_through_of(args, regions):
    """The numbers of the regions in --see-through, names or numbers; without it those of faces, of
    the names that there are."""
    if args.see_through is None:
        return [k for k, name in enumerate(regions) if name in SEE_THROUGH]
    found = []
    for name in filter(None, (name.strip() for name in args.see_through.split(","))):
        k = regions.index(name) if name in regions else int(name) if name.isdecimal() else -1
        if not 0 < k < len(regions):
            some = f"names of {', '.join(regions[1:])}, or numbers from 1 to {len(regions) - 1}"
            raise UserError(f"--see-through {name}: {some}.")
        found.append(k)
    return found


# =============================================================================
# Official checkpoints
# =============================================================================

OFFICIAL_G = (  # pattern of an official name, ours; ours hold all regions, theirs one each
    (r"pos_embed\.weights", "position.weight"),
    (r"style\.(\d+)\.(weight|bias)", lambda m: f"mapping.fc{int(m[1]) - 1}.{m[2]}"),
    (r"local_nets\.\d+\.linears\.(\d+)\.conv\.weight", r"local.layers.\1.weight"),
    (
        r"local_nets\.\d+\.linears\.(\d+)\.conv\.modulation\.(weight|bias)",
        r"local.layers.\1.affine_\2",
    ),
    (r"local_nets\.\d+\.linears\.(\d+)\.activate\.bias", r"local.layers.\1.bias"),
    (r"local_nets\.\d+\.to_feat\.(?:conv\.)?(weight|modulation|bias)", r"local.to_feature.\1"),
    (r"local_nets\.\d+\.to_depth\.(?:conv\.)?(weight|modulation|bias)", r"local.to_depth.\1"),
    (r"render_net\.convs\.(\d+)\.(weight|modulation)", r"render.layers.\1.\2"),
    (r"render_net\.convs\.(\d+)\.noise\.weight", r"render.layers.\1.noise_strength"),
    (r"render_net\.convs\.(\d+)\.activate\.bias", r"render.layers.\1.bias"),
    (r"render_net\.noises\.noise_(\d+)", r"render.layers.\1.noise_const"),
    (
        r"render_net\.to_(rgb|seg)s\.(\d+)\.(?:conv\.)?(weight|modulation|bias)",
        r"render.to_\1.\2.\3",
    ),
)
OFFICIAL_D = (
    (r"convs_(img|seg)\.0\.0\.weight", r"of_\1.0.weight"),
    (r"convs_(img|seg)\.0\.1\.bias", r"of_\1.0.bias"),
    (r"convs_(img|seg)\.(\d+)\.conv1\.[01]\.(weight|bias)", r"of_\1.\2.conv0.\3"),
    (r"convs_(img|seg)\.(\d+)\.conv2\.[12]\.(weight|bias)", r"of_\1.\2.conv1.\3"),
    (r"convs_(img|seg)\.(\d+)\.skip\.1\.weight", r"of_\1.\2.skip.weight"),
    (r"final_conv\.[01]\.(weight|bias)", r"conv.\1"),
    (r"final_linear\.0\.(weight|bias)", r"fc.\1"),
    (r"final_linear\.1\.(weight|bias)", r"out.\1"),
)
# What shapes of tensors do not tell, by its official name: ours.
UNSEEN = {"base_layers": "base_layers", "depth_layers": "depth_layers"}
UNSEEN |= {"residual_refine": "residual_refine", "transparent_dims": "see_through"}


def our_name(name):
    """(our name, region or None) of an official tensor; (None, None) for filters, which are
    constants. Raises ValueError for other names."""
    if name.endswith(".kernel"):
        return None, None
    for pattern, ours in (*OFFICIAL_G, *OFFICIAL_D):
        if m := re.fullmatch(pattern, name):
            region = re.match(r"local_nets\.(\d+)\.", name)
            return m.expand(ours) if isinstance(ours, str) else ours(m), region and int(region[1])
    raise ValueError(f"not a tensor of SemanticStyleGAN: {name!r}")


def region_names(K):
    """Of an official file, which has none."""
    return list(FACES) if K == len(FACES) else [str(k) for k in range(K)]


def official_G(shape, options):
    """The config of a generator with tensors of these shapes."""
    missing = [theirs for theirs in UNSEEN if options.get(theirs) is None]
    if missing:
        options = ", ".join(f"--{UNSEEN[theirs].replace('_', '-')}" for theirs in missing)
        raise ValueError(f"neither its tensors nor saved options say them: pass {options}")
    K, _, local_channels = shape["local.layers.0.weight"][:3]
    w_dim = shape["mapping.fc0.weight"][0]
    coarse_channels = shape["local.to_feature.weight"][1]
    stages = range(sum(name.startswith("render.to_rgb.") for name in shape) // 3)
    O, I = zip(*(shape[f"render.layers.{2 * i}.weight"][:2] for i in stages), strict=True)
    size = 2 ** ((shape["position.weight"][1] // 2 - 1) // 2)
    min_size = size >> len(stages)
    again = next(i for i in stages[1:] if I[i] != O[i - 1])  # where the features come in again
    return dict(
        kind="G", size=size, regions=region_names(K), w_dim=w_dim,
        map_layers=sum(name.startswith("mapping.") for name in shape) // 2,
        channels={min_size << (i + 1): O[i] for i in stages},
        coarse_size=min_size << again, min_size=min_size,
        layers=sum(name.startswith("local.layers.") for name in shape) // 4,
        local_channels=local_channels, coarse_channels=coarse_channels,
        detach_texture=bool(options.get("detach_texture")),
    ) | {ours: options[theirs] for theirs, ours in UNSEEN.items()}  # fmt: skip


def official_D(shape):
    """The config of a discriminator with tensors of these shapes."""
    O, classes = shape["of_img.0.weight"][0], shape["of_seg.0.weight"][1]
    blocks = sum(name.startswith("of_img.") and name.endswith("skip.weight") for name in shape)
    size = 4 << blocks
    channels = {size: O}
    for k in range(1, blocks + 1):
        channels[size >> k] = shape[f"of_img.{k}.conv1.weight"][0]
    return dict(kind="D", size=size, classes=classes, channels=channels)


def from_official(arrays, options):
    """A ready G or D of {official name: tensor} of an official .pt file.

    Sizes are read off the shapes. Four things leave no trace there, and a G with the wrong ones
    makes wrong pictures without an error: options, the saved official arguments, must hold
    base_layers, depth_layers, residual_refine and transparent_dims. The mean w is not in the file:
    see update_w_avg. Raises ValueError for what is missing and for anything else.
    """
    found, regions = {}, {}
    for name, a in arrays.items():
        ours, region = our_name(name)
        if region is not None:
            regions.setdefault(ours, {})[region] = a
        elif ours:
            found[ours] = a
    for name, parts in regions.items():  # one tensor of all regions, but for the background's depth
        found[name] = torch.stack([parts[k] for k in sorted(parts)])
    times = (options.get("lr_mlp") or 0.01) / 0.01  # lr_mul of the mapping network, ours is 0.01
    found = {k: a * times if k.startswith("mapping.fc") else a for k, a in found.items()}
    shape = {name: tuple(a.shape) for name, a in found.items()}
    try:
        config = official_G(shape, options) if "position.weight" in shape else official_D(shape)
    except KeyError as e:
        raise ValueError(f"no tensor {e.args[0]!r}") from None
    net = build(config)
    common.fill(net, found, optional=("noise_const",))
    return net


# =============================================================================
# Regions: compose, edit, invert
# =============================================================================


def load_networks(args, path):
    """({"G", "D", "G_ema": network}, options of its training) of a checkpoint, a run, or an
    official .pt file, of which the command line may say what its tensors do not."""

    def official(arrays, options):
        typed = {theirs: vars(args).get(ours) for theirs, ours in UNSEEN.items()}
        if typed["transparent_dims"] is not None and "pos_embed.weights" in arrays:
            K = 1 + max(int(k.split(".")[1]) for k in arrays if k.startswith("local_nets."))
            typed["transparent_dims"] = see_through_of(args, region_names(K))
        return from_official(arrays, options | {k: v for k, v in typed.items() if v is not None})

    return common.load_gan(path, "semantic_stylegan", build, official)


@torch.no_grad()
def update_w_avg(G, n=10_000):
    """Sets the mean of w, for truncation, to that of n latents."""
    z = torch.from_numpy(np.random.RandomState(123).randn(n, G.config["w_dim"]))
    z = z.to(G.mapping.w_avg)
    G.mapping.w_avg.copy_(G.mapping(z)[:, 0].mean(0))


def load_generator(args):
    """G_ema of --checkpoint in evaluation mode on the device, and the options of its training."""
    nets, saved = load_networks(args, args.checkpoint)
    G = nets.get("G_ema") or nets.get("G")
    if G is None:
        raise UserError(f"--checkpoint {args.checkpoint} holds no generator.")
    G = G.to(common.pick_device(args.device), memory_format=torch.channels_last)
    G.eval().requires_grad_(False)
    update_w_avg(G)
    return G, saved


def region_named(G, name):
    """Its number; UserError if there is none of that name."""
    regions = G.config["regions"]
    if name not in regions:
        hint = "; --part says structure or texture" * ("." in name)
        raise UserError(f"no region {name!r}; there are {', '.join(regions)}{hint}.")
    return regions.index(name)


@torch.no_grad()
def ws_of(G, seeds, psi=1.0):
    """ws (N, num_ws, w_dim) of seeds."""
    z = common.latents(seeds, G.config["w_dim"])
    return G.mapping(z.to(G.mapping.w_avg), psi)


def rows_of(G, k, part="both"):
    """Which of the ws say what region k looks like: its structure, its texture, or both."""
    structure = G.config["base_layers"] + 2 * k
    return {
        "structure": [structure],
        "texture": [structure + 1],
        "both": [structure, structure + 1],
    }[part]


def swapped(G, ws, other, k, part="both", alpha=1.0):
    """ws (N, num_ws, w_dim) in which region k is (alpha = 1), or is on the way to be, other's."""
    rows, ws = rows_of(G, k, part), ws.clone()
    ws[:, rows] = ws[:, rows].lerp(other[:, rows], alpha)
    return ws


@torch.no_grad()
def each_picture(G, ws, shown=None, batch=16):
    """Yields a Picture of each `batch` rows of ws, with constant noise, on the CPU: img uint8
    (N, 3, size, size), seg and coarse the region of each pixel, uint8 (N, size, size) and of the
    masks, depth as it is. shown: (K,) of 0 and 1, regions to draw, None for all."""
    device = G.mapping.w_avg.device
    shown = None if shown is None else shown.to(device)

    def found(ws):
        p = G.synthesis(ws, "const", shown)
        labels = (x.argmax(1).to(torch.uint8) for x in (p.seg, p.coarse))
        return common.to_uint8(p.img), *labels, p.depth

    yield from map(Picture._make, common.each_batch(found, device, batch, ws))


def pictures(*args, **options):
    """What each_picture yields as one Picture."""
    return Picture(*map(torch.cat, zip(*each_picture(*args, **options), strict=True)))


def locality_of_swap(G, ws, other, k):
    """common.locality of giving region k of ws the codes of other, two tensors (N,)."""
    before, after = pictures(G, ws), pictures(G, swapped(G, ws, other, k))
    return common.locality(before.img, after.img, (before.seg == k) | (after.seg == k))


def faces_of(args, G):
    """ws (N, num_ws, w_dim) and names of the faces of --latents, or of --seeds."""
    if args.latents:
        written = Path(args.out, "latents.npz").resolve()
        if args.command in ("generate", "edit") and Path(args.latents).resolve() == written:
            raise UserError(f"--latents {args.latents} would be written over: name another --out.")
        ws = common.load_array(args.latents, "w", (None, G.num_ws, G.config["w_dim"]))
        stem = Path(args.latents).stem
        return ws.to(G.mapping.w_avg), [f"{stem}{i:04d}" for i in range(len(ws))]
    return ws_of(G, args.seeds, args.psi), [f"seed{seed:04d}" for seed in args.seeds]


def mixed(args, G, ws):
    """ws with the regions that --mix takes from other seeds: "hair=5,face.texture=7,base=2"."""
    for entry in filter(None, args.mix.split(",")):
        what, equals, seed = entry.partition("=")
        name, _, part = what.strip().partition(".")
        if not (equals and seed.strip().isdecimal()) or part not in ("", "structure", "texture"):
            raise UserError(f"--mix {entry}: REGION=SEED, REGION.structure=SEED or .texture=SEED.")
        other = ws_of(G, [int(seed)], args.psi).expand_as(ws)
        if name == "base":
            n = G.config["base_layers"]
            ws = torch.cat([other[:, :n], ws[:, n:]], 1)
        else:
            ws = swapped(G, ws, other, region_named(G, name), part or "both")
    return ws


def save_faces(G, out, ws, names, found):
    """images/, labels/ and classes.txt, which `train --data` reads, seg/, latents.npz, and grid.png
    of the first MOST_IN_GRID. found: an iterable of their Pictures."""
    faces = (face for p in found for face in zip(p.img, p.seg, p.coarse, strict=True))
    first = []
    for name, (image, labels, coarse) in zip(names, faces, strict=True):
        color = common.color_labels(labels)
        common.save_png(out / "images" / f"{name}.png", common.to_picture(image))
        common.save_png(out / "labels" / f"{name}.png", Image.fromarray(labels.numpy()))
        common.save_png(out / "seg" / f"{name}.png", common.to_picture(color))
        if len(first) < common.MOST_IN_GRID:
            first.append((image, color, common.color_labels(coarse)))
    images, colors, coarse = map(torch.stack, zip(*first, strict=True))
    sheet = {"image": images, "segmentation": colors}
    sheet["masks"] = F.interpolate(coarse, images.shape[2])
    common.save_sheet(out / "grid.png", sheet, names[: len(first)])
    with common.write_whole(out / "classes.txt") as f:
        f.write("".join(f"{name}\n" for name in G.config["regions"]).encode())
    common.save_arrays(out / "latents.npz", w=ws.cpu().numpy(), names=np.array(names))


def generate(args):
    """Pictures of seeds, with label maps; or films in which one code after the other varies."""
    common.out_folder(args)
    G, _ = load_generator(args)
    ws, names = faces_of(args, G)
    ws, shown = mixed(args, G, ws), torch.ones(len(G.config["regions"]))
    shown[[region_named(G, name) for name in filter(None, args.without.split(","))]] = 0
    if args.film:
        films(args, G, ws[:1], shown)
        return
    save_faces(G, Path(args.out), ws, names, each_picture(G, ws, shown))
    shown = f" of the first {common.MOST_IN_GRID}" if len(ws) > common.MOST_IN_GRID else ""
    files = f"images, labels, seg, grid.png{shown} and latents.npz (w)"
    print(f"{len(ws)} faces: {files} are in {args.out}")


def films(args, G, ws, shown):
    """A film for each code of --film: it goes through ten random ones, the rest stays. shown: (K,)
    of 0 and 1, the regions to draw."""
    regions, base = G.config["regions"], G.config["base_layers"]
    names = ["base"] * base + [f"{r}.{part}" for r in regions for part in ("structure", "texture")]
    wanted = set(names if args.film == "all" else args.film.split(","))
    for name in wanted & set(regions):  # both codes of a region
        wanted = wanted - {name} | {f"{name}.structure", f"{name}.texture"}
    if unknown := wanted - set(names):
        some = f"base, {', '.join(regions)}, or one's .structure or .texture"
        raise UserError(f"--film: no {', '.join(sorted(unknown))}; all, or some of {some}.")
    random = ws_of(G, range(args.seeds[-1] + 1, args.seeds[-1] + 11), args.psi)
    for name in dict.fromkeys(names):
        if name in wanted:
            rows = [i for i, other in enumerate(names) if other == name]
            path = common.closed_spline(random[:, 0].cpu(), args.frames).to(ws)
            film = ws.repeat(args.frames, 1, 1)
            film[:, rows] = path[:, None]
            found = pictures(G, film, shown)
            frames = torch.cat([found.img, common.color_labels(found.seg)], 3)
            file = Path(args.out, f"{rows[0]:02d}_{name.replace('.', '-')}.webp")
            common.save_film(file, map(common.to_picture, frames), fps=20)
            print(file)


def compose(args):
    """Faces put together region by region, as in the paper's figure: image, pseudo-depth of the
    region that comes in, segmentation."""
    common.out_folder(args)
    G, _ = load_generator(args)
    regions = G.config["regions"]
    order = args.regions.split(",") if args.regions else regions
    if not args.regions and tuple(regions) == FACES:
        order = FACES[:10]  # not glasses, hat and earring, which most faces do not have
    order, shown = [region_named(G, name) for name in order], torch.zeros(len(regions))
    (ws, names), columns = faces_of(args, G), {}
    for i, k in enumerate(order):
        shown[k] = 1
        found = pictures(G, ws, shown)
        depth, coarse = common.inferno(found.depth[:, k]), common.color_labels(found.coarse)
        columns[f"{'+ ' * (i > 0)}{regions[k]}"] = {
            "image": found.img,
            "depth": F.interpolate(depth, G.config["size"]),
            "segmentation": common.color_labels(found.seg),
            "masks": F.interpolate(coarse, G.config["size"]),
        }
    rows = ("image", "depth", "segmentation")
    for n, face in enumerate(names):
        sheet = {
            column: torch.stack([kinds[row][n] for row in rows])
            for column, kinds in columns.items()
        }
        common.save_sheet(Path(args.out, f"{face}.png"), sheet, rows)
        for i, (column, kinds) in enumerate(columns.items()):
            for kind, images in kinds.items():
                file = f"{i:02d}-{column.removeprefix('+ ')}-{kind}.png"
                common.save_png(Path(args.out, face, file), common.to_picture(images[n]))
    print(f"sheets of {len(names)} faces, and a folder of pictures for each, are in {args.out}")


def edit(args):
    """Gives faces a region of other faces, or moves them along the direction of an attribute, and
    prints how much of the change lies inside the region."""
    if (args.region is None) == (args.direction is None):
        raise UserError("what to edit? Either --region, or --direction, and not both.")
    common.out_folder(args)
    G, saved = load_generator(args)
    from_file = (args.direction or "").endswith(".npz")
    if args.direction and not from_file:
        edit_along(args, G, saved)
        return
    ws, names = faces_of(args, G)
    if from_file:
        changed, numbers, what = along_file(args, G, ws)
        other = {}
    else:
        k, what = region_named(G, args.region), f"{args.region}-{args.part}"
        seeds, numbers = args.others or [seed + 1 for seed in args.seeds], [k]
        others = ws_of(G, [seeds[i % len(seeds)] for i in range(len(ws))], args.psi)
        changed = functools.partial(swapped, G, ws, others, k, args.part)
        other = {"other": pictures(G, others).img}
    before, steps = pictures(G, ws), {}
    for i in range(1, args.steps + 1):
        edited = changed(i / args.steps)
        found = pictures(G, edited)
        steps[f"{i / args.steps:.0%}" if i < args.steps else "after"] = found.img
    region = sum((before.seg == k) | (found.seg == k) for k in numbers) > 0
    shares, outside = common.locality(before.img, found.img, region)
    out = Path(args.out)
    save_faces(G, out, edited, names, [found])
    sheet = {"before": before.img} | steps
    sheet |= {"difference": common.difference(before.img, found.img)}
    sheet |= other | {"segmentation": common.color_labels(found.seg)}
    common.save_sheet(out / f"{what}.png", sheet, names)
    print(f"{what}: {common.describe_locality(shares, outside)}")
    print(f"{out / f'{what}.png'}; the edited faces and their latents.npz are in {out}")


def along_file(args, G, ws):
    """How to move ws along the direction in an .npz of edit_along, the regions of its codes, and a
    name."""
    step = common.load_array(args.direction, "direction", (G.config["w_dim"],)).to(ws)
    rows = common.load_array(args.direction, "rows", (None,)).long()
    if not len(rows) or rows.min() < 0 or rows.max() >= G.num_ws:
        raise UserError(f"{args.direction}: rows of w that this model has not.")

    def changed(share):
        moved = ws.clone()
        moved[:, rows] += share * args.alpha * step
        return moved

    base = G.config["base_layers"]
    return changed, sorted({(row - base) // 2 for row in rows.tolist()}), Path(args.direction).stem


def edit_along(args, G, saved):
    """Directions of attributes, fitted in W; faces move along one in the codes of its regions."""
    regions, device = G.config["regions"], G.mapping.w_avg.device
    is_toy = saved.get("data") == "toy" and regions == list(common.TOY_REGIONS)
    toy = dict(size=G.config["size"], device=device, seed=args.seed, domain=0) if is_toy else None
    attributes = common.attributes_of(args.direction, regions, toy)

    def render(w, move, attribute):
        ws = w if w.ndim == 3 else w[:, None].repeat(1, G.num_ws, 1)
        if move is not None:
            ws = ws.clone()
            ws[:, [row for k in attribute.classes for row in rows_of(G, k)]] += move
        found = pictures(G, ws)
        return found.img, found.seg

    rng = np.random.default_rng(args.seed)
    z = torch.from_numpy(rng.standard_normal((args.samples, G.config["w_dim"])))
    with torch.no_grad():
        w = G.mapping(z.to(G.mapping.w_avg))[:, 0]
    shown, names = faces_of(args, G)
    found = common.edit_directions(args, attributes, w, shown, render, names)
    for a in attributes:
        path = Path(args.out, f"{a.name.replace(' ', '-')}.npz")
        of_a = found[a.name]
        rows = [row for k in a.classes for row in rows_of(G, k)]
        step = of_a["deviation"] * of_a["direction"]
        common.save_arrays(path, direction=step.numpy(), rows=np.array(rows))
        print(f"{a.name}: one deviation (w_dim,) and the rows of w it is added to are in {path}")


def invert(args):
    """Finds the codes of pictures: w+ by optimisation from the mean face, and, with --finetune, G
    itself for the rest (pivotal tuning, Roich et al. 2021)."""
    common.out_folder(args)
    G, saved = load_generator(args)
    device, size, out = G.mapping.w_avg.device, G.config["size"], Path(args.out)
    prepare = functools.partial(common.squeezed, size, resample=Image.Resampling.LANCZOS)
    names, images = common.read_pictures(args.input, prepare, "RGB", "--input")
    stems, kinds = common.stems_of(names), ("inverted", "tuned")
    written = [out / f"{stem}-{kind}.png" for stem in stems for kind in kinds]
    common.keep_originals([*written, out / "inversions.png"], "--out", args.input)
    lpips = common.lpips_or_explain(args, size, device)
    start = G.mapping.w_avg[None] if args.space == "w" else G.mapping.w_avg.repeat(G.num_ws, 1)
    found, made, scores = [], {}, []
    for name, stem, image in zip(names, stems, images, strict=True):
        real = common.to_float(image[None], device)
        perceptual = common.distance_to(real, lpips)

        def distance(x, real=real, perceptual=perceptual):
            return perceptual(x) + 0.1 * (x - real).square().mean()

        path, _ = common.project(
            lambda ws: G.synthesis(ws, "const").img, distance, start, 0.0, G.num_ws,
            steps=args.steps, lr=args.lr, w_weight=1.0,
        )  # fmt: skip
        ws = path[-1].expand(G.num_ws, -1)[None]
        common.save_arrays(out / f"{stem}.npz", w=ws.cpu().numpy(), names=np.array([name]))
        tuned = pivotal_tuning(args, G, ws, distance, out / f"{stem}.pt", saved)
        nets = {"inverted": G} | ({"tuned": tuned} if tuned else {})
        for kind, net in nets.items():
            img = pictures(net, ws).img
            made.setdefault(kind, []).append(img)
            common.save_png(out / f"{stem}-{kind}.png", common.to_picture(img[0]))
            x = common.to_float(img, device)
            row = {"mse": (x - real).square().mean().item()}
            row["psnr"] = 10 * math.log10(4 / max(row["mse"], 1e-10))
            row |= {"lpips": perceptual(x).item()} if lpips else {}
            scores.append((kind, row))
            print(f"{name}, {kind}: {describe(row)}", flush=True)
        found.append(ws)
    ws = torch.cat(found)
    sheet = {"picture": images} | {kind: torch.cat(parts) for kind, parts in made.items()}
    sheet |= {"seg": common.color_labels(pictures(G, ws).seg)}
    common.save_sheet(out / "inversions.png", sheet, names)
    common.save_arrays(out / "latents.npz", w=ws.cpu().numpy(), names=np.array(names))
    for kind in dict(scores):
        rows = [row for k, row in scores if k == kind]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        print(f"mean of {len(rows)}, {kind}: {describe(mean)}")
    print(f"latents.npz (w) and one file for each, for edit --latents, are in {out}")


def describe(row):
    """Scores of an inversion; MSE is of values in [-1, 1]."""
    return ", ".join(f"{name.upper()} {value:.4f}" for name, value in row.items())


def pivotal_tuning(args, G, ws, distance, path, saved):
    """A copy of G whose weights fit the picture of ws, saved as a checkpoint of its own; None
    without --finetune."""
    if not args.finetune:
        return None
    tuned = copy.deepcopy(G).requires_grad_(True)
    adam = torch.optim.Adam(tuned.parameters(), lr=1e-4)
    for _ in range(args.finetune):
        loss = distance(tuned.synthesis(ws, "const").img)
        adam.zero_grad()
        loss.backward()
        adam.step()
    tuned.requires_grad_(False)
    state = dict(model="semantic_stylegan", format=1, config={"G_ema": tuned.config}, args=saved)
    with common.write_whole(path) as f:
        torch.save(state | dict(nets={"G_ema": tuned.state_dict()}), f)
    return tuned


def evaluate(args):
    """fd8, FID and KID, precision and recall; whether the segmentation is that of the picture; and
    how local swaps of each region are."""
    G, saved = load_generator(args)
    args.data, args.size = common.data_of(args, saved), G.config["size"]
    source = common.open_data(args.data, size=args.size, toy=common.TOY_LABELLED)
    regions, labelled = G.config["regions"], source.is_toy or common.has_labels(source)
    if labelled:
        args.group = args.group or (None if args.classes else saved.get("group"))
        data, _, classes = common.labelled_pictures(args, source)
        labelled = len(classes) == len(regions)
        if not labelled and not saved.get("adapt"):
            has = f"{len(classes)} classes, the checkpoint {len(regions)} regions"
            raise UserError(f"--data {args.data} has {has}.")
    if not labelled:
        data, _ = common.square_pictures(args, common.images_of(source))
    device = G.mapping.w_avg.device

    def real(i):
        return data[i][0] if labelled else data[i]

    @torch.no_grad()
    def fakes(rng, m):
        z = torch.from_numpy(rng.standard_normal((m, G.config["w_dim"])))
        return common.to_uint8(G(z.to(G.mapping.w_avg)).img).cpu()

    n = common.number_of_samples(args, source)
    n_real = min(args.reals or n, len(data))
    row = {"n_real": n_real, "n_fake": n}
    row |= common.sample_scores(args, n, fakes, n_real, real, device)
    print(common.describe_scores(row))

    ws = ws_of(G, range(args.seed, args.seed + max(1000, 2 * args.pairs)))
    found = pictures(G, ws, batch=args.batch)
    if labelled:
        K = len(regions)
        net = common.load_segmenter(data, K, args.size, device, args.seed)
        iou, right = common.mean_iou(found.seg, common.segment(net, found.img), K)
        row |= {"segmentation_iou": iou, "segmentation_accuracy": right}
        print(
            f"segmentation against the segmenter's, {len(ws)} samples: {right:.1%} of the pixels"
            f" are equal, mean IoU {iou:.3f}"
        )
    row["locality"] = {}
    for k, name in enumerate(regions):
        shares, outside = locality_of_swap(G, *ws[: 2 * args.pairs].chunk(2), k)
        area = (found.seg == k).double().mean().item()
        print(f"{name}, {area:.1%} of the pixels: {common.describe_locality(shares, outside)}")
        row["locality"][name] = {"inside": shares.nanquantile(0.5).item(), "area": area}
        row["locality"][name]["outside"] = outside.nanquantile(0.5).item()
    if args.out:
        common.write_json(args.out, row)


# =============================================================================
# Command line
# =============================================================================


def add_model_options(p):
    """What official files may lack."""
    say = "needed where an official .pt does not say; the published ones': 2"
    p.add("--base-layers", type=common.positive_int, help=say)
    p.add("--depth-layers", type=common.positive_int, help="likewise: 6")
    p.add("--residual-refine", action=argparse.BooleanOptionalAction, help="likewise: yes")
    p.add("--see-through", metavar="NAMES", help="likewise: glasses,earring")


def add_face_options(p, seeds="0-7"):
    """The options of commands that make faces."""
    p.add("--checkpoint", required=True, help="ours, a run folder, or an official .pt")
    p.add("--psi", type=common.finite, default=0.7, help="truncation: 1 is none, 0 the mean face")
    p.add("--out", default="out", help="folder to write to")
    common.add_seeds(p, seeds, "--latents", "an .npz of invert, generate or edit")
    common.add_device_option(p)
    add_model_options(p)


def main(argv=None):
    cli = common.CommandLine("semantic_stylegan.py", __doc__, {"toy": TOY}, (*SHAPES, "size"))
    number, above_0, from_0 = common.positive_int, common.positive, common.not_negative
    flag = argparse.BooleanOptionalAction

    p = cli.command("train", train, "train on labelled pictures (default command)")
    every = f"iterations (2000; toy: {TOY_EVERY}; adapting: 100)"
    common.add_train_options(p, batch=BATCH, every=every, default_every=None, half=())
    common.add_labelled_options(p)
    p.add("--size", type=number, help="pixels; default: those of the pictures or of --checkpoint")
    lengths = f"{ITERS}; toy: {TOY_ITERS}; adapting: {ADAPT_ITERS}"
    p.add("--iters", type=number, help=f"length of the training: {lengths}")
    p.add("--mirror", action=flag, help="flip pictures at random: no; adapting, yes")
    p.add("--aug", action="store_true", help="flip, scale, turn and shift them at random")
    p.add("--lr", type=above_0, default=LR, help="before the correction for lazy regularization")
    p.add("--r1-img", type=from_0, default=R1_IMG, help="weight of R1 of images, halved")
    p.add("--r1-seg", type=from_0, default=R1_SEG, help="of segmentations, likewise")
    p.add("--r1-every", type=number, default=R1_EVERY, help="steps between R1")
    p.add("--lambda-mask", type=from_0, help=f"of the mask loss: {LAMBDA_MASK:g}; adapting: 0")
    p.add("--pl-weight", type=from_0, default=PL_WEIGHT, help="weight of path length; 0: off")
    p.add("--pl-every", type=number, default=PL_EVERY, help="steps between path lengths")
    p.add("--mixing", type=common.probability, default=MIXING, help="share of two-latent batches")
    p.add("--ema-beta", type=common.fraction, default=EMA_BETA, help="of the average of G")
    p.add("--mbstd-group", type=number, default=4, help="minibatch std: images in one, at most")
    p.add("--adapt", action="store_true", help="go on from --checkpoint without labels")
    p.add("--freeze", action="store_true", help="adapting: hold the local generators")
    p.add("--freeze-local", action="store_true", help="so in the average alone, as officially")
    p.add("--w-dim", type=number, help="of z and w: 512; this and the rest: or as in --checkpoint")
    p.add("--map-layers", type=number, help="depth of the mapping network: 8")
    p.add("--coarse-size", type=number, help="side of the local maps: 64, at most half of --size")
    p.add("--min-size", type=number, help="side that R begins with: 16, at most half of that")
    p.add("--layers", type=number, help="of a local generator: 10")
    p.add("--base-layers", type=number, help="of these, with codes that regions share: 2")
    p.add("--depth-layers", type=number, help="of these, before the depth: 6")
    p.add("--local-channels", type=number, help="of a local generator: 64")
    p.add("--coarse-channels", type=number, help="of the features that it makes: 512")
    p.add("--channel-base", type=number, help="channels of R and D times side: 32768")
    p.add("--channel-max", type=number, help="of these at most: 512")
    p.add("--residual-refine", action=flag, help="R refines the masks: yes")
    p.add("--noise-inputs", action=flag, help="noise in the renderer: yes")
    p.add("--detach-texture", action=flag, help="texture does not teach structure: no")
    p.add("--see-through", metavar="NAMES", help=f"that hide nothing: {','.join(SEE_THROUGH)}")
    p.add("--keep-every", type=number, help="between kept checkpoints: 10000; adapting: 200")

    p = cli.command("prepare", common.prepare_celebamask, "label maps of CelebAMask-HQ's masks")
    p.add("--input", required=True, help="CelebAMask-HQ as it is published, a folder or a .zip")
    p.add("--size", type=number, default=512, help="pixels")
    p.add("--out", default="data/celebamask_hq", help="folder to write to; skips what it has")
    p.add("--workers", type=common.not_negative_int, default=4, help="threads")

    p = cli.command("generate", generate, "faces of seeds with their label maps, or films")
    add_face_options(p)
    p.add("--mix", default="", metavar="LIST", help="hair=5,nose.texture=7,base=2: of other seeds")
    p.add("--without", default="", metavar="NAMES", help="regions to leave out: glasses, say")
    p.add("--film", metavar="NAMES", help="all, base, hair.texture, ...: of the first face")
    p.add("--frames", type=number, default=160, help="of such a film")

    p = cli.command("compose", compose, "faces put together region by region")
    add_face_options(p, seeds="0-3")
    p.add("--regions", metavar="NAMES", help="in this order; default: all, of faces the first ten")

    p = cli.command("edit", edit, "change one region, or an attribute")
    add_face_options(p)
    p.add("--region", metavar="NAME", help="that faces get from others")
    p.add("--part", choices=("both", "structure", "texture"), default="both", help="of it")
    p.add("--others", type=common.seeds, help="seeds of those; default: each of --seeds plus 1")
    p.add("--steps", type=number, default=1, help="pictures on the way, the last included")
    common.add_edit_options(p, required=False)

    p = cli.command("invert", invert, "find the codes of pictures, for edit")
    p.add("--checkpoint", required=True, help="ours, a run folder, or an official .pt")
    p.add("--input", required=True, help="a picture or a folder, aligned as the training's")
    p.add("--space", choices=("w", "w+"), default="w+", help="w+: every code its own w")
    p.add("--steps", type=number, default=400, help="of the optimisation")
    p.add("--lr", type=above_0, default=0.1, help="Adam's rate at its highest")
    p.add("--finetune", type=common.not_negative_int, default=0, help="then steps of G: 200, say")
    p.add("--out", default="out", help="folder to write to")
    common.add_vgg_options(p)
    common.add_device_option(p)
    add_model_options(p)

    p = cli.command("evaluate", evaluate, "FID, segmentation and locality")
    common.add_evaluate_options(p)
    common.add_sample_scores_options(p, "fd8,fid,pr")
    common.add_labelled_options(p)
    p.add("--pairs", type=number, default=64, help="of faces, for each region's locality")
    add_model_options(p)

    args = cli.parse(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))
