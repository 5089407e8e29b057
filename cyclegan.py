"""CycleGAN, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks"
(Zhu, Park, Isola, Efros 2017, arXiv:1703.10593).

In this file, in the order in which a picture meets it      paper
    ResnetGenerator, UnetGenerator                          sec. 4, appendix 7.2
    PatchDiscriminator, PixelDiscriminator                  sec. 4, appendix 7.2 (70x70 PatchGAN)
    adversarial_loss, gradient_penalty                      Eq. (1); sec. 4 (least squares)
    ImagePool                                               sec. 4 (a history of 50 images)
    cycle and identity loss, in generator_phase             Eqs. (2), (3); sec. 5.2
    train                                                   sec. 4, appendix 7.1

    python cyclegan.py                                      # toy data, 2 CPU cores, minutes
    python cyclegan.py --data horse2zebra
    python cyclegan.py translate --checkpoint RUN/checkpoint.pt --input PHOTOS --direction AtoB
    python cyclegan.py evaluate --checkpoint RUN/checkpoint.pt
    python cyclegan.py app --checkpoint RUN/checkpoint.pt   # a web page that translates pictures

Names. G_AB and G_BA are the paper's G and F (X = A, Y = B). D_A judges pictures of domain A, the
paper's D_X; the official code (junyanz/pytorch-CycleGAN-and-pix2pix) calls that one D_B.

Results: README. Differs from the paper, with the official PyTorch code: the identity loss is on for
every data set (paper: paintings only), convolutions before an instance norm keep their biases.
Differs from both: wgangp has its gradient penalty; a GPU trains in bfloat16 by default, and neither
adds nor trains those biases; on a CPU a run resumes bit for bit.
"""

import functools
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

LR, BETAS = 2e-4, (0.5, 0.999)  # Adam, sec. 4; the betas are the official code's
EPOCHS = 200  # sec. 4: 100 at a constant rate, 100 with the rate going linearly to zero
LAMBDA_CYC, LAMBDA_ID = 10.0, 0.5  # Eq. (3), sec. 4; sec. 5.2, relative to LAMBDA_CYC
LAMBDA_GP = 10.0  # Gulrajani et al. 2017, only with --gan-mode wgangp; halved with D's objective
POOL_SIZE = 50  # sec. 4
LOAD_SIZE, CROP_SIZE = 286, 256  # official defaults: resize, then a random crop
INIT_STD = 0.02  # appendix 7.1: weights from N(0, 0.02)

# What a plain `python cyclegan.py` trains: small enough for two CPU cores and a few minutes.
TOY = dict(load_size=64, crop_size=64, ngf=16, ndf=16, blocks=1)
TOY |= dict(batch=2, epochs=3, lr=1e-3, every=400)

# =============================================================================
# Networks
# =============================================================================
# Layers stand in nn.Sequential in the order of appendix 7.2, so that the names of parameters
# ("model.10.conv_block.1.weight") are those of the official checkpoints.


class InstanceNorm(nn.InstanceNorm2d):
    """Neither affine parameters nor running statistics, eps 1e-5. PyTorch's own has wrong gradients
    on a CPU for one image in channels_last order."""

    def forward(self, x):
        return ops.norm_act(x, eps=self.eps)


def norm2d(norm, C):
    """The normalisation of C channels: 'instance' (the paper), 'batch' or 'none'."""
    return {"instance": InstanceNorm, "batch": nn.BatchNorm2d, "none": nn.Identity}[norm](C)


def init_weights(net, std=INIT_STD):
    """Convolution weights ~ N(0, std), biases 0; batch norm weights ~ N(1, std) (appendix 7.1)."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net


class ResnetBlock(nn.Module):
    """Rk of appendix 7.2: two 3x3 convolutions and a skip, no ReLU after the sum."""

    def __init__(self, C, norm, dropout):
        super().__init__()
        bias = norm == "instance"
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(C, C, 3, bias=bias), norm2d(norm, C), nn.ReLU()]
        layers += [nn.Dropout(0.5)] if dropout else []
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(C, C, 3, bias=bias), norm2d(norm, C)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """The paper's generator (Johnson et al. 2016): c7s1-64, d128, d256, R256 x blocks, u128, u64,
    c7s1-3 (appendix 7.2). 9 blocks from 256 pixels, 6 below.

    forward(x) -> (N, out_channels, H, W) in [-1, 1]
        x: (N, in_channels, H, W) in [-1, 1]; H, W multiples of 4, at least 8
    Only convolutions that an instance norm follows have a bias (and the last one, always), as in
    the official code. Under autocast the result has the type of x, so that losses stay float32.
    """

    multiple = 4  # H and W must be multiples of it

    def __init__(
        self, in_channels=3, out_channels=3, ngf=64, blocks=9, norm="instance", dropout=False
    ):
        super().__init__()
        self.config = dict(kind="resnet", in_channels=in_channels, out_channels=out_channels)
        self.config |= dict(ngf=ngf, blocks=blocks, norm=norm, dropout=dropout)
        bias = norm == "instance"
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, ngf, 7, bias=bias)]  # c7s1-64
        layers += [norm2d(norm, ngf), nn.ReLU()]
        for C in (2 * ngf, 4 * ngf):  # d128, d256: zero padding here, unlike elsewhere
            layers += [nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=bias)]
            layers += [norm2d(norm, C), nn.ReLU()]
        layers += [ResnetBlock(4 * ngf, norm, dropout) for _ in range(blocks)]  # R256
        for C in (2 * ngf, ngf):  # u128, u64
            layers += [nn.ConvTranspose2d(2 * C, C, 3, 2, padding=1, output_padding=1, bias=bias)]
            layers += [norm2d(norm, C), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, out_channels, 7), nn.Tanh()]  # c7s1-3,
        # but with a tanh for norm and ReLU, as in the official code
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        fused = ops.kernels(x, None) is not None
        return (self.in_fewer_passes(x) if fused else self.model(x)).to(x.dtype)

    def in_fewer_passes(self, x):
        """model(x) on a GPU, see ops.through. What goes from block to block stays padded, since the
        padding of a sum is the sum of the paddings."""
        layers, end = list(self.model), 10 + self.config["blocks"]  # 0-9 stand before the blocks
        y = ops.through([*layers[:10], nn.ReflectionPad2d(1)], x)
        for block in layers[10:end]:
            padding, *rest = block.conv_block
            y = ops.through([*rest, padding], y, residual=y)
        return ops.through(layers[end:], y[:, :, 1:-1, 1:-1])


class UnetLevel(nn.Module):
    """One level of the U-Net: a convolution down, the levels `within`, a convolution up.

    forward(x): (N, outer, H, W) -> (N, 2 * outer, H, W), the input beside the output; the outermost
    level returns its output alone.
    """

    def __init__(self, outer, inner, within, norm, out_channels=None, dropout=False):
        super().__init__()
        self.outermost = out_channels is not None
        bias = norm == "instance"
        down = nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=bias)
        up_in = 2 * inner if within else inner
        if self.outermost:
            up = nn.ConvTranspose2d(up_in, out_channels, 4, stride=2, padding=1)
            layers = [down, within, nn.ReLU(), up, nn.Tanh()]
        else:
            up = nn.ConvTranspose2d(up_in, outer, 4, stride=2, padding=1, bias=bias)
            layers = [nn.LeakyReLU(0.2), down]
            layers += [norm2d(norm, inner), within] if within else []  # innermost: no norm
            layers += [nn.ReLU(), up, norm2d(norm, outer)]
            layers += [nn.Dropout(0.5)] if dropout else []
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        y = ops.through(self.model, x)
        return y if self.outermost else torch.cat([x, y], 1)


class UnetGenerator(nn.Module):
    """The U-Net generator of pix2pix (Isola et al. 2017), an option of the official code.

    forward(x) -> (N, out_channels, H, W) in [-1, 1]
        x: (N, in_channels, H, W) in [-1, 1]; H, W multiples of 2^downs: 8 for unet_256, 7 for
        unet_128
    """

    def __init__(
        self, in_channels=3, out_channels=3, ngf=64, downs=8, norm="instance", dropout=False
    ):
        super().__init__()
        self.config = dict(kind="unet", in_channels=in_channels, out_channels=out_channels)
        self.config |= dict(ngf=ngf, downs=downs, norm=norm, dropout=dropout)
        self.multiple = 2**downs
        C = [ngf * min(2**j, 8) for j in range(downs)]  # 64, 128, 256, 512, 512, ...
        level = None
        for j in range(downs - 1, 0, -1):  # from the innermost level outwards
            middle = 4 <= j < downs - 1  # 512 to 512 channels, but not the innermost
            level = UnetLevel(C[j - 1], C[j], level, norm, dropout=dropout and middle)
        self.model = UnetLevel(in_channels, C[0], level, norm, out_channels)

    def forward(self, x):
        return self.model(x).to(x.dtype)


class PatchDiscriminator(nn.Module):
    """PatchGAN (sec. 4, appendix 7.2): C64, C128, C256, C512 and a last convolution to one channel,
    4x4 kernels; every logit judges one patch, of 70x70 pixels with 3 layers of stride 2 (n_layers
    1, 2, 4, 5: 16, 34, 142, 286).

    forward(x) -> logits (N, 1, H / 2^n - 2, W / 2^n - 2); x: (N, in_channels, H, W) in [-1, 1]
    """

    def __init__(self, in_channels=3, ndf=64, n_layers=3, norm="instance"):
        super().__init__()
        self.config = dict(kind="patch", in_channels=in_channels, ndf=ndf)
        self.config |= dict(n_layers=n_layers, norm=norm)
        C = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(in_channels, C[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layers + 1):
            # Ck has stride 2 in appendix 7.2. The official code's last has 1: with 2 a patch would
            # have 94 pixels, not the 70 that the paper states.
            stride = 2 if i < n_layers else 1
            layers += [nn.Conv2d(C[i - 1], C[i], 4, stride, padding=1, bias=norm == "instance")]
            layers += [norm2d(norm, C[i]), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(C[-1], 1, 4, padding=1)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return ops.through(self.model, x).to(x.dtype)


class PixelDiscriminator(nn.Module):
    """A 1x1 "PatchGAN" (Isola et al. 2017), which judges colours only.

    forward(x) -> logits (N, 1, H, W); x: (N, in_channels, H, W) in [-1, 1]
    """

    def __init__(self, in_channels=3, ndf=64, norm="instance"):
        super().__init__()
        self.config = dict(kind="pixel", in_channels=in_channels, ndf=ndf, norm=norm)
        bias = norm == "instance"
        layers = [nn.Conv2d(in_channels, ndf, 1), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(ndf, 2 * ndf, 1, bias=bias), norm2d(norm, 2 * ndf), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(2 * ndf, 1, 1, bias=bias))

    def forward(self, x):
        return ops.through(self.net, x).to(x.dtype)


def build(config):
    """The network that a `config` describes: what its attribute of that name held."""
    kinds = dict(resnet=ResnetGenerator, unet=UnetGenerator)
    kinds |= dict(patch=PatchDiscriminator, pixel=PixelDiscriminator)
    return kinds[config["kind"]](**{k: v for k, v in config.items() if k != "kind"})


# =============================================================================
# Losses
# =============================================================================


def adversarial_loss(logits, real, mode="lsgan"):
    """How far D's logits are from calling the pictures `real` (True or False); mean over patches.

    lsgan: squared distance to 1 or 0 (sec. 4); vanilla: Eq. (1) in the non-saturating form, where D
    is the sigmoid of its logits; wgangp: minus or plus the mean (Gulrajani et al. 2017).
    """
    if mode == "wgangp":
        return -logits.mean() if real else logits.mean()
    if mode == "lsgan":
        return (logits - float(real)).square().mean()
    return -F.logsigmoid(logits if real else -logits).mean()


def gradient_penalty(D, real, fake, alpha):
    """(|grad_x D(x)| - 1)^2 at x = alpha * real + (1 - alpha) * fake, mean over the batch
    (Gulrajani et al. 2017, Eq. 3). Weight it by LAMBDA_GP.

    alpha: (N, 1) in [0, 1]. The official CycleGAN defines this term but never adds it.
    """
    alpha = alpha[:, :, None, None]
    x = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
    (grads,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return ((grads.flatten(1) + 1e-16).norm(2, dim=1) - 1).square().mean()


def forward_both(net, x, y):
    """net(x), net(y): as one batch, which is faster, or as two where a batch norm would mix them or
    sizes differ."""
    if net.config["norm"] == "batch" or x.shape[1:] != y.shape[1:]:
        return net(x), net(y)
    return net(torch.cat([x, y])).split([len(x), len(y)])


def discriminator_loss(D, real, fake, mode="lsgan"):
    """Half the sum for real and fake pictures: "we divide the objective by 2" (appendix 7.1)."""
    on_real, on_fake = forward_both(D, real, fake)
    return (adversarial_loss(on_real, True, mode) + adversarial_loss(on_fake, False, mode)) / 2


# =============================================================================
# Training
# =============================================================================


class ImagePool:
    """The history of generated images from which D learns (sec. 4; Shrivastava et al. 2017).

    Until `size` images are stored every image is stored and returned. From then on each is, with
    probability 1/2, exchanged for a random stored one, else returned and not stored.
    Everything is a tensor operation, in place, so that nothing waits for the GPU.
    """

    def __init__(self, size=POOL_SIZE):
        self.size = size
        self.images = None  # (size, C, H, W), made by the first query
        self.count = None  # () how many are stored

    def query(self, images, u, slot):
        """images: (N, C, H, W); u, slot: (N,) uniform in [0, 1). Returns (N, C, H, W)."""
        if self.size == 0:
            return images
        if self.images is None:
            self.images = images.new_zeros(self.size, *images.shape[1:])
            self.count = torch.zeros((), dtype=torch.long, device=images.device)
        if images.shape[1:] != self.images.shape[1:]:
            sizes = f"{tuple(self.images.shape[1:])} and {tuple(images.shape[1:])}"
            raise UserError(f"the image pool holds one size only, not {sizes}: use --pool-size 0.")
        out = []
        for image, u_i, slot_i in zip(images, u, (slot * self.size).long(), strict=True):
            filling = self.count < self.size
            swap = ~filling & (u_i > 0.5)
            k = torch.where(filling, self.count, slot_i).reshape(1)
            stored = self.images.index_select(0, k)[0]
            self.images.index_copy_(0, k, torch.where(filling | swap, image, stored)[None])
            self.count += filling
            out.append(torch.where(swap, stored, image))
        return torch.stack(out)

    def state_dict(self):
        return {"images": self.images, "count": self.count}

    def load_state_dict(self, state):
        if state["images"] is not None and len(state["images"]) == self.size:  # else start empty
            self.images, self.count = state["images"], state["count"]


def lr_factor(epoch, policy="linear", epochs=EPOCHS, epochs_decay=None, every=50):
    """What the learning rate is multiplied by in `epoch` = 1 .. epochs.

    linear: 1, then straight down over the last `epochs_decay` epochs (None: half of all), to
    1 / (epochs_decay + 1) in the last (sec. 4; the official code of 2018-2020 and 2025). step:
    times 0.1 after every `every` epochs. cosine: down over the flat epochs, then up again.
    """
    epochs_decay = epochs // 2 if epochs_decay is None else epochs_decay
    flat = epochs - epochs_decay
    if policy == "linear":
        return 1 - max(0, epoch - flat) / (epochs_decay + 1)
    if policy == "step":
        return 0.1 ** ((epoch - 1) // every)
    return (1 + math.cos(math.pi * (epoch - 1) / max(flat, 1))) / 2


def generator_phase(G_AB, G_BA, D_A, D_B, real_A, real_B, args, run):
    """Gradients of both generators. Returns {name: loss}, before weighting, fake_A, and fake_B."""
    losses = {}
    with run.autocast():
        if args.lambda_id > 0:  # each generator sees both domains in one pass
            fake_B, idt_B = forward_both(G_AB, real_A, real_B)
            fake_A, idt_A = forward_both(G_BA, real_B, real_A)
            # sec. 5.2: a picture that is already in the target domain should stay as it is.
            # The official code names these after the generator, and its idt_A is our idt_B. The
            # sum is the same: every term on domain A has lambda_A.
            losses["idt_A"] = F.l1_loss(idt_A, real_A)
            losses["idt_B"] = F.l1_loss(idt_B, real_B)
        else:
            fake_B, fake_A = G_AB(real_A), G_BA(real_B)
        rec_A, rec_B = G_BA(fake_B), G_AB(fake_A)
        losses["cycle_A"] = F.l1_loss(rec_A, real_A)  # Eq. (2)
        losses["cycle_B"] = F.l1_loss(rec_B, real_B)
        losses["G_AB"] = adversarial_loss(D_B(fake_B), True, args.gan_mode)  # Eq. (1)
        losses["G_BA"] = adversarial_loss(D_A(fake_A), True, args.gan_mode)
    loss_A = args.lambda_A * (losses["cycle_A"] + args.lambda_id * losses.get("idt_A", 0))
    loss_B = args.lambda_B * (losses["cycle_B"] + args.lambda_id * losses.get("idt_B", 0))
    run.backward(losses["G_AB"] + losses["G_BA"] + loss_A + loss_B)  # Eq. (3)
    losses = {name: loss.detach() for name, loss in losses.items()}
    return losses, fake_A.detach(), fake_B.detach()


def discriminator_phase(D_A, D_B, pool_A, pool_B, real_A, real_B, fake_A, fake_B, args, run):
    """Gradients of both discriminators, on fakes out of the pools. Returns {name: loss}."""
    losses, N = {}, len(real_A)
    fake_B = pool_B.query(fake_B, run.rand(N), run.rand(N))
    fake_A = pool_A.query(fake_A, run.rand(N), run.rand(N))
    with run.autocast():
        losses["D_A"] = discriminator_loss(D_A, real_A, fake_A, args.gan_mode)
        losses["D_B"] = discriminator_loss(D_B, real_B, fake_B, args.gan_mode)
        loss_D = losses["D_A"] + losses["D_B"]
        if args.gan_mode == "wgangp":
            losses["reg/gp_A"] = gradient_penalty(D_A, real_A, fake_A, run.rand(N)[:, None])
            losses["reg/gp_B"] = gradient_penalty(D_B, real_B, fake_B, run.rand(N)[:, None])
            loss_D = loss_D + LAMBDA_GP / 2 * (losses["reg/gp_A"] + losses["reg/gp_B"])
    run.backward(loss_D)
    return {name: loss.detach() for name, loss in losses.items()}


def train_step(nets, opts, pools, real_A, real_B, args, run):
    """One iteration: one update of both generators, then one of both discriminators.

    nets: G_AB, G_BA, D_A, D_B; opts: Adam of the generators, Adam of the discriminators; pools:
    past fake_A, past fake_B; real_A, real_B: (N, C, H, W) in [-1, 1]. Returns {name: loss}, before
    weighting. `run` gives autocast(), rand(n) uniform in [0, 1), backward(loss), which adds
    gradients, and graph(phase, optimizer) -> a function of phase's arguments: the phase, from no
    gradients on, and a step of the optimizer with their means over all processes. A GPU repeats
    both as one CUDA graph, so that all that changes must be tensors.
    """
    (G_AB, G_BA, D_A, D_B), (opt_G, opt_D), (pool_A, pool_B) = nets, opts, pools

    # ---- G_AB and G_BA; the discriminators only pass gradients on -----------------------------
    D_A.requires_grad_(False)
    D_B.requires_grad_(False)
    update_G = run.graph(generator_phase, opt_G)  # the phase, then a step of opt_G
    losses, fake_A, fake_B = update_G(G_AB, G_BA, D_A, D_B, real_A, real_B, args, run)

    # ---- D_A and D_B, on the fakes made before that update and older ones ---------------------
    D_A.requires_grad_(True)
    D_B.requires_grad_(True)
    update_D = run.graph(discriminator_phase, opt_D)
    return losses | update_D(D_A, D_B, pool_A, pool_B, real_A, real_B, fake_A, fake_B, args, run)


def new_networks(args):
    """{"G_AB", "G_BA", "D_A", "D_B"} with fresh weights."""
    G = dict(kind="resnet", blocks=args.blocks or (9 if args.crop_size >= 256 else 6))
    if args.G != "resnet":
        G = dict(kind="unet", downs={"unet_256": 8, "unet_128": 7}[args.G])
    D = dict(kind="pixel") if args.D == "pixel" else dict(kind="patch", n_layers=args.n_layers)
    G |= dict(ngf=args.ngf, norm=args.norm, dropout=args.dropout)
    D |= dict(ndf=args.ndf, norm=args.norm)
    A, B = args.channels_A, args.channels_B
    nets = {
        "G_AB": build(G | dict(in_channels=A, out_channels=B)),
        "G_BA": build(G | dict(in_channels=B, out_channels=A)),
        "D_A": build(D | dict(in_channels=A)),
        "D_B": build(D | dict(in_channels=B)),
    }
    return {name: init_weights(net, args.init_gain) for name, net in nets.items()}


def train(args):
    run = common.Run("cyclegan", args, script=__file__, precision="bf16")
    run.fixed += ("G", "blocks", "D", "n_layers", "ngf", "ndf", "norm", "dropout")
    one_size = args.preprocess.endswith("crop")  # CUDA graphs, cuDNN's search of algorithms need it
    run.records = one_size
    torch.backends.cudnn.benchmark = one_size
    if args.preprocess == "resize_and_crop" and args.crop_size > args.load_size:
        raise UserError(f"--crop-size {args.crop_size} is above --load-size {args.load_size}.")
    source = common.open_data(args.data, size=args.load_size)

    # ---- networks, optimisers, pools ----------------------------------------------------------
    nets = new_networks(args)
    if run.weights:
        found = load_networks(run.weights, args.direction)[0]
        if not args.resume:
            new = ", ".join(name for name in nets if name not in found) or "none"
            run.say(f"{', '.join(found)} with their sizes are those of {run.weights}; new: {new}")
        nets |= found
    A, B = args.channels_A, args.channels_B
    common.check_channels(nets, {"G_AB": [A, B], "G_BA": [B, A], "D_A": [A], "D_B": [B]})
    common.check_size(nets, args.crop_size)
    nets = {k: net.to(run.device, memory_format=run.order) for k, net in nets.items()}
    G_AB, G_BA, D_A, D_B = nets.values()
    betas = (args.beta1, BETAS[1])
    opts = {"G": run.adam([G_AB, G_BA], args.lr, betas), "D": run.adam([D_A, D_B], args.lr, betas)}
    pools = {"fake_A": ImagePool(args.pool_size), "fake_B": ImagePool(args.pool_size)}

    # ---- data: pair n is a pure function of (seed, n) -----------------------------------------
    multiple = max(G_AB.multiple, G_BA.multiple)
    data_A, data_B = (open_domain(args, source, part, multiple) for part in ("trainA", "trainB"))
    most = max(len(data_A), len(data_B))
    steps_per_epoch = most // args.batch
    if steps_per_epoch == 0:
        raise UserError(f"--data {args.data}: {most} images, --batch is {args.batch}. Lower it.")
    crop = args.crop_size if args.preprocess.endswith("crop") else None
    crop_and_flip = functools.partial(common.crop_and_flip, crop=crop, flip=args.flip)

    def pair(n):
        epoch, i = divmod(n, steps_per_epoch * args.batch)
        rng = common.item_rng(args.seed, epoch, i)
        a = common.shuffled(most, args.seed, epoch)[i] % len(data_A)
        b = rng.integers(len(data_B))  # B anew at random for every A: the data are unpaired
        return crop_and_flip(data_A[a], rng=rng), crop_and_flip(data_B[b], rng=rng)

    examples = fixed_examples(args, source)
    scored = common.has_subset(source, "testA") and common.has_subset(source, "testB")
    start = run.restore(nets, opts, pools, [*data_A.names, *data_B.names])
    run.say(
        f"{len(data_A)} images of A, {len(data_B)} of B: an epoch is {steps_per_epoch} steps;"
        " G_AB translates A to B, G_BA translates B to A"
    )

    for step, (real_A, real_B) in run.batches(pair, start, steps_per_epoch * args.epochs):
        epoch = step // steps_per_epoch + 1
        lr = args.lr * lr_factor(
            epoch, args.lr_policy, args.epochs, args.epochs_decay, args.lr_decay_every
        )
        run.set_lr(opts.values(), lr)
        losses = train_step(nets.values(), opts.values(), pools.values(), real_A, real_B, args, run)
        run.log(losses, epoch=epoch, lr=lr)
        done = run.steps_done
        keep = done % (steps_per_epoch * args.keep_every) == 0 or done == run.total
        if keep or run.due(args.every):
            run.save_picture(sample_sheet(G_AB, G_BA, examples, run.device))
            if keep and scored and run.rank == 0:
                run.save_scores(scores(G_AB, G_BA, args, source, run.device, say=run.say))
            run.save(keep=keep)
    run.say(f"samples and checkpoint are in {run.folder}")


# =============================================================================
# Official checkpoints
# =============================================================================


def from_official(arrays):
    """A ready generator or discriminator from an official state dict, {name: tensor or array}.

    Kind, sizes, norm and dropout are read off names and shapes. Files of PyTorch before 0.4 also
    hold running statistics of instance norms, which were never used: they are dropped. A U-Net's
    dropout leaves no trace in its names, so it is off. Raises ValueError for anything else.
    """
    arrays = {name.removeprefix("module."): torch.as_tensor(a) for name, a in arrays.items()}
    convs = {name: tuple(a.shape) for name, a in arrays.items() if a.ndim == 4}
    try:
        if "model.model.0.weight" in convs:
            first, conv, norm = "model.model.0", "model.model.1.model.1", "model.model.1.model.2"
            config = dict(kind="unet", out_channels=convs["model.model.3.weight"][1])
            config |= dict(downs=len(convs) // 2)
        elif blocks := sum(name.endswith("conv_block.1.weight") for name in convs):
            first, conv, norm = "model.1", "model.1", "model.2"
            config = dict(kind="resnet", out_channels=convs[f"model.{17 + blocks}.weight"][0])
            config |= dict(blocks=blocks, dropout="model.10.conv_block.6.weight" in convs)
        elif "net.0.weight" in convs:
            first, conv, norm = "net.0", "net.2", "net.3"
            config = dict(kind="pixel")
        else:
            first, conv, norm = "model.0", "model.2", "model.3"
            config = dict(kind="patch", n_layers=len(convs) - 2)
            convs["model.5.weight"]  # the third convolution: no such network has fewer
        width = "ngf" if "out_channels" in config else "ndf"
        config[width], config["in_channels"] = convs[f"{first}.weight"][:2]
    except KeyError as e:
        raise ValueError(f"not a CycleGAN network: no convolution {e.args[0]!r}") from None

    affine = f"{norm}.weight" in arrays and f"{norm}.weight" not in convs
    if f"{conv}.bias" in arrays:  # the bias rule: only before an instance norm
        if affine:
            raise ValueError(
                f"{norm} is an affine instance norm (mid-2017), which is not supported"
            )
        config["norm"] = "instance"
        stale = ("running_mean", "running_var", "num_batches_tracked")
        arrays = {name: a for name, a in arrays.items() if not name.endswith(stale)}
    else:
        config["norm"] = "batch" if affine else "none"
    net = build(config)
    counts = {k: a for k, a in net.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counts | arrays)  # batch norms of old files do not count batches
    except RuntimeError as e:
        problem = str(e).splitlines()[1].strip()
        raise ValueError(f"does not fit a {config['kind']} network: {problem}") from None
    return net


def load_networks(path, direction="AtoB"):
    """({name: network}, options of its training) from a checkpoint or run folder of ours; from an
    official .pth, whose one generator is taken for `direction` unless its name says which it is; or
    from a folder of official latest_net_*.pth."""
    official = {"G_A": "G_AB", "G_B": "G_BA", "D_A": "D_B", "D_B": "D_A"}  # theirs: ours
    alone = "G_AB" if direction == "AtoB" else "G_BA"
    files = {ours: Path(path, f"latest_net_{theirs}.pth") for theirs, ours in official.items()}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:  # one file: ours, of all networks, or an official one
        lone = Path(path, "latest_net_G.pth")
        file = lone if lone.is_file() else Path(common.last_checkpoint(path) or path)
        said = [ours for theirs, ours in official.items() if file.stem.endswith(f"net_{theirs}")]
        files = {said[0] if said else alone: file}
    nets, options = {}, {}
    for name, file in files.items():
        found, options = common.load_networks(file, "cyclegan", build, from_official)
        nets |= {name: found} if isinstance(found, nn.Module) else found
    for name, net in nets.items():
        if name.startswith("G") != ("out_channels" in net.config):
            raise UserError(f"--checkpoint {path}: a {net.config['kind']} network is no {name}.")
    return nets, options


# =============================================================================
# evaluate, translate, app
# =============================================================================


def open_domain(args, source, part, multiple=None):
    """The pictures of `part` (trainA, ...) as arrays. For training by --preprocess, with sides that
    are multiples of `multiple`; with None by the official test rule: all of it, at crop size."""
    mode, size = "resize_and_crop", args.crop_size
    if multiple:
        mode, size = args.preprocess, args.load_size
    prepare = functools.partial(common.resize_for, mode, size, args.crop_size, multiple)
    return common.ImageSet(common.subset(source, part), prepare, pil_mode(args, part), args.cache)


def pil_mode(args, part):
    """Pillow's mode of the pictures of a part or domain: trainA, A, ..."""
    return "L" if vars(args)[f"channels_{part[-1]}"] == 1 else "RGB"


def fixed_examples(args, source, n=6):
    """{"A": (real, true), "B": ...}: the first n test pictures of a domain (training pictures where
    there are none) and, of toy faces, their counterparts in the other domain (else None)."""
    examples = {}
    for d, other in ("AB", "BA"):
        part = f"test{d}" if common.has_subset(source, f"test{d}") else f"train{d}"
        data = open_domain(args, source, part)
        true = data.counterparts(other, pil_mode(args, other), n) if source.is_toy else None
        examples[d] = data.all(n), true
    return examples


def sample_sheet(G_AB, G_BA, examples, device):
    """{caption: images}: what the generators make of the examples, one in a row."""
    columns = {}
    for A, B, there, back in (("A", "B", G_AB, G_BA), ("B", "A", G_BA, G_AB)):
        columns[f"real {A}"], true = examples[A]
        columns[f"fake {B}"] = common.apply(there, columns[f"real {A}"], device)
        columns[f"rec {A}"] = common.apply(back, columns[f"fake {B}"], device)
        if true is not None:
            columns[f"true {B}"] = true
    return columns


def scores(G_AB, G_BA, args, source, device, inception=None, say=print):
    """Prints and returns the scores of both directions on the test pictures, {direction: scores} as
    of common.translation_scores. A generator that is None leaves out what needs it."""
    data = {d: open_domain(args, source, f"test{d}") for d in "AB"}
    result = {}
    for A, B, there, back in (("A", "B", G_AB, G_BA), ("B", "A", G_BA, G_AB)):
        if there is None:
            continue
        real, target = data[A].all(), data[B].all()
        fake = common.apply(there, real, device)
        rec = None if back is None else common.apply(back, fake, device)
        true = data[A].counterparts(B, pil_mode(args, B)) if source.is_toy else None
        row = common.translation_scores(real, fake, target, rec, true)
        if inception is not None and args.fid_real == "train+test":
            target = torch.cat([target, open_domain(args, source, f"train{B}").all()])
        if inception is not None and len(target) > 1 and len(fake) > 1:
            row["fid"] = common.fid_kid(target, fake, inception, args.fid_resize)
        result[f"{A}to{B}"] = row
        say(f"{A}to{B}: {common.describe_scores(row)}")
    return result


def evaluate(args):
    nets, saved = load_networks(args.checkpoint, args.direction)
    device = common.pick_device(args.device)
    G = {name: net.to(device) for name, net in nets.items() if name.startswith("G")}
    if not G:
        raise UserError(f"--checkpoint {args.checkpoint} holds no generator.")
    args.crop_size = args.size or saved.get("crop_size", CROP_SIZE)
    common.check_size(G, args.crop_size, "--size")
    for name, net in G.items():
        A, B = net.config["in_channels"], net.config["out_channels"]
        args.channels_A, args.channels_B = (A, B) if name == "G_AB" else (B, A)
    data = common.data_of(args, saved)
    source = common.open_data(data, size=args.size or saved.get("load_size", CROP_SIZE))
    for d in "AB":  # before anything is fetched
        common.subset(source, f"test{d}")
    inception = common.load_inception_or_explain(args.inception, device)
    print(
        "protocol: G(test pictures) against the test pictures of the other domain, FID and KID"
        f" against the {args.fid_real} pictures, all of them, each resized to"
        f" {args.crop_size}x{args.crop_size} (Pillow, bicubic)"
    )
    result = scores(G.get("G_AB"), G.get("G_BA"), args, source, device, inception)
    if args.out:
        common.write_json(args.out, result)


@torch.no_grad()
def translate_picture(G, img, device):
    """img: PIL picture of any size -> PIL picture, as large.

    Sides that are no multiple of what G needs are padded by repeating the border, and cut back.
    """
    W, H = img.size
    x = common.to_float(common.stack([common.pixels(img)]), device)
    least = max(8, G.multiple)  # with less an instance norm would see a single pixel
    right, below = (max(least, -(-side // G.multiple) * G.multiple) - side for side in (W, H))
    return common.to_picture(G(F.pad(x, (0, right, 0, below), mode="replicate"))[0, :, :H, :W])


def translate(args):
    nets, saved = load_networks(args.checkpoint, args.direction)
    name = "G_AB" if args.direction == "AtoB" else "G_BA"
    if name not in nets:
        raise UserError(f"--checkpoint {args.checkpoint} has no {name}, for {args.direction}.")
    device = common.pick_device(args.device)
    G = nets[name].to(device).eval()
    print(f"{args.direction} with {name} of {args.checkpoint}, trained on {saved.get('data', '?')}")

    def function(img):
        img = common.resized(img, args.size, args.width, args.square)
        return translate_picture(G, img, device)

    read_as = "L" if G.config["in_channels"] == 1 else "RGB"
    common.map_pictures(args.input, args.out, read_as, function)


def app(args):
    """A web page on which visitors have their pictures translated."""
    nets, saved = load_networks(args.checkpoint, args.direction or "AtoB")
    device, data = common.pick_device(args.device), Path(saved.get("data", "")).stem
    A, _, B = ("human2goblin" if data == "toy" else data).partition("2")
    A, B = (A, B) if A and B else ("domain A", "domain B")
    offered = []  # (where to, network)
    for direction, name, to in (("AtoB", "G_AB", B), ("BtoA", "G_BA", A)):
        if name in nets and args.direction in (None, direction):
            offered.append((to, nets[name].to(device).eval()))
    if not offered:
        raise UserError(f"--checkpoint {args.checkpoint} has no generator to translate with.")

    def function(img, domain, seed, reference):
        G = offered[domain][1]
        img = img.convert("L") if G.config["in_channels"] == 1 else img
        return translate_picture(G, img, device)

    title = f"CycleGAN {data}".strip()
    common.serve_page(args, title, function, domains=[to for to, G in offered])


# =============================================================================
# Command line
# =============================================================================


def main(argv=None):
    cli = common.CommandLine("cyclegan.py", __doc__, presets={"toy": TOY})
    count, above_0, from_0 = common.positive_int, common.positive, common.not_negative
    directions = dict(choices=("AtoB", "BtoA"), default="AtoB")

    p = cli.command("train", train, "train on unpaired pictures of two domains (default command)")
    common.add_train_options(p, batch=1, every="images", default_every=5000, gpu_precision="bf16")
    p.add("--direction", **directions, help="what an official .pth translates")
    p.add("--epochs", type=count, default=EPOCHS, help="length of the training")
    p.add("--epochs-decay", type=common.not_negative_int, help="the last, at a falling rate: half")
    p.add("--lr", type=above_0, default=LR, help="Adam's learning rate")
    p.add("--beta1", type=common.fraction, default=BETAS[0], help="Adam's first beta")
    p.add("--lr-policy", choices=("linear", "step", "cosine"), default="linear")
    p.add("--lr-decay-every", type=count, default=50, help="epochs, for --lr-policy step")
    p.add("--gan-mode", choices=("lsgan", "vanilla", "wgangp"), default="lsgan")
    p.add("--lambda-A", type=from_0, default=LAMBDA_CYC, help="weight of the cycle A -> B -> A")
    p.add("--lambda-B", type=from_0, default=LAMBDA_CYC, help="weight of the cycle B -> A -> B")
    p.add("--lambda-id", type=from_0, default=LAMBDA_ID, help="identity, relative to these; 0: off")
    p.add("--pool-size", type=common.not_negative_int, default=POOL_SIZE, help="past fakes for D")
    p.add("--G", choices=("resnet", "unet_256", "unet_128"), default="resnet")
    p.add("--blocks", type=count, help="residual blocks: 9 from 256 pixels, else 6")
    kinds = "a PatchGAN, basic or n_layers, or one of 1x1 patches"
    p.add("--D", choices=("basic", "n_layers", "pixel"), default="basic", help=kinds)
    p.add("--n-layers", type=count, default=3, help="of a PatchGAN; 1 to 5 see 16 to 286 pixels")
    p.add("--ngf", type=count, default=64, help="channels after G's first convolution")
    p.add("--ndf", type=count, default=64, help="channels after D's first convolution")
    p.add("--norm", choices=("instance", "batch", "none"), default="instance")
    p.add("--dropout", action="store_true", help="dropout 0.5 in G")
    p.add("--init-gain", type=above_0, default=INIT_STD, help="deviation of the initial weights")
    p.add("--channels-A", type=int, choices=(1, 3), default=3, help="1: greyscale")
    p.add("--channels-B", type=int, choices=(1, 3), default=3, help="1: greyscale")
    common.add_preprocess_options(p, LOAD_SIZE, CROP_SIZE)
    p.add("--keep-every", type=count, default=5, help="epochs between checkpoints that are kept")

    p = cli.command("translate", translate, "translate a picture, or all pictures below a folder")
    common.add_translate_options(p)
    p.add("--direction", **directions)

    p = cli.command("evaluate", evaluate, "FID, KID, fd8 and cycle error on the test pictures")
    common.add_evaluate_options(p, fid_resize="pytorch_fid")
    p.add("--direction", **directions, help="what an official .pth translates")
    p.add("--size", type=count, help="pixels: the training's crop size, else 256")
    p.add("--fid-real", choices=("test", "train+test"), default="test", help="reals for FID")

    p = cli.command("app", app, "a web page: choose a picture, translate it, save the result")
    common.add_app_options(p)
    p.add("--direction", choices=directions["choices"], help="default: all of the checkpoint")

    args = cli.parse(argv)
    if args.command == "train":
        if (args.epochs_decay or 0) > args.epochs:
            raise UserError(
                f"--epochs-decay {args.epochs_decay} is more than --epochs {args.epochs}."
            )
        if args.lambda_id and args.channels_A != args.channels_B:
            raise UserError("the identity loss needs equal channels: pass --lambda-id 0.")
        if args.gan_mode == "wgangp" and not args.preprocess.endswith("crop"):
            raise UserError("wgangp mixes real and fake pictures: take a --preprocess that crops.")
    args.function(args)


if __name__ == "__main__":
    sys.exit(common.exit_status(main))
