"""The vectors of StyleGAN2, its operators and StyleGAN2-ADA, for test_golden.py."""

import copy
import json
import re
import types
import zlib

import numpy as np
import pytest
import torch
from eager import Eager

import ops_cuda as ops
import stylegan2
import stylegan2_ada

BUFFERS = re.compile(r"(.*\.)?(noise_const|w_avg)$")
# What a leaky ReLU that rounding flips may move, in float32: gradients of networks, losses.
FLIPPED = re.compile(
    r"gradnorm|grad\.|dparam\.|report\.(?!Loss\.(scores|signs))|(dws|dimg|dimages|ddlatents|dz|dc|loss)$"
)


def formula(name, shape, scale, offset, salt):
    """A tensor of the weight formula: standard normal draws from a seed made of its name."""
    rng = np.random.RandomState(zlib.crc32((salt + name).encode()))
    return np.asarray(offset + scale * rng.standard_normal(tuple(shape)), np.float32)


PAPERS = {"stylegan2": stylegan2, "stylegan2_ada": stylegan2_ada}


class Vectors:
    """One file and how closely it must be met: in float64, or, on a GPU, in float32."""

    def __init__(self, path, device="cpu", dtype=torch.float64, impl=None):
        self.z, self.paper = np.load(path), PAPERS.get(path.parent.name)
        self.meta = json.loads(str(self.z["meta"]))
        self.device, self.dtype, self.impl = device, dtype, impl

    def cases(self):
        assert self.meta["cases"]
        for name, case in self.meta["cases"].items():
            yield Case(self, name, case)


class Case:
    def __init__(self, file, name, case):
        self.file, self.name, self.kind, self.args = file, name, case["kind"], case["args"]
        self.paper, self.ada = file.paper, file.paper is stylegan2_ada
        self.outputs, self.compared = case["outputs"], set()
        salt = file.meta["salt"]
        self.weights = {
            tag: {e[0]: torch.from_numpy(formula(*e, salt)) for e in file.meta["weights"][wid]}
            for tag, wid in case["weights"].items()
        }
        self.inputs = {k: self.fetch(spec) for k, spec in case["inputs"].items()}
        for k, kinds in case.get("draws", {}).items():
            sizes = [int(np.prod(shape)) for _, shape in kinds]
            parts = self.inputs[k].split(sizes)
            draws = [p.reshape(shape) for p, (_, shape) in zip(parts, kinds, strict=True)]
            self.inputs[k] = list(zip([kind for kind, _ in kinds], draws, strict=True))

    def set(self, module, name, value, default):
        """Sets a constant of ours for this case, but where the file has the official default: there
        ours must be right by itself."""
        if value != default:
            self.patch.setattr(module, name, value)

    def fetch(self, spec):
        if isinstance(spec, str):
            array = self.file.z[spec]
        else:
            seed, shape, scale = spec["randn"]
            array = (np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32)
        return self.to(torch.from_numpy(np.asarray(array)))

    def to(self, t):
        return t.to(self.file.device, self.file.dtype)

    def get(self, name):
        return self.inputs.get(name)

    def equal(self, name, mine, rel=1e-6):
        """|mine - stored| <= rel of the largest; float32: the looser rule of the vectors. What the
        case does not hold is not compared; see finish."""
        if name not in self.outputs:
            return
        out = self.outputs[name]
        stored = torch.from_numpy(np.asarray(self.file.z[out["key"]])).double()
        mine = torch.as_tensor(mine).detach().double().cpu()
        assert mine.shape == stored.shape, f"{self.name}/{name}: {mine.shape} not {stored.shape}"
        allowed = rel * out["absmax"] + 1e-30
        worst = (mine - stored).abs().max().item() if stored.numel() else 0.0
        if self.file.dtype == torch.float32:
            allowed = max(20 * out["f32_err"], 1e-5 * out["absmax"])
            if self.kind == "augment":
                allowed = 1e-4 * out["absmax"]
            elif FLIPPED.match(name):
                worst, allowed = (mine - stored).norm().item(), 1e-3 * stored.norm().item() + 1e-9
        assert worst <= allowed, f"{self.name}/{name}: off by {worst:.3g}, allowed {allowed:.3g}"
        self.compared.add(name)

    def finish(self):
        missing = set(self.outputs) - self.compared
        assert self.outputs and not missing, f"{self.name}: not compared: {sorted(missing)}"

    def network(self, tag, net, prefix=""):
        """Fills net with the formula weights; every one of its tensors must be listed."""
        state = {k.removeprefix(prefix): self.to(v) for k, v in self.weights[tag].items()}
        net = net.to(self.file.device, self.file.dtype)
        net.load_state_dict(state)
        return net

    def order(self, tag):
        return [k for k in self.weights[tag] if not BUFFERS.match(k)]

    def gradients(self, net, tag, full, prefix="dparam."):
        params = dict(net.named_parameters())
        grads = [params[k].grad for k in self.order(tag)]
        norms = [0.0 if g is None else g.norm().item() for g in grads]
        self.equal("gradnorm", torch.tensor(norms, dtype=torch.float64))
        for name in full or ():
            p = params[name]
            self.equal(prefix + name, torch.zeros_like(p) if p.grad is None else p.grad)


def grads(y, inputs, **options):
    """{name: gradient of y}, zero where there is none."""
    if not inputs:
        return {}
    found = torch.autograd.grad(y, list(inputs.values()), allow_unused=True, **options)
    return {
        k: torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(inputs.items(), found, strict=True)
    }


def check_op(case, function, first, radius, second):
    """y; gradients `first` of sum(y * v); gradients `second` of the squared norm of d<radius>."""
    given = {k: t.requires_grad_(k != "f") for k, t in case.inputs.items()}
    v = given["v"]
    y = function({k: t for k, t in given.items() if k != "v"})
    case.equal("y", y)
    d = grads((y * v).sum(), {k: given[k] for k in first if k in given}, create_graph=True)
    for k, g in d.items():
        case.equal(f"d{k}", g)
    r = d[radius].square().sum()
    wanted = {k: given[k] for k in second if f"g2{k}" in case.outputs}
    zero = not r.requires_grad
    found = {k: torch.zeros_like(t) for k, t in wanted.items()} if zero else grads(r, wanted)
    for k, g in found.items():
        case.equal(f"g2{k}", g)


def setup_filter(case):
    args = dict(case.args)
    f = ops.setup_filter(
        case.get("f"), args.pop("normalize", True), args.pop("flip_filter", False),
        args.pop("gain", 1), args.pop("separable", None),
    )  # fmt: skip
    assert not args
    case.equal("f_out", f)


def upfirdn2d(case):
    args = dict(case.args)
    function = getattr(ops, args.pop("func", "upfirdn2d"))
    impl = case.file.impl

    def run(t):
        return function(t["x"], t.get("f"), **args, impl=impl)

    check_op(case, run, ["x"], "x", ["v"])


def bias_act(case):
    def run(t):
        return ops.bias_act(t["x"], t.get("b"), **case.args, impl=case.file.impl)

    check_op(case, run, ["x", "b"], "x", ["x", "b", "v"])


def conv2d_resample(case):
    def run(t):
        return ops.conv2d_resample(t["x"], t["w"], t.get("f"), **case.args, impl=case.file.impl)

    check_op(case, run, ["x", "w"], "x", ["w", "v"])


def modulated_conv2d(case):
    args = dict(case.args)
    args.pop("fused_modconv", None)  # the two ways of the original coincide
    pad = args.pop("padding", 0)

    def run(t):
        x, demodulation = case.paper.modulated_conv2d(
            t["x"], t["weight"], t["styles"], fir=t.get("f"), pad=pad, **args
        )
        return ops.fused_act(x, demodulation, t.get("noise"), impl=case.file.impl)

    first = ["x", "weight", "styles", "noise"]
    check_op(case, run, first, "styles", ["x", "weight", "styles", "v"])


MODULES = {
    "FullyConnectedLayer": lambda paper, a: paper.Linear(
        a["in_features"], a["out_features"], a.get("activation", "linear"),
        a.get("lr_multiplier", 1), 0.0 if a.get("bias", True) else None,
    ),
    "Conv2dLayer": lambda paper, a: paper.Conv2d(
        a["in_channels"], a["out_channels"], a["kernel_size"], a.get("activation", "linear"),
        a.get("up", 1), a.get("down", 1), a.get("conv_clamp"), a.get("bias", True),
        a.get("resample_filter", paper.FIR),
    ),
    "SynthesisLayer": lambda paper, a: paper.SynthesisLayer(
        a["in_channels"], a["out_channels"], a["w_dim"], a["resolution"], a.get("up", 1),
        a.get("use_noise", True), a.get("conv_clamp"),
    ),
    "ToRGBLayer": lambda paper, a: paper.ToRGB(
        a["in_channels"], a["out_channels"], a["w_dim"], a.get("conv_clamp")
    ),
}  # fmt: skip


def module(case):
    cls, ctor, forward = case.args["cls"], case.args["ctor"], dict(case.args.get("forward", {}))
    forward.pop("fused_modconv", None)
    if "noise_mode" in forward:
        forward["noise"] = forward.pop("noise_mode")
    given = {k: case.inputs[k].requires_grad_() for k in case.args["order"]}
    if cls == "MinibatchStdLayer":
        params = {}
        y = case.paper.minibatch_std(given["x"], ctor["group_size"], ctor.get("num_channels", 1))
    else:
        net = case.network("net", MODULES[cls](case.paper, ctor))
        params = dict(net.named_parameters())
        y = net(*given.values(), **forward)
    case.equal("y", y)
    d = grads((y * case.inputs["v"]).sum(), given | params)
    for k, g in d.items():
        case.equal(("dparam." if k in params else "d") + k, g)


def mapping(case):
    ctor, forward = dict(case.args["ctor"]), dict(case.args.get("forward", {}))
    lr_mul = ctor.pop("lr_multiplier", 0.01)
    w_avg_beta = {k: ctor[k] for k in ("w_avg_beta",) if k in ctor}
    ctor = but_plain(ctor) | w_avg_beta | dict(lr_mul=lr_mul)
    net = case.paper.MappingNetwork(**ctor)
    net = case.network("net", net).train(case.args.get("train", False))
    z, c = (None if t is None else t.requires_grad_() for t in (case.get("z"), case.get("c")))
    psi, cutoff = forward.pop("truncation_psi", 1), forward.pop("truncation_cutoff", None)
    update = not forward.pop("skip_w_avg_update", False)
    assert not forward, forward
    ws = net(z, c, psi, cutoff, update_avg=update)
    case.equal("ws", ws)
    (ws * case.inputs["v"]).sum().backward()
    for name, t in (("dz", z), ("dc", c)):
        if t is not None:
            case.equal(name, torch.zeros_like(t) if t.grad is None else t.grad)
    case.gradients(net, "net", case.args.get("full"))
    if "w_avg_after" in case.outputs:  # D's mapping has none
        case.equal("w_avg_after", net.w_avg)


PLAIN = dict(activation="lrelu", resample_filter=[1, 3, 3, 1], lr_multiplier=0.01)
PLAIN |= dict(embed_features=None, layer_features=None, w_avg_beta=0.995)


def but_plain(kwargs):
    """Official arguments without those that have the value that all of ours have."""
    free = ("freeze_layers", "fp16_channels_last", "use_fp16")  # of no consequence here
    return {k: v for k, v in kwargs.items() if k not in free and not (k in PLAIN and PLAIN[k] == v)}


def synthesis_options(kwargs):
    """Our constructor arguments for the official ones."""
    names = {"num_fp16_res": "half_res", "conv_clamp": "clamp"}
    return {names.get(k, k): v for k, v in but_plain(kwargs).items()}


def generator_of(paper, a):
    a = dict(a)
    mapping = but_plain(a.pop("mapping_kwargs", {}))
    assert set(mapping) <= {"num_layers"}, mapping
    synthesis = synthesis_options(a.pop("synthesis_kwargs", {}))
    return paper.Generator(**a, map_layers=mapping.get("num_layers", 8), **synthesis)


def discriminator_of(paper, a):
    a = synthesis_options(a)
    names = {"mbstd_group_size": "mbstd_group", "mbstd_num_channels": "mbstd_features"}
    mapping, epilogue, block = (
        but_plain(a.pop(f"{part}_kwargs", {})) for part in ("mapping", "epilogue", "block")
    )
    assert set(mapping) <= {"num_layers"} and not block, (mapping, block)
    a |= {names[k]: v for k, v in epilogue.items()}
    return paper.Discriminator(**a, map_layers=mapping.get("num_layers", 8))


def synthesis(case):
    forward = case.args["forward"]
    net = case.paper.SynthesisNetwork(**synthesis_options(case.args["ctor"]))
    net = case.network("net", net).eval()
    ws = case.inputs["ws"].requires_grad_()
    img = net(ws, forward.get("noise_mode", "random"))
    case.equal("img", img)
    (img * case.inputs["v"]).sum().backward()
    case.equal("dws", ws.grad)
    case.gradients(net, "net", case.args.get("full"))


@torch.no_grad()
def generator(case):
    forward = case.args["forward"]
    G = case.network("G", generator_of(case.paper, case.args["ctor"])).eval()
    psi, cutoff = forward.get("truncation_psi", 1), forward.get("truncation_cutoff")
    case.equal("ws", G.mapping(case.inputs["z"], case.get("c"), psi, cutoff))
    img = G(case.inputs["z"], case.get("c"), psi, cutoff, forward.get("noise_mode", "random"))
    case.equal("img", img)


def discriminator(case):
    D = case.network("D", discriminator_of(case.paper, case.args["ctor"])).eval()
    img = case.inputs["img"].requires_grad_()
    logits = D(img, case.get("c"))
    case.equal("logits", logits)
    (logits * case.inputs["v"]).sum().backward()
    case.equal("dimg", img.grad)
    case.gradients(D, "D", case.args.get("full"))


# ---- losses and training ----


class Recorded(Eager):
    """Stands in for common.Run: recorded draws in; per-sample values and gradients out."""

    def __init__(self, case, L, batch_gpu=None):
        self.case, self.L, self.batch_gpu = case, L, batch_gpu
        self.draws = list(case.inputs.get("loss_draws", []))
        self.z = None  # the latents of the phase, not yet handed out
        self.gain = 1  # of the losses, but for those of regularizers

    def rand(self, n, shared):
        (_, cutoff), (_, gate) = self.draws.pop(0), self.draws.pop(0)
        return torch.stack([gate, (cutoff - 0.5) / (self.L - 1)])

    def randn(self, *shape):
        if self.z is not None:
            z, self.z = self.z, None
            if len(z) != shape[0]:  # path lengths are of the first part of every round
                part = shape[0] * (self.batch_gpu or len(z)) // len(z)
                z = torch.cat([piece[:part] for piece in z.split(self.batch_gpu or len(z))])
            return z
        kind, draw = self.draws.pop(0)
        assert kind == "randn" and tuple(draw.shape) == shape
        return draw

    def mean(self, x):
        return x

    def backward(self, loss):
        (self.gain * loss).backward()

    def step(self, opt):
        params = [p for group in opt.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.nan_to_num(p.grad, 0, 1e5, -1e5, out=p.grad)
        opt.step()
        opt.zero_grad(set_to_none=True)


class Watch:
    """What the loss functions see and return, in the order in which they are called."""

    def __init__(self, paper, patch):
        self.logits, self.r1, self.scores, self.lengths = {True: [], False: []}, [], [], []
        logistic, r1, path = paper.logistic_loss, paper.r1_penalty, paper.path_lengths

        def logistic_loss(logits, real):
            self.logits[real].append(logits.detach())
            return logistic(logits, real)

        def r1_penalty(logits, real):
            self.scores.append(logits.detach())
            self.r1.append(r1(logits, real))
            return self.r1[-1]

        def path_lengths(*args):
            self.lengths.append(path(*args))
            return self.lengths[-1]

        patch.setattr(paper, "logistic_loss", logistic_loss)
        patch.setattr(paper, "r1_penalty", r1_penalty)
        patch.setattr(paper, "path_lengths", path_lengths)


def options(case, a, loss):
    """The options of the training that the phases read; its constants are set."""
    paper = case.paper
    case.set(paper, "PL_DECAY", loss.get("pl_decay", 0.01), 0.01)
    case.set(paper, "PL_SHRINK", loss.get("pl_batch_shrink", 2), 2)
    return types.SimpleNamespace(
        mixing=loss.get("style_mixing_prob", 0.9), r1_gamma=loss.get("r1_gamma", 10),
        pl_weight=loss.get("pl_weight", paper.PL_WEIGHT), pl_every=a.get("G_reg_interval", 1),
        r1_every=a.get("D_reg_interval", 1), batch_gpu=a.get("batch_gpu"),
        batch=a.get("batch_size"), bcr_weight=0,
        aug="fixed" if a.get("ada_target") is None else "ada",
        ada_target=a.get("ada_target"), ada_every=a.get("ada_interval", 4),
        ada_kimg=a.get("ada_kimg"), ada_cap=None,
    )  # fmt: skip


def networks(case):
    G = case.network("G", generator_of(case.paper, case.args["G"])).train()
    D = case.network("D", discriminator_of(case.paper, case.args["D"])).train()
    return G, D


def some_labels(c, n, batch_gpu=None):
    """Labels of n fakes; path lengths are of the first part of every round."""
    if c is None or not c.shape[-1]:
        return None
    pieces = c.split(batch_gpu or len(c))
    return torch.cat([piece[: n * len(piece) // len(c)] for piece in pieces])


def loss(case):
    """One phase: per-sample values, gradients of the network being trained."""
    a, phase = case.args, case.args["phase"]
    args = options(case, {}, a["loss_kwargs"])
    args.pl_every = args.r1_every = a["gain"]
    G, D = networks(case)
    run = Recorded(case, G.num_ws)
    pl_mean = case.to(torch.tensor(float(a.get("pl_mean", 0))))
    real, c = case.inputs["real_img"], case.get("real_c")
    c = c if c is not None and c.shape[1] else None
    n, noise = len(real), a["noise_mode"]
    pipes = (recorded_pipe(case),) if case.ada else ()
    both = (*pipes, None) if case.ada else ()

    def sample_c(n):
        return some_labels(case.get("gen_c"), n)

    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(case.paper, patch)
        if phase in ("Gmain", "Gboth"):
            D.requires_grad_(False)
            run.gain, run.z = a["gain"], case.inputs["gen_z"]
            case.paper.generator_phase(G, D, *pipes, n, sample_c, args, run, noise)
            report(case, scores_fake=watch.logits[True][0])
            case.equal("report.Loss.G.loss", softplus(-watch.logits[True][0]))
        if phase in ("Greg", "Gboth") and args.pl_weight:
            run.gain, run.z = 1, case.inputs["gen_z"]
            case.paper.path_length_phase(G, pl_mean, n, sample_c, args, run, noise)
            penalty = (watch.lengths[0] - pl_mean).square()
            case.equal("report.Loss.pl_penalty", penalty)
            case.equal("report.Loss.G.reg", args.pl_weight * penalty)
        if phase in ("Dmain", "Dboth"):
            run.gain, run.z = a["gain"], case.inputs["gen_z"]
            case.paper.discriminator_phase(G, D, *both, real, c, sample_c, args, run, noise)
            fake, on_real = watch.logits[False][0], watch.logits[True][0]
            report(case, scores_fake=fake, scores_real=on_real)
            case.equal("report.Loss.D.loss", softplus(fake) + softplus(-on_real))
        if phase in ("Dreg", "Dboth") and args.r1_gamma:
            run.gain, draws = 1, case.get("aug_draws") or []
            if phase == "Dboth":  # R1 of the very real images that were augmented
                for T in pipes:
                    T.source.draws = draws[len(draws) // 2 :]
            case.paper.r1_phase(D, *pipes, real, c, args, run)
            case.equal("report.Loss.r1_penalty", watch.r1[0])
            case.equal("report.Loss.D.reg", args.r1_gamma / 2 * watch.r1[0])
            report(case, scores_real=watch.scores[0])
    assert not run.draws and not any(T.source.draws for T in pipes)
    trained, tag = (G, "G") if phase[0] == "G" else (D, "D")
    case.gradients(trained, tag, a.get("full"), prefix="grad.")
    case.equal("pl_mean_after", pl_mean)
    case.equal("w_avg_after", G.mapping.w_avg)


def softplus(x):
    return torch.nn.functional.softplus(x)


def report(case, **scores):
    for name, value in scores.items():
        kind = name.removeprefix("scores_")
        case.equal(f"report.Loss.scores.{kind}", value)
        case.equal(f"report.Loss.signs.{kind}", value.sign())


def trajectory(case):
    """Eight steps of train_step with recorded draws; losses at 1e-5, movements at 1e-5."""
    a = case.args
    args = options(case, a, a["loss_kwargs"])
    G, D = networks(case)
    G_ema = copy.deepcopy(G).eval()
    start = {tag: copy.deepcopy(net) for tag, net in (("G", G), ("D", D))}
    run = Recorded(case, G.num_ws, a["batch_gpu"])
    run.adam = lambda nets, lr, betas: torch.optim.Adam(nets[0].parameters(), lr, betas, a["eps"])
    case.set(case.paper, "BETAS", tuple(a["betas"]), (0.0, 0.99))
    opts = (
        case.paper.lazy_adam(run, G, a["lr"], args.pl_every),
        case.paper.lazy_adam(run, D, a["lr"], args.r1_every),
    )
    pl_mean, means, averages, images = case.to(torch.zeros(())), [], [], 0
    N = a["batch_size"]
    pipes, signs, p, mean_signs = (), case.to(torch.zeros(2)), [], []
    if case.ada:
        pipes = (recorded_pipe(case), None)
    for it in range(a["steps"]):
        z = list(case.inputs["gen_z"][it])
        real = case.inputs["reals"][it] / 127.5 - 1
        real_c = case.get("real_c")
        real_c = real_c[it] if real_c is not None and real_c.shape[-1] else None
        phases = iter([0, *([1] if args.pl_weight and it % args.pl_every == 0 else []), 2])
        phase_now = []
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(case.paper, patch)
            for name in ("generator_phase", "path_length_phase", "discriminator_phase"):
                phase = getattr(case.paper, name)

                def with_z(*args, phase=phase, phases=phases, z=z, phase_now=phase_now):
                    phase_now.append(next(phases))
                    run.z = z[phase_now[-1]]
                    return phase(*args)

                patch.setattr(case.paper, name, with_z)

            def sample_c(n, it=it, phase_now=phase_now):
                c = case.get("gen_c")
                return None if c is None else some_labels(c[it][phase_now[-1]], n, args.batch_gpu)

            before = pl_mean.clone()
            more = (signs,) if case.ada else ()
            stats = case.paper.train_step(
                G, D, *pipes, opts, pl_mean, *more, real, real_c, sample_c, it, args, run,
                a["noise_mode"],
            )  # fmt: skip
            p.append(pipes[0].p.clone() if case.ada else torch.zeros(()))
            mean_signs += [stats["ada/r_t"]] if "ada/r_t" in stats else []
        rounds = N // a["batch_gpu"]
        on_G, on_real = watch.logits[True][:rounds], watch.logits[True][rounds:]
        step = {"Gmain.Loss.scores.fake": cat(on_G), "Gmain.Loss.G.loss": softplus(-cat(on_G))}
        if watch.lengths:
            penalties, mean = [], before
            for lengths in watch.lengths:
                mean = mean.lerp(lengths.mean(), case.paper.PL_DECAY)
                penalties.append((lengths - mean).square())
            step["Greg.Loss.pl_penalty"] = cat(penalties)
            step["Greg.Loss.G.reg"] = args.pl_weight * cat(penalties)
        fake = cat(watch.logits[False])
        step |= {"Dmain.Loss.scores.fake": fake, "Dmain.Loss.scores.real": cat(on_real)}
        step["Dmain.Loss.D.loss"] = softplus(fake) + softplus(-cat(on_real))
        if watch.r1:
            step["Dreg.Loss.scores.real"] = cat(watch.scores)
            step["Dreg.Loss.r1_penalty"] = cat(watch.r1)
            step["Dreg.Loss.D.reg"] = args.r1_gamma / 2 * cat(watch.r1)
        for name, value in step.items():
            case.equal(f"step{it}.{name}", value, 1e-5)
        half_life = a["ema_kimg"] * 1000
        if a["ema_rampup"] is not None:
            half_life = min(half_life, images * a["ema_rampup"])
        case.paper.update_ema(G_ema, G, 0.5 ** (N / max(half_life, 1e-8)))
        images += N
        means.append(pl_mean.clone())
        averages.append(G.mapping.w_avg.clone())
    assert not run.draws and not any(T.source.draws for T in pipes if T)
    case.equal("pl_mean", torch.stack(means), 1e-5)
    case.equal("w_avg", torch.stack(averages), 1e-5)
    case.equal("augment_p", torch.stack(p))
    case.equal("ada_mean_sign", torch.stack(mean_signs) if mean_signs else torch.zeros(0))
    for tag, net in (("G", G), ("D", D), ("G_ema", G_ema)):
        first, weights = start[tag[0]], tag[0]
        now, then = dict(net.named_parameters()), dict(first.named_parameters())
        moves = {k: now[k].detach() - then[k].detach() for k in case.order(weights)}
        case.equal(f"{tag}.norm", torch.stack([now[k].norm() for k in moves]), 1e-5)
        case.equal(f"{tag}.move_norm", torch.stack([m.norm() for m in moves.values()]), 1e-5)
        case.equal(f"{tag}.move_sum", torch.stack([m.sum() for m in moves.values()]), 1e-5)
        for name in a["full"][weights]:
            case.equal(f"{tag}.move.{name}", moves[name], 1e-5)


def cat(pieces):
    return torch.cat([p.detach().flatten() for p in pieces])


# ---- StyleGAN2-ADA ----


class Source:
    """Recorded draws of an AugmentPipe, or those of a percentile: the same for every sample."""

    def __init__(self, case, draws, percentile=None):
        self.draws, self.percentile, self.noise = list(draws), percentile, case.get("noise")
        self.device = case.file.device

    def take(self, kinds, shape):
        kind, draw = self.draws.pop(0)
        assert kind in kinds and draw.numel() == int(np.prod(shape)), (kind, draw.shape, shape)
        return draw.reshape(shape)

    def rand(self, *shape):
        if self.percentile is None:
            return self.take(("rand", "uniform"), shape)
        return torch.full(shape, self.percentile, device=self.device)

    def randn(self, *shape):
        if self.percentile is None:
            return self.take(("randn",), shape)
        if len(shape) == 4:
            return self.noise
        return torch.full(shape, 2 * self.percentile - 1, device=self.device).erfinv()

    def maximum(self, x):
        return x


class PercentilePipe(stylegan2_ada.AugmentPipe):
    """The official percentiles, which are taken whatever p is, with two exceptions: no second turn,
    and sigma of |N| itself."""

    turns = 0

    def pick(self, name, value, identity, draws, share=1.0):
        if name == "rotate":
            self.turns += 1
            value = value if self.turns == 1 else torch.zeros_like(value)
        if name == "noise":
            sigma = torch.full_like(value, draws.percentile).erfinv()
            value = sigma * self.strengths["noise_std"]
        value = value.to(self.p.dtype)
        return value if share > 0 else torch.full_like(value, identity)


def pipe_of(case, kind, ctor, p):
    multipliers = {k: v for k, v in ctor.items() if k not in stylegan2_ada.STRENGTHS}
    strengths = {k: v for k, v in ctor.items() if k in stylegan2_ada.STRENGTHS}
    return kind(multipliers, p, **strengths).to(case.file.device, case.file.dtype)


def recorded_pipe(case):
    """The pipe of a loss or a trajectory, which takes its draws from the case."""
    a = case.args
    T = pipe_of(case, stylegan2_ada.AugmentPipe, a.get("augment", {}), a.get("augment_p", 0))
    T.source, forward = Source(case, case.get("aug_draws") or []), T.forward
    T.forward = lambda img, run: forward(img, T.source)
    return T


def augment(case):
    a = case.args
    percentile = a.get("debug_percentile")
    kind = stylegan2_ada.AugmentPipe if percentile is None else PercentilePipe
    T = pipe_of(case, kind, a["ctor"], a["p"])
    source = Source(case, case.get("draws") or [], percentile)
    x, v = case.inputs["x"].requires_grad_(), case.inputs["v"].requires_grad_()
    y = T(x, source)
    assert not source.draws
    case.equal("y", y, 1e-5)
    (dx,) = torch.autograd.grad((y * v).sum(), x, create_graph=True)
    case.equal("dx", dx, 1e-5)
    if "g2v" in case.outputs:
        case.equal("g2v", *torch.autograd.grad(dx.square().sum(), v), 1e-5)


def augment_buffers(case):
    T = pipe_of(case, stylegan2_ada.AugmentPipe, {}, 0)
    case.equal("Hz_geom", T.lowpass)
    case.equal("Hz_fbank", T.bands)


def ada(case):
    """p after each change, from the signs that train_step would have added up."""
    a, signs = case.args, case.inputs["signs"]
    p, ps, means, total = torch.tensor(float(a["p_init"])), [], [], torch.zeros(2)
    for k, n in enumerate(case.inputs["counts"].long().tolist()):
        now, signs = signs[:n], signs[n:]
        total += torch.tensor([now.sum(), n])
        if (k + 1) % a["ada_interval"] == 0:
            r_t, images = total[0] / total[1], a["batch_size"] * a["ada_interval"]
            stylegan2_ada.adapt(p, r_t, a["ada_target"], images, a["ada_kimg"])
            total = torch.zeros(2)
            ps.append(p.clone()), means.append(r_t)
    assert not len(signs)
    case.equal("p", torch.stack(ps) if ps else torch.zeros(0))
    case.equal("mean_sign", torch.stack(means) if means else torch.zeros(0))


KINDS = {
    f.__name__: f
    for f in (
        setup_filter, upfirdn2d, bias_act, conv2d_resample, modulated_conv2d, module, mapping,
        synthesis, generator, discriminator, loss, trajectory, augment, augment_buffers, ada,
    )
}  # fmt: skip


def check(path, **how):
    for case in Vectors(path, **how).cases():
        with pytest.MonkeyPatch.context() as case.patch:
            KINDS[case.kind](case)
        case.finish()
