"""SemanticStyleGAN, "SemanticStyleGAN: Learning Compositional Generative Priors for Controllable
Image Synthesis and Editing" (Shi, Yang, Wan, Shen 2021, arXiv:2112.02236).

In this file, in the order of the signal              paper
    MappingNetwork, mixed_ws                          sec. 3.1: z to a code for each region
    LocalGenerators                                   sec. 3.1, Fig. 3: one small MLP per region
    fusion_weights                                    sec. 3.2: a softmax of pseudo-depths
    RenderNet                                         sec. 3.3: image and segmentation of features
    Discriminator                                     sec. 3.4: two branches, image and segmentation
    logistic_loss, r1_penalties, path_lengths         sec. 3.4, StyleGAN2's
    mask_loss                                         sec. 3.3: segmentation stays near the masks
    train                                             sec. 3.4, 4; adaptation: sec. 4.4
    compose, edit, invert, evaluate                   sec. 4.2, 4.3: what the regions are good for

    python semantic_stylegan.py                       # toy faces and their regions, 2 CPU cores
    python semantic_stylegan.py --data FOLDER --size 256       # with images/ and labels/
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
segmentation. Differs from both: batches of any size (groups of the minibatch standard deviation are
as large as divides them), --freeze-local really freezes where asked to.
"""

import argparse
import copy
import math
import sys
from collections import namedtuple
from pathlib import Path

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

LR, BETAS = 0.002, (0.0, 0.99)  # Adam, before the correction for lazy regularization
R1_EVERY, PL_EVERY = 16, 4  # lazy regularization, StyleGAN2 sec. 3.1
R1_IMG, R1_SEG = 10.0, 1000.0  # D reacts to masks far more strongly than to images, sec. 3.4
PL_WEIGHT, PL_DECAY, PL_SHRINK = 0.5, 0.01, 2  # path lengths of half a batch
LAMBDA_MASK = 100.0
MIXING = 0.3  # of a batch: codes of two latents in one face
EMA_BETA = 0.5 ** (32 / 10_000)  # half-life of 312 steps, whatever the batch
ITERS, BATCH = 200_000, 16
ADAPT_ITERS = 2000  # adaptation to other pictures stops early, by eye

FACE_CLASSES = (  # CelebAMask-HQ's 19 in 13 groups, official order
    "background", "face", "eye", "eyebrow", "mouth", "nose", "ear", "hair", "neck", "cloth",
    "glasses", "hat", "earring",
)  # fmt: skip
SEE_THROUGH = ("glasses", "earring")  # what lies behind them is drawn, too

# What a plain `python semantic_stylegan.py` trains: small enough for two CPU cores and minutes.
TOY = dict(size=32)

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
        w = self.weight.to(x.dtype) * self.gain
        b = None if self.bias is None else self.bias.to(x.dtype) * self.lr_mul
        if self.act == "linear":
            return F.linear(x, w, b)
        return ops.bias_act(F.linear(x, w), b, act=self.act)


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
        w = (self.weight * self.gain).to(x.dtype)
        # Like the official code, convolve where it upsamples and correlate elsewhere.
        x = ops.conv2d_resample(
            x, w, self.fir, self.up, self.down, self.pad, flip_weight=self.up == 1
        )
        if self.bias is None and self.act == "linear" and gain == 1 and self.clamp is None:
            return x
        clamp = None if self.clamp is None else self.clamp * gain
        act_gain = ops.ACTIVATIONS[self.act][2] * gain
        return ops.bias_act(x, self.bias, act=self.act, gain=act_gain, clamp=clamp)


def normalize(x):
    """Each row to mean square 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """Z -> W, an MLP (StyleGAN, Fig. 1b), one w for all codes.

    forward(z, psi=1) -> ws (N, num_ws, w_dim); z: (N, w_dim), any scale, normalised inside;
    psi: 1 = no truncation, 0 = the mean face, towards w_avg, the mean of w (see update_w_avg).
    """

    def __init__(self, w_dim, num_ws, num_layers=8, lr_mul=0.01):
        super().__init__()
        self.num_ws, self.num_layers = num_ws, num_layers
        for i in range(num_layers):
            self.add_module(f"fc{i}", Linear(w_dim, w_dim, "lrelu", lr_mul))
        self.register_buffer("w_avg", torch.zeros(w_dim))

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
        affine = self.affine_weight.mT / math.sqrt(w.shape[2])  # (K, w_dim, I)
        style = torch.baddbmm(self.affine_bias[:, None], w.transpose(0, 1), affine)  # (K, N, I)
        weight = self.weight[:, None] * (style / math.sqrt(I))[:, :, None]  # (K, N, O, I)
        weight = weight * (weight.square().sum(3, keepdim=True) + 1e-8).rsqrt()
        weight = weight.transpose(0, 1).reshape(N * K, O, I)
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
                depth = (self.to_depth.weights() @ x[:, 1:] + self.to_depth.bias[:, :, None])[:, :, 0]
                depth = F.pad(depth, (0, 0, 1, 0))  # of the background: 0 everywhere
                x = x.detach() if self.detach_texture else x
        return x, depth

    def features(self, h, a):
        # Linear in h, so that the sum over regions is one product: K maps of O channels never exist.
        weight = self.to_feature.weights().transpose(0, 1).flatten(1)  # (O, K * C)
        bias = (self.to_feature.bias.T).expand(len(h), -1, -1) @ a  # (N, O, P)
        h = (h * a[:, :, None]).flatten(1, 2)  # (N, K * C, P)
        return torch.baddbmm(bias, weight.expand(len(h), -1, -1), h)


def fusion_weights(depth, shown=None, see_through=()):
    """m (N, K, ...), each region's mask, and a, its weight among the features (sec. 3.2).

    depth: (N, K, ...), larger is nearer; shown: (N, K) of 0 and 1, regions to draw, None for all
    see_through: regions that do not hide what is behind them: theirs come on top of the weights of
    the others, which add up to 1 by themselves. The masks add up to 1 in any case.
    """
    m = depth.softmax(1)
    if shown is not None:
        m = m * shown.reshape(*shown.shape, *[1] * (m.ndim - 2))
        m = m / (m.sum(1, keepdim=True) + 1e-8)
    if not see_through:
        return m, m
    clear = torch.zeros(m.shape[1], dtype=torch.bool, device=m.device)
    clear[list(see_through)] = True
    clear = clear.view(-1, *[1] * (m.ndim - 2))
    solid = torch.where(clear, 0, m)
    return m, torch.where(clear, m, solid / (solid.sum(1, keepdim=True) + 1e-8))


class RenderLayer(nn.Module):
    """A 3x3 convolution with StyleGAN2's demodulation but no style, noise, bias, leaky ReLU.

    forward(x, noise): (N, I, H, W) -> (N, O, H * up, ...)
    noise: "random", "const" (the stored map), or a function of a shape that draws it
    """

    def __init__(self, I, O, res, up=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(O, I, 3, 3))
        self.modulation = nn.Parameter(torch.ones(I))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(O))
        self.register_buffer("noise_const", torch.randn(res, res))
        self.register_buffer("fir", fir_filter(), persistent=False)
        self.up = up

    def forward(self, x, noise="random"):
        w = self.weight * (self.modulation / math.sqrt(self.weight[0].numel()))[:, None, None]
        w = w * (w.square().sum([1, 2, 3], keepdim=True) + 1e-8).rsqrt()
        x = ops.conv2d_resample(x, w, self.fir, self.up, 1, 1, flip_weight=self.up == 1)
        image = self.noise_const
        if noise != "const":
            shape = (len(x), 1, *x.shape[2:])
            image = torch.randn(shape, device=x.device) if noise == "random" else noise(*shape)
        return ops.fused_act(x, None, image, self.noise_strength, self.bias, "lrelu")


class RenderNet(nn.Module):
    """R (sec. 3.3, Fig. 3c): features of the fused regions to an image and its segmentation.

    forward(f, coarse, noise) -> img (N, 3, size, size), seg (N, K, size, size), neither limited to
        [-1, 1]; f: (N, I, h, h); coarse: (N, K, h, h), the masks, in [-1, 1]
    f is averaged to min_size and comes in once more where the side is its own. With
    `residual_refine` what the renderer says of the regions is added to the masks.
    """

    def __init__(self, K, I, size, coarse_size, min_size, channels, residual_refine):
        super().__init__()
        self.coarse_size, self.min_size, self.residual_refine = coarse_size, min_size, residual_refine
        self.layers, self.to_rgb, self.to_seg = (nn.ModuleList() for _ in range(3))
        C, res = I, min_size
        while res < size:
            C, res, O = C + I * (res == coarse_size), res * 2, channels[res * 2]
            self.layers.extend([RenderLayer(C, O, res, up=2), RenderLayer(O, O, res)])
            self.to_rgb.append(Head(1, O, 3))
            self.to_seg.append(Head(1, O, K))
            C = O
        self.register_buffer("fir", fir_filter(), persistent=False)

    def forward(self, f, coarse, noise="random"):
        x, out = F.avg_pool2d(f, self.coarse_size // self.min_size), None
        for k, heads in enumerate(zip(self.to_rgb, self.to_seg, strict=True)):
            if x.shape[2] == self.coarse_size:
                x = torch.cat([x, f], 1)
            x = self.layers[2 * k + 1](self.layers[2 * k](x, noise), noise)
            weight = torch.cat([head.weights()[0] for head in heads])  # (3 + K, C)
            y = ops.conv2d(x, weight[:, :, None, None])
            y = ops.bias_act(y, torch.cat([head.bias[0] for head in heads]))
            out = y if out is None else y + ops.upsample2d(out, self.fir)
            if self.residual_refine and x.shape[2] == self.coarse_size:
                out = out + F.pad(coarse, (0, 0, 0, 0, 3, 0))
        return out[:, :3], out[:, 3:]


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
        noise: see RenderLayer; shown: (N, K), regions to draw, None for all
    Picture: img (N, 3, size, size), about [-1, 1], seg (N, K, size, size), whose largest number is
        the region, coarse (N, K, coarse_size, coarse_size), the masks in [-1, 1], depth (likewise)

    Defaults are the published model's, but for 256 pixels instead of 512. see_through: regions as
    in fusion_weights; depth_layers: those that decide the shape, the first base_layers of them with
    the codes that regions share. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self, size=256, classes=13, w_dim=512, map_layers=8, channels=None, coarse_size=64,
        min_size=16, layers=10, base_layers=2, depth_layers=6, local_channels=64,
        coarse_channels=512, residual_refine=True, detach_texture=False, see_through=(10, 12),
    ):  # fmt: skip
        if not (base_layers <= depth_layers <= layers):
            raise ValueError(f"{base_layers} base, {depth_layers} depth of {layers} layers")
        if not (min_size < coarse_size < size and coarse_size % min_size == 0):
            raise ValueError(f"sizes must grow: {min_size}, {coarse_size}, {size} pixels")
        if any(k >= classes for k in see_through):
            raise ValueError(f"see-through regions {see_through} of {classes}")
        channels = channels or channel_table()
        given = dict(locals())
        super().__init__()
        self.config = {"kind": "G"} | {k: given[k] for k in given if k not in ("self", "__class__")}
        self.config |= {"see_through": list(see_through)}
        self.num_ws = base_layers + 2 * classes
        self.mapping = MappingNetwork(w_dim, self.num_ws, map_layers)
        self.position = FourierFeatures(local_channels, coarse_size, int(math.log2(size)))
        self.local = LocalGenerators(
            classes, local_channels, local_channels, coarse_channels, w_dim, layers, depth_layers,
            detach_texture,
        )  # fmt: skip
        self.render = RenderNet(
            classes, coarse_channels, size, coarse_size, min_size, channels, residual_refine
        )
        # For each layer of each region, which of the ws it follows.
        rows = []
        for k in range(classes):
            structure, texture = base_layers + 2 * k, base_layers + 2 * k + 1
            base = list(range(base_layers)) if k else [structure] * base_layers
            rows += base + [structure] * (depth_layers - base_layers)
            rows += [texture] * (layers - depth_layers)
        self.rows = rows

    def expand(self, ws):
        """(N, num_ws, w_dim) -> codes (N, K * layers, w_dim), a row for each layer."""
        return ws[:, self.rows]

    def synthesis(self, ws, noise="random", shown=None):
        config = self.config
        codes = self.expand(ws) if ws.shape[1] == self.num_ws else ws
        codes = codes.unflatten(1, (config["classes"], config["layers"]))
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
        x = minibatch_std(x, math.gcd(len(x), self.config["mbstd_group"]))
        return self.out(self.fc(self.conv(x).flatten(1)))


def build(config):
    """The network that a `config` describes: what its attribute of that name held."""
    kind = dict(G=Generator, D=Discriminator)[config["kind"]]
    return kind(**{k: v for k, v in config.items() if k != "kind"})
