"""Speed and memory, measured here and now: `python tests/bench.py [PAPER ...]`, a row each.

At the papers' sizes on a GPU, at the toy presets' on a CPU (--full: the papers' there, too).
--rows 256 "batch 8": only the rows whose first cell holds one of these; --profile 20: on a GPU also
the kernels that take longest. The columns:

    images/s           over training steps one after another, regularizers at their intervals, the
                       average of G included, the loader and the log not: their batch stays on the
                       device; CycleGAN: pairs; generation: the network alone, StarGAN v2 and
                       SemanticStyleGAN: what their commands compute; all with TF32 and cuDNN's
                       search of algorithms as in training, which commands that generate leave off
    original, target   how many times the official code's images/s on one H200, and what is aimed
                       at; both stand in ROWS, and tell nothing about other GPUs
    ms                 of each phase, when it is waited for
    busy, kernels      the share of the time in which the GPU runs something, and kernels per call,
                       by torch.profiler after the timing
    GiB                peak of what torch holds of a GPU's memory after the first call, in which
                       cuDNN tries algorithms, some of which want much; on a CPU, of the process
                       so far; the official code's

StyleGAN has no original here: it should not be slower than stylegan2.py at the same size. A row
that fails says why, and the others go on.
"""

import argparse
import collections
import copy
import functools
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import cyclegan
import semantic_stylegan
import stargan_v2
import stylegan
import stylegan2
import stylegan2_ada

MIXED = "fp16+tf32"  # the default

# fmt: off
ROWS = {  # what, side, batch, precision; the official code's images/s and GiB, and the target
    "cyclegan": [
        ("decode JPEGs,", 256, 400, None), ("load from the cache,", 256, 400, None),
        ("draw toy faces,", 64, 400, None),
        ("train", 256, 1, "bf16", 11.6, 2.5, 35), ("train", 256, 4, "bf16", 40.2, 8.9, 120),
        ("train", 128, 1, "bf16", 17.5, None, 88),  # of 6 blocks
        ("train", 256, 1, "tf32"), ("train", 256, 4, "tf32"),
        ("translate", 256, 1, "tf32"), ("translate", 256, 4, "tf32"),
    ],
    "semantic_stylegan": [
        ("train", 256, 16, "tf32", 22.1, 18.1, 66), ("train", 512, 4, "tf32"),
        ("generate", 256, 16, "tf32"), ("generate", 512, 4, "tf32"),
    ],
    "stargan_v2": [
        ("train", 256, 8, "bf16", 15.1, 16.4, 45), ("train", 256, 8, "tf32"),
        ("translate by latents,", 256, 8, "tf32"), ("translate by references,", 256, 8, "tf32"),
        ("translate by latents,", 256, 1, "tf32"), ("translate by references,", 256, 1, "tf32"),
    ],
    "stylegan": [
        ("train", 64, 32, MIXED), ("train", 256, 32, MIXED), ("train", 512, 16, MIXED),
        ("train", 1024, 8, MIXED), ("train", 256, 32, "fp32"), ("generate", 256, 32, MIXED),
        ("train, half faded in,", 256, 32, MIXED), ("train at 8 px, of", 256, 32, MIXED),
    ],
    "stylegan2": [
        ("train", 64, 32, MIXED), ("train", 256, 32, "fp32", 76, 12.7, 114),
        ("train", 256, 32, MIXED, 174, 8.0, 522), ("train", 256, 64, MIXED, 204, 15.2, 612),
        ("train", 512, 16, MIXED, 56, 11.7, 168), ("train", 1024, 8, MIXED, 24.4, 11.4, 73),
        ("train", 1024, 16, MIXED, 26.4, 21.8, 79), ("generate", 256, 1, MIXED, 83, None, 500),
        ("generate", 256, 8, MIXED, 524, None, 2000),
        ("generate", 256, 32, MIXED, 1750, None, 3500),
        ("generate", 1024, 1, MIXED, 67, None, 300), ("generate", 1024, 8, MIXED, 269, None, 600),
        ("generate", 1024, 32, MIXED, 365, None, 730),
    ],
    "stylegan2_ada": [  # bgc at p = 0.3
        ("train", 64, 32, MIXED, 240, None, 1200), ("train", 256, 32, MIXED, 154, 8.2, 462),
        ("train", 256, 64, MIXED, 190, 16.2, 570), ("train", 512, 16, MIXED, 50.8, 12.4, 152),
        ("train", 1024, 8, MIXED, 22.5, 12.9, 67), ("train", 1024, 16, MIXED, 24.2, 24.9, 73),
    ],
}
# fmt: on


def rows_of(paper, full):
    """Its rows, at the sizes of the paper or of the toy preset."""
    if full:
        return ROWS[paper]
    loading = [row for row in ROWS[paper] if row[3] is None]
    kinds = dict.fromkeys(row[0] for row in ROWS[paper] if row[3])
    toy = OF[paper][0].TOY
    side = toy.get("size") or toy["crop_size"]
    return loading + [(what, side, toy["batch"], None) for what in kinds]


# What is measured. call(k): iteration k; the first has every phase, `cycle` of them as many of each
# as the intervals say; images: of a call; run, phases: of training, the stand-in, names in order.
Work = collections.namedtuple("Work", "call images run phases cycle", defaults=(None, (), 1))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Phases:
    """Stands in for common.Run in train_step, and can time each phase."""

    def __init__(self, *args, **options):
        self.run, self.spent = common.Run("bench", *args, "", **options), None

    def __getattr__(self, name):
        return getattr(self.run, name)

    def seconds(self, call):
        """Of each phase of call()."""
        wait(self.device)
        self.spent, self.last = [], time.perf_counter()
        call()
        spent, self.spent = self.spent, None
        return spent

    def graph(self, phase, *optimizers, key=None):
        function = self.run.graph(phase, *optimizers, key=key)

        def timed(*args):
            result = function(*args)
            if self.spent is not None:
                wait(self.device)
                now = time.perf_counter()
                self.spent.append(now - self.last)
                self.last = now
            return result

        return timed


def recorded(function, device):
    """function without gradients, as a CUDA graph where there are any."""
    return common.graph(torch.no_grad()(lambda x: function(x)), device)


def pictures(batch, size, run):
    """(batch, 3, size, size) in [-1, 1], in memory as the loader's."""
    images = torch.rand(batch, 3, size, size, device=run.device) * 2 - 1
    return images.contiguous(memory_format=run.order)


def no_labels(n):
    return None


def of_cyclegan(what, args, device):
    batch, size = args.batch, args.crop_size
    if not what.startswith("tra"):
        return of_loader(what, size, batch)
    run = Phases(args)
    nets = [n.to(device, memory_format=run.order) for n in cyclegan.new_networks(args).values()]
    x, y = pictures(batch, size, run), pictures(batch, size, run)
    if what == "translate":
        translate = recorded(nets[0].eval(), device)
        return Work(lambda k: translate(x), batch)
    opts = [run.adam(pair, args.lr, cyclegan.BETAS) for pair in (nets[:2], nets[2:])]
    pools = [cyclegan.ImagePool(args.pool_size) for _ in range(2)]

    def step(k):
        cyclegan.train_step(nets, opts, pools, x, y, args, run)

    return Work(step, batch, run, ("G", "D"))


@functools.cache
def jpegs(n, size):
    """A folder of n in trainA, of about as many bytes as photographs: noise of some coarseness."""
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "trainA").mkdir()
    for i in range(n):
        grain = Image.effect_noise((size // 2, size // 2), 40).convert("RGB")
        face = Image.blend(common.toy_face(i, i % 3, size), grain.resize((size, size)), 0.4)
        face.save(Path(folder.name) / f"trainA/{i:04}.jpg", quality=90)
    return folder


def of_loader(what, size, n):
    """One thread's work on n pictures, resized to 286 pixels and cropped to 256."""
    options = dict(preprocess="resize_and_crop", load_size=286, crop_size=256, channels_A=3)
    args = types.SimpleNamespace(cache="auto", **options)
    if what.startswith("draw"):
        return Work(lambda k: [common.toy_face(i, i % 3, size) for i in range(n)], n)

    def opened():
        source = common.open_data(jpegs(n, size).name)
        return cyclegan.open_domain(args, source, "trainA", multiple=4)

    def epoch(data):
        for i in range(n):
            rng = common.item_rng(0, 0, i)
            common.stack([common.crop_and_flip(data[i], args.crop_size, True, rng)])

    data = opened()
    return Work(lambda k: epoch(data if "cache" in what else opened()), n)


def of_stargan_v2(what, args, device):
    stargan_v2.fill_options(args, {})
    run, batch, domains = Phases(args), args.batch, 3
    nets = stargan_v2.new_networks(args, domains)
    nets = {k: net.to(device, memory_format=run.order) for k, net in nets.items()}
    trained, ema = list(nets.values()), [stargan_v2.average_of(nets[name]) for name in "GFE"]
    real, *refs = (pictures(batch, args.size, run) for _ in range(3))
    if what.startswith("translate"):  # as the commands and the web page do it
        (G, F, E), x = ema, common.to_uint8(real).cpu()

        def translate(k):
            if "latents" in what:
                s = stargan_v2.styles_of_latents(F, torch.randn(batch, args.z_dim), 0)
            else:
                s = stargan_v2.styles_of_references(E, x, 0)
            stargan_v2.translated(G, x, s)

        return Work(translate, batch)
    y, y_ref = torch.randint(domains, (2, batch), device=device)
    rates = (args.lr, args.lr_f, args.lr, args.lr)
    opts = [
        run.adam([net], lr, stargan_v2.BETAS, weight_decay=stargan_v2.WEIGHT_DECAY)
        for net, lr in zip(trained, rates, strict=True)
    ]

    def step(k):
        stargan_v2.train_step(trained, ema, opts, (real, *refs, y, y_ref), 1.0, args, run)

    names = ("D by latents", "D by references", "G, F, E by latents", "G by references")
    return Work(step, batch, run, names)


def of_semantic_stylegan(what, args, device):
    paper, batch, size = semantic_stylegan, args.batch, args.size
    paper.fill_options(args, {})
    run = Phases(args)
    regions = common.TOY_REGIONS if args.data == "toy" else paper.FACES
    nets = paper.new_networks(args, size, regions).values()
    G, D, G_ema = (net.to(device, memory_format=run.order) for net in nets)
    if what == "generate":
        ws = paper.ws_of(G_ema, range(batch))
        return Work(lambda k: paper.pictures(G_ema, ws), batch)
    of_G, of_D = paper.lazy(args.lr, args.pl_every), paper.lazy(args.lr, args.r1_every)
    parts = (([G.mapping], of_G), ([G.position, G.local, G.render], of_G), ([D], of_D))
    opts = [run.adam(nets, *rate) for nets, rate in parts]
    real = pictures(batch, size, run)
    labels = torch.randint(len(regions), (batch, size, size), device=device)
    seg = common.one_hot_seg(labels, len(regions), run.order)
    pl_mean = torch.zeros((), device=device)

    def step(k):
        paper.train_step(G, D, opts, pl_mean, real, seg, k, args, run, run.randn)
        paper.update_ema(G_ema, G, args.ema_beta)

    cycle = math.lcm(args.r1_every, args.pl_every)
    return Work(step, batch, run, ("D", "R1", "G", "pl"), cycle)


def generation(G, batch, device):
    z = torch.randn(batch, G.config["z_dim"], device=device)
    images = recorded(functools.partial(G.eval(), noise="const"), device)
    return Work(lambda k: images(z), batch)


def new_pair(paper, args, run, device):
    """G, D and the average of G."""
    nets = paper.new_networks(args, args.size, 0, run.half).values()
    G, D = (net.to(device, memory_format=run.order) for net in nets)
    return G, D, copy.deepcopy(G).eval().requires_grad_(False)


def of_stylegan(what, args, device):
    stylegan.fill_options(args, {})
    run = Phases(args, own_half=True)
    G, D, G_ema = new_pair(stylegan, args, run, device)
    if what == "generate":
        return generation(G, args.batch, device)
    adam = dict(betas=stylegan.BETAS, eps=stylegan.EPS, capturable=False)
    opts = [run.adam([net], args.lr, **adam) for net in (G, D)]
    lod = 0.5 if "faded" in what else math.log2(args.size) - 3 if "8 px" in what else 0.0
    for net in (G, D, G_ema):
        net.grow(lod)
    real = pictures(args.batch, args.size >> int(lod), run)
    beta = 0.5 ** (args.batch / (args.ema_kimg * 1000))

    def step(k):
        rest = (real, None, no_labels, beta, args, run, run.randn)
        stylegan.train_step(G, D, G_ema, opts, *rest)

    return Work(step, args.batch, run, ("D with R1", "G"))


def of_stylegan2(what, args, device, paper=stylegan2):
    ada = paper is stylegan2_ada
    paper.fill_options(args, {}, *((args.size, 1) if ada else ()))
    run = Phases(args, own_half=True)
    G, D, G_ema = new_pair(paper, args, run, device)
    if what == "generate":
        return generation(G, args.batch, device)
    everys = ((G, args.pl_every), (D, args.r1_every))
    opts = [paper.lazy_adam(run, net, args.lr, every) for net, every in everys]
    real, pl_mean = pictures(args.batch, args.size, run), torch.zeros((), device=device)
    state = (opts, pl_mean)
    if ada:
        T = paper.AugmentPipe(args.augpipe, args.ada_p).to(device)
        state = (T, None, *state, torch.zeros(2, dtype=torch.float64, device=device))
    beta = 0.5 ** (args.batch / (args.ema_kimg * 1000))

    def step(k):
        paper.train_step(G, D, *state, real, None, no_labels, k, args, run, run.randn)
        paper.update_ema(G_ema, G, beta)

    cycle = math.lcm(args.r1_every, args.pl_every)
    return Work(step, args.batch, run, ("G", "pl", "D", "R1"), cycle)


OF = {
    "cyclegan": (cyclegan, of_cyclegan),
    "semantic_stylegan": (semantic_stylegan, of_semantic_stylegan),
    "stargan_v2": (stargan_v2, of_stargan_v2),
    "stylegan": (stylegan, of_stylegan),
    "stylegan2": (stylegan2, of_stylegan2),
    "stylegan2_ada": (stylegan2_ada, functools.partial(of_stylegan2, paper=stylegan2_ada)),
}


def work_of(name, what, size, batch, precision, full, device):
    """Sets up a row: the options that the paper's train would get, then its function above. Data
    sets need not be there; their name chooses between the toy preset and the paper's numbers."""
    paper, function = OF[name]
    given = dict(data="afhq" if full else "toy", device=device, batch=batch)
    given["crop_size" if paper is cyclegan else "size"] = size
    given |= {"precision": precision} if precision else {}
    if full and paper in (stylegan, stylegan2):
        given["channel_base"] = 16384 if size <= 256 or paper is stylegan else 32768
    if paper in (stylegan, stylegan2, stylegan2_ada):
        given["channels"] = 3
    if paper is stylegan2_ada:
        given |= dict(aug="fixed", ada_p=0.3)
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    with mock.patch.object(paper, "train") as train:
        paper.main(argv)
    return function(what, train.call_args.args[0], device)


def timed(call, n, device):
    """Seconds of one of n calls that need not wait for one another."""
    wait(device)
    began = time.perf_counter()
    for k in range(n):
        call(k)
    wait(device)
    return (time.perf_counter() - began) / n


def traced(call, n, device):
    """What a GPU did in n calls: see `of_gpu`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed(call, n, device)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        return of_gpu(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])


def of_gpu(events):
    """Those on a GPU: [{"cat": kind, "name": ..., "ts": start, "dur": duration}], microseconds."""
    return [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def longest(events, n, count):
    """Lines about the `count` kernels that take longest: ms and launches of one of n calls."""
    spent = collections.defaultdict(list)
    for e in events:
        spent[e["name"]].append(e["dur"])
    rows = sorted(((sum(times), len(times), name) for name, times in spent.items()), reverse=True)
    return [f"{t / 1000 / n:9.3f} ms {k / n:8.1f}x  {name}" for t, k, name in rows[:count]]


def busy(events, n):
    """(seconds in which anything ran on a GPU, kernels), each per call, of n calls' events."""
    total, end = 0, -math.inf
    for start, duration in sorted((e["ts"], e["dur"]) for e in events):
        total += max(start + duration - max(start, end), 0)
        end = max(end, start + duration)
    return total / 1e6 / n, sum(e["cat"] == "kernel" for e in events) / n


def measured(work, device, repeats, profile):
    """The cells of a row but the first, without comparison: {column: number, or text of ms}, and,
    of a GPU, lines about so many kernels as `profile` says."""
    on_gpu = device.type == "cuda"
    timed(work.call, 1, device)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        timed(work.call, 1, device)  # which records CUDA graphs
    once = timed(work.call, 1, device)
    ms = []
    if work.run:
        rows = [work.run.seconds(lambda: work.call(0)) for _ in range(repeats)]
        ms = [1000 * statistics.median(phase) for phase in zip(*rows, strict=True)]
    n = work.cycle * math.ceil(max(repeats, 1 / once) / work.cycle)  # a second or more
    t = timed(work.call, n, device)
    names = work.phases if len(work.phases) == len(ms) else ["phase"] * len(ms)
    named = ", ".join(f"{name} {m:.1f}" for name, m in zip(names, ms, strict=True))
    found = {"images/s": work.images / t, "ms": named or f"{1000 * t:.2f}"}
    if on_gpu:
        n = max(work.cycle, 3)
        events = traced(work.call, n, device)
        spent, kernels = busy(events, n)
        found |= {"busy": spent / t, "kernels": kernels} if kernels else {}
        found |= {"longest": longest(events, n, profile)}
        return found | {"GiB": torch.cuda.max_memory_reserved() / 2**30}
    return found | {"GiB": common.memory_gb(device)}


COLUMNS = ("what", "images/s", "original", "target", "ms", "busy", "kernels", "GiB")


def row_text(what, found, original=()):
    """A row of the table. found: see `measured`; original: the last three numbers of a row in
    ROWS, or nothing."""
    cells, speed = {"what": what, "ms": found["ms"]}, found["images/s"]
    formats = {"images/s": "{:.1f}", "busy": "{:.0%}", "kernels": "{:.0f}", "GiB": "{:.2f}"}
    cells |= {name: text.format(found[name]) for name, text in formats.items() if name in found}
    if original:
        before, gib, target = original
        cells["original"] = f"x{speed / before:.2f}"
        cells["target"] = f"{'yes' if speed >= target else 'no'}, {target}"
        cells["GiB"] += f" ({gib})" if gib else ""
    return f"| {' | '.join(cells.get(name, '-') for name in COLUMNS)} |"


def chosen(options, full, on_gpu):
    """Of the rows that are asked for: the first cell, (paper, what, side, batch, precision), and
    what ROWS has to compare it with."""
    for paper in options.papers:
        for what, size, batch, own, *original in rows_of(paper, full):
            precision = options.precision or (own if on_gpu else None)
            name = f"{paper}: {what} {size} px, batch {batch}"
            name += f", {precision}" if precision and own else ""
            if any(text in name for text in options.rows):
                comparable = on_gpu and precision == own
                yield name, (paper, what, size, batch, precision), original if comparable else ()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("papers", nargs="*", default=list(ROWS), metavar="PAPER", help=", ".join(ROWS))
    p.add_argument("--rows", nargs="+", metavar="TEXT", default=[""], help="those with such a text")
    p.add_argument("--device")
    p.add_argument("--precision", help="instead of the rows' own")
    repeats = dict(type=common.positive_int, default=5)
    p.add_argument("--repeats", **repeats, help="at least so many calls are timed")
    p.add_argument("--profile", type=int, default=0, metavar="N", help="and N kernels of each row")
    p.add_argument("--full", action="store_true", help="the papers' sizes on a CPU, too")
    options = p.parse_args(argv)
    try:
        device = common.pick_device(options.device)
    except common.UserError as e:
        p.error(str(e))
    if unknown := set(options.papers) - set(ROWS):
        p.error(f"{unknown.pop()}: there are {', '.join(ROWS)}")
    on_gpu = device.type == "cuda"
    full = options.full or on_gpu
    rows = list(chosen(options, full, on_gpu))
    if not rows:
        p.error(f"--rows: none has such a text {'on a GPU' if on_gpu else 'on a CPU'}")
    threads = f"{torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if on_gpu else threads
    print(f"torch {torch.__version__}, {device} ({where})\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    failed = 0
    for name, row, original in rows:
        gc.collect()  # what the row before held
        if on_gpu:
            torch.cuda.empty_cache()
        try:
            work = work_of(*row, full, device)
            found = measured(work, device, options.repeats, options.profile)
            print(row_text(name, found, original), flush=True)
            for line in found.get("longest", ()):
                print(line, flush=True)
        except (RuntimeError, ValueError, common.UserError) as e:  # memory runs out, and the like
            failed += 1
            why = next(iter(str(e).splitlines()), type(e).__name__)
            print(f"| {name} | {why} |{' - |' * 6}", flush=True)
            if "CUDA graph" in why:  # see common.record
                return 1
        work = found = None
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
