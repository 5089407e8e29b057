"""Speed and memory, measured here and now: `python tests/bench.py [PAPER ...]`, a table each.

Images/s, milliseconds per phase and peak memory, at the paper's sizes on a GPU, at the toy preset's
on a CPU (--full: the paper's there too). Each row is the median of --repeats runs. A row of a
paper is a function in ROWS.
"""

import argparse
import contextlib
import io
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import torch
from eager import Eager
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import cyclegan
import semantic_stylegan
import stargan_v2
import stylegan
import stylegan2
import stylegan2_ada


def seconds(function, device, repeats):
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Phases(Eager):
    """Stands in for common.Run in train_step, and times each phase by its step of optimisers."""

    def __init__(self, run, device):
        self.run, self.device, self.spent = run, device, []

    def __getattr__(self, name):
        return getattr(self.run, name)

    def begin(self):
        wait(self.device)
        self.spent, self.last = [], time.perf_counter()

    def step(self, *optimizers):
        self.run.step(*optimizers)
        wait(self.device)
        now = time.perf_counter()
        self.spent.append(now - self.last)
        self.last = now


def bench_cyclegan(options, device):
    """Rows: loader from JPEGs and from the cache; training, by phase; translation."""
    yield from bench_loader(options)
    full = options.full or device.type == "cuda"
    size, ngf, blocks = (
        (256, 64, 9) if full else (cyclegan.TOY["crop_size"], cyclegan.TOY["ngf"], 1)
    )
    for batch in (1, 2 if not full else 4):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            args = types.SimpleNamespace(
                batch=batch, device=str(device), precision=options.precision, seed=0, resume=None,
                out=folder, data="toy", gan_mode="lsgan", lambda_A=10.0, lambda_B=10.0,
                lambda_id=0.5, G="resnet", blocks=blocks, crop_size=size, D="basic", ngf=ngf,
                ndf=ngf, norm="instance", dropout=False, channels_A=3, channels_B=3, init_gain=0.02,
            )  # fmt: skip
            run = Phases(common.Run("cyclegan", args, cyclegan.__file__), device)
        channels_last = torch.channels_last
        nets = [
            n.to(device, memory_format=channels_last) for n in cyclegan.new_networks(args).values()
        ]
        opts = [run.adam(nets[:2], 2e-4, cyclegan.BETAS), run.adam(nets[2:], 2e-4, cyclegan.BETAS)]
        pools = [cyclegan.ImagePool(), cyclegan.ImagePool()]
        x, y = torch.rand(2, batch, size, size, 3, device=device).permute(0, 1, 4, 2, 3) * 2 - 1
        phases = []

        def step(nets=nets, opts=opts, pools=pools, x=x, y=y, args=args, run=run, phases=phases):
            run.begin()
            cyclegan.train_step(nets, opts, pools, x, y, args, run)
            phases.append(run.spent)

        t = seconds(step, device, options.repeats)
        G_ms, D_ms = (1000 * statistics.median(p[i] for p in phases[1:]) for i in (0, 1))
        name = f"train {size} px, ngf {ngf}, {blocks} blocks, batch {batch}, {run.precision}"
        yield name, batch / t, f"G {G_ms:.1f}, D {D_ms:.1f}", memory(device)

        G = nets[0].eval()
        with torch.no_grad():
            t = seconds(lambda G=G, x=x: G(x), device, options.repeats)
        name = f"translate {size} px, ngf {ngf}, {blocks} blocks, batch {batch}"
        yield name, batch / t, f"{1000 * t:.1f}", memory(device)


def options_of(paper, device, options, **preset):
    """The options that a paper's train would get; True: --NAME, False: --no-NAME."""
    preset |= dict(data="toy", device=device)
    preset |= {"precision": options.precision} if options.precision else {}
    named = {name.replace("_", "-"): value for name, value in preset.items()}
    flag = {True: "--{}", False: "--no-{}"}
    argv = [flag[v].format(k) if isinstance(v, bool) else f"--{k}={v}" for k, v in named.items()]
    with mock.patch.object(paper, "train") as train:
        paper.main(argv)
    return train.call_args.args[0]


def bench_stargan_v2(options, device):
    """Rows: training, by phase, of networks without masks; translation of a batch, and of one
    picture as the web page does it, with its style."""
    full = options.full or device.type == "cuda"
    preset = stargan_v2.SIZES | dict(preset="afhq", batch=8) if full else stargan_v2.TOY
    args = options_of(stargan_v2, device, options, **preset)
    stargan_v2.fill_options(args, {})
    run = Phases(common.Run("bench", args, ""), device)
    size, batch, domains = args.size, args.batch, 3
    channels_last = torch.channels_last
    nets = stargan_v2.new_networks(args, domains)
    nets = {k: net.to(device, memory_format=channels_last) for k, net in nets.items()}
    trained, ema = list(nets.values()), [stargan_v2.average_of(nets[name]) for name in "GFE"]
    rates = (args.lr, args.lr_f, args.lr, args.lr)
    opts = [
        run.adam([net], lr, stargan_v2.BETAS, weight_decay=stargan_v2.WEIGHT_DECAY)
        for net, lr in zip(trained, rates, strict=True)
    ]
    pictures = torch.rand(3, batch, size, size, args.channels, device=device) * 2 - 1
    pictures = pictures.permute(0, 1, 4, 2, 3)  # channels last, as the loader's
    y, y_ref = torch.randint(domains, (2, batch), device=device)
    phases = []

    def step():
        run.begin()
        stargan_v2.train_step(trained, ema, opts, (*pictures, y, y_ref), 1.0, args, run)
        phases.append(run.spent)

    t = seconds(step, device, options.repeats)
    medians = [1000 * statistics.median(spent) for spent in zip(*phases[1:], strict=True)]
    names = ("D by latents", "by references", "G, F, E by latents", "G by references")
    ms = ", ".join(f"{name} {m:.1f}" for name, m in zip(names, medians, strict=True))
    name = f"train {size} px, channel base {args.channel_base}, batch {batch}, {run.precision}"
    yield name, batch / t, ms, memory(device)

    G, F, E = ema
    x = common.to_uint8(pictures[0]).cpu()

    def by_latent(n):
        s = stargan_v2.styles_of_latents(F, torch.randn(n, args.z_dim), 0)
        stargan_v2.translated(G, x[:n], s)

    def by_reference(n):
        stargan_v2.translated(G, x[:n], stargan_v2.styles_of_references(E, x[:n], 0))

    for n in (batch, 1):
        for way, function in (("a latent", by_latent), ("a reference", by_reference)):
            t = seconds(lambda f=function, n=n: f(n), device, options.repeats)
            name = f"translate {size} px in the style of {way}, batch {n}"
            yield name, n / t, f"{1000 * t:.1f}", memory(device)


def bench_semantic_stylegan(options, device):
    """Rows: training, by phase, with both regularizers counted at their intervals; generation."""
    full = options.full or device.type == "cuda"
    for size, batch in [(256, 16), (512, 4)] if full else [(None, None)]:
        paper = semantic_stylegan.SHAPES | dict(coarse_size=64, min_size=16, size=size, batch=batch)
        preset = paper if full else semantic_stylegan.TOY
        args = options_of(semantic_stylegan, device, options, **preset)
        semantic_stylegan.fill_options(args, {})
        run, size, batch = Phases(common.Run("bench", args, ""), device), args.size, args.batch
        regions = semantic_stylegan.FACES if full else common.TOY_REGIONS
        nets = semantic_stylegan.new_networks(args, size, regions).values()
        G, D, G_ema = (net.to(device) for net in nets)
        parts = ([G.mapping], [G.position, G.local, G.render], [D])
        opts = [run.adam(part, args.lr, semantic_stylegan.BETAS) for part in parts]
        real = torch.rand(batch, 3, size, size, device=device) * 2 - 1
        labels = torch.randint(len(regions), (batch, size, size), device=device)
        seg = common.one_hot_seg(labels, len(regions))
        pl_mean, phases = torch.zeros((), device=device), []

        def step(nets=(G, D), rest=(opts, pl_mean, real, seg), args=args, run=run, phases=phases):
            run.begin()
            semantic_stylegan.train_step(*nets, *rest, 0, args, run, run.randn)
            phases.append(run.spent)

        seconds(step, device, options.repeats)
        d, r1, g, pl = (statistics.median(p) for p in zip(*phases[1:], strict=True))
        t = d + r1 / args.r1_every + g + pl / args.pl_every
        ms = f"D {1000 * d:.1f}, R1 {1000 * r1:.1f}, G {1000 * g:.1f}, pl {1000 * pl:.1f}"
        name = f"train {size} px, {len(regions)} regions, batch {batch}, {run.precision}"
        yield name, batch / t, ms, memory(device)
        ws = semantic_stylegan.ws_of(G_ema, range(batch))
        t = seconds(
            lambda G=G_ema, ws=ws: semantic_stylegan.pictures(G, ws), device, options.repeats
        )
        yield f"generate {size} px, batch {batch}", batch / t, f"{1000 * t:.1f}", memory(device)


def bench_stylegan(options, device):
    """Rows: training by phase, full-grown, in the middle of a fade, and at 8 pixels; generation."""
    full = options.full or device.type == "cuda"
    for size, batch in [(64, 32), (256, 32), (1024, 8)] if full else [(32, 32)]:
        preset = dict(channel_base=16384, channel_max=512, z_dim=512, w_dim=512, map_layers=8)
        preset |= dict(size=size, batch=batch) | ({} if full else stylegan.TOY)
        args = options_of(stylegan, device, options, **preset)
        stylegan.fill_options(args, {})
        run = common.Run("bench", args, "", own_half=True, precision="fp32")
        half = {"fp16": "float16", "bf16": "bfloat16"}.get(run.precision)
        nets = stylegan.new_networks(args, size, 0, half).values()
        G, D = (net.to(device, memory_format=torch.channels_last) for net in nets)
        opt_G, opt_D = (run.adam([net], args.lr, stylegan.BETAS) for net in (G, D))
        smallest = float(len(stylegan.resolutions(size)) - 2)  # 8 pixels
        for lod in (0.0, 0.5, smallest):
            res = size >> int(lod)
            x = torch.randn(batch, 3, res, res, device=device)
            x = x.to(memory_format=torch.channels_last)

            def phase(function, opt, *arguments, args=args, run=run):
                def step():
                    function(*arguments, args, run, run.randn)
                    run.step(opt)

                return seconds(step, device, options.repeats)

            for net in (G, D):
                net.grow(lod)
            D.requires_grad_(True)
            d = phase(stylegan.discriminator_phase, opt_D, G, D, x, None)
            D.requires_grad_(False)
            g = phase(stylegan.generator_phase, opt_G, G, D, batch, lambda n: None)
            name = f"train {size} px at lod {lod:g}, batch {batch}, {run.precision}"
            ms = f"D with R1 {1000 * d:.1f}, G {1000 * g:.1f}"
            yield name, batch / (d + g), ms, memory(device)
        G.grow(0.0)
        z, G = torch.randn(batch, args.z_dim), G.eval()
        t = seconds(lambda G=G, z=z, n=batch: common.sample(G, z, None, n), device, options.repeats)
        yield f"generate {size} px, batch {batch}", batch / t, f"{1000 * t:.1f}", memory(device)


def bench_stylegan2(options, device):
    """Rows: training, by phase, with both regularizers counted at their intervals; generation."""
    full = options.full or device.type == "cuda"
    for size, batch in [(256, 32), (1024, 8)] if full else [(32, 32)]:
        preset = dict(channel_base=32768, channel_max=512, z_dim=512, w_dim=512, map_layers=8)
        preset |= dict(size=size, batch=batch) | ({} if full else stylegan2.TOY)
        args = options_of(stylegan2, device, options, **preset)
        stylegan2.fill_options(args, {})
        yield from bench_stylegan2_at(stylegan2, args, device, options.repeats)


def bench_stylegan2_ada(options, device):
    """The same with every image that D sees augmented: bgc at p = 0.3."""
    full = options.full or device.type == "cuda"
    sizes = [(64, 32), (256, 32), (256, 64), (512, 16), (1024, 8), (1024, 16)]
    for size, batch in sizes if full else [(32, 32)]:
        preset = dict(channel_max=512, z_dim=512, w_dim=512) if full else dict(stylegan2_ada.TOY)
        preset |= dict(size=size, batch=batch, channels=3, ada_p=0.3)
        args = options_of(stylegan2_ada, device, options, **preset)
        stylegan2_ada.fill_options(args, {}, size, 1)
        yield from bench_stylegan2_at(stylegan2_ada, args, device, options.repeats)


def bench_stylegan2_at(paper, args, device, repeats):
    run, size, batch = common.Run("bench", args, "", own_half=True), args.size, args.batch
    half = {"fp16": "float16", "bf16": "bfloat16"}.get(run.precision)
    nets = paper.new_networks(args, size, 0, half).values()
    G, D = (net.to(device, memory_format=torch.channels_last) for net in nets)
    opt_G, opt_D = (paper.lazy_adam(run, net, args.lr, 4) for net in (G, D))
    pl_mean, x = torch.zeros((), device=device), torch.randn(batch, 3, size, size, device=device)
    ada = paper is stylegan2_ada
    T = [paper.AugmentPipe(args.augpipe, args.ada_p).to(device)] if ada else []
    S = [None] if ada else []
    rest = (lambda n: None, args, run, run.randn)

    def phase(function, *arguments, opt):
        return seconds(lambda: (function(*arguments), run.step(opt)), device, repeats)

    D.requires_grad_(False)
    g = phase(paper.generator_phase, G, D, *T, batch, *rest, opt=opt_G)
    pl = phase(paper.path_length_phase, G, pl_mean, batch, *rest, opt=opt_G)
    D.requires_grad_(True)
    d = phase(paper.discriminator_phase, G, D, *T, *S, x, None, *rest, opt=opt_D)
    r1 = phase(paper.r1_phase, D, *T, x, None, args, run, opt=opt_D)
    t = g + pl / args.pl_every + d + r1 / args.r1_every
    ms = f"G {1000 * g:.1f}, pl {1000 * pl:.1f}, D {1000 * d:.1f}, R1 {1000 * r1:.1f}"
    name = f"train {size} px, channel base {args.channel_base}, batch {batch}, {run.precision}"
    yield f"{name}{', bgc at p 0.3' * ada}", batch / t, ms, memory(device)
    z, G = torch.randn(batch, args.z_dim), G.eval()
    t = seconds(lambda: common.sample(G, z, None, batch), device, repeats)
    yield f"generate {size} px, batch {batch}", batch / t, f"{1000 * t:.1f}", memory(device)


def bench_loader(options, n=400, size=256):
    """Images/s of one thread: 256 px JPEGs decoded and resized to 286; the same from memory."""
    preset = types.SimpleNamespace(
        preprocess="resize_and_crop", load_size=286, crop_size=256, G="resnet",
        channels_A=3, cache="auto",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "trainA").mkdir()
        for i in range(n):  # noise of some coarseness: about as many bytes as a photograph
            grain = Image.effect_noise((size // 2, size // 2), 40).convert("RGB")
            face = Image.blend(common.toy_face(i, i % 3, size), grain.resize((size, size)), 0.4)
            face.save(Path(folder) / f"trainA/{i:04}.jpg", quality=90)
        files = list((Path(folder) / "trainA").iterdir())
        kb = sum(f.stat().st_size for f in files) / n / 1000
        source = common.open_data(folder)

        def epoch(data):
            for i in range(n):
                rng = common.item_rng(0, 0, i)
                common.stack([common.crop_and_flip(data[i], preset.crop_size, True, rng)])

        def from_files():
            epoch(cyclegan.open_domain(preset, source, "trainA", multiple=4))

        cpu = torch.device("cpu")
        t = seconds(from_files, cpu, options.repeats)
        yield (
            f"loader, one thread, {size} px JPEGs of {kb:.0f} kB",
            n / t,
            f"{1000 * t / n:.2f}",
            "",
        )
        data = cyclegan.open_domain(preset, source, "trainA", multiple=4)
        t = seconds(lambda: epoch(data), cpu, options.repeats)
        yield "loader, one thread, from the cache", n / t, f"{1000 * t / n:.3f}", ""
    t = seconds(lambda: [common.toy_face(i, i % 3, 64) for i in range(n)], cpu, options.repeats)
    yield "toy faces drawn, one thread, 64 px", n / t, f"{1000 * t / n:.2f}", ""


def memory(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"


ROWS = {
    "cyclegan": bench_cyclegan,
    "semantic_stylegan": bench_semantic_stylegan,
    "stargan_v2": bench_stargan_v2,
    "stylegan": bench_stylegan,
    "stylegan2": bench_stylegan2,
    "stylegan2_ada": bench_stylegan2_ada,
}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("papers", nargs="*", default=list(ROWS), metavar="PAPER", help=", ".join(ROWS))
    p.add_argument("--device")
    p.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"))
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--full", action="store_true", help="the paper's sizes on a CPU, too")
    options = p.parse_args()
    device = common.pick_device(options.device)
    threads = f"{torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    print(f"torch {torch.__version__}, {device} ({where})\n")
    print("| what | images/s | ms | peak memory |\n| --- | --- | --- | --- |")
    for paper in options.papers:
        for name, speed, ms, gb in ROWS[paper](options, device):
            print(f"| {paper}: {name} | {speed:.1f} | {ms} | {gb} |", flush=True)


if __name__ == "__main__":
    main()
