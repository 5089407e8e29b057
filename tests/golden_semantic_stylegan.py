"""SemanticStyleGAN's vectors: local generators, fusion, networks, losses, a trajectory.

The format is that of CycleGAN's, so `case` and the formulas are test_golden's.
"""

import types
from unittest import mock

import numpy as np
import test_golden as golden  # which imports this file: its names are looked up when called
import torch
import torch.nn.functional as F
from eager import Eager

import ops_cuda as ops
import semantic_stylegan as ours

TABLE = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


def channel_table(spec):
    """The official one, {side: channels}, divided as the file says."""
    times = spec["kwargs"]["channel_multiplier"]
    table = {res: C if res <= 32 else C * times for res, C in TABLE.items()}
    return {res: C // spec["channel_table_divisor"] for res, C in table.items()}


def official_network(spec):
    """from_official on the formula weights, whose config must be what the official arguments say,
    with {official parameter: (our name, region)}."""
    arrays, kwargs = golden.weights(spec), spec["kwargs"]
    net = ours.from_official({k: torch.as_tensor(a) for k, a in arrays.items()}, kwargs)
    table, config = channel_table(spec), net.config
    assert all(table[res] == C for res, C in config["channels"].items()), config["channels"]
    if spec["class"] == "SemanticGenerator":
        wanted = dict(
            size=kwargs["size"], w_dim=kwargs["style_dim"],
            map_layers=kwargs["n_mlp"], coarse_size=kwargs["coarse_size"],
            min_size=kwargs["min_feat_size"], layers=kwargs["local_layers"],
            base_layers=kwargs["base_layers"], depth_layers=kwargs["depth_layers"],
            local_channels=kwargs["local_channel"], coarse_channels=kwargs["coarse_channel"],
            residual_refine=kwargs["residual_refine"], detach_texture=kwargs["detach_texture"],
            see_through=kwargs["transparent_dims"],
        )  # fmt: skip
    else:
        assert spec["class"] == "DualBranchDiscriminator"
        assert kwargs["img_size"] == kwargs["seg_size"] and kwargs["img_dim"] == 3
        wanted = dict(size=kwargs["img_size"], classes=kwargs["seg_dim"])
    assert wanted.items() <= config.items(), (wanted, config)
    assert len(config.get("regions", range(config.get("classes", 0)))) == kwargs["seg_dim"]
    net.names = {name: ours.our_name(name) for name in spec["param_names"]}
    assert {n for n, _ in net.names.values()} == {n for n, _ in net.named_parameters()}
    return golden.ready(net).train()


def part(t, name, region, official):
    """What of our tensor is an official one's: that of a region, in the official shape."""
    if region is not None:
        t = t[region - ("to_depth" in name)]
    return t.reshape(official) if official else t


def shapes(spec):
    return {e["name"]: e["shape"] for e in spec["entries"]}


def by_name(net, spec, tensor_of):
    """[norm of each official parameter's part of tensor_of(our name)]; -1 where that is None."""
    norms = []
    for official in spec["param_names"]:
        name, region = net.names[official]
        t = tensor_of(name)
        norms.append(-1.0 if t is None else part(t, name, region, None).detach().norm().item())
    return norms


def gradient(net):
    return lambda name: net.get_parameter(name).grad


def equal_grads(case, key, nets, label):
    net, spec = nets[label], case.meta["nets"][label]
    mine, norms = np.array(by_name(net, spec, gradient(net))), f"{key}/grad_norm/{label}"
    if norms in case:
        # No gradient is one of zeros: both occur, where our tensors hold all regions or two
        # read-outs.
        nothing = np.maximum(mine, 0) == 0
        mine[nothing] = np.minimum(case[norms], 0)[nothing]
        case.equal(norms, mine)
    for official in case.meta["full_grads"].get(label, ()):
        name, region = net.names[official]
        grad = net.get_parameter(name).grad
        if grad is not None:  # else the file must not hold it either: see all_compared
            mine = part(grad, name, region, shapes(spec)[official])
            case.equal(f"{key}/grad/{label}/{official}", mine)


def clear(*nets):
    for net in nets:
        net.zero_grad(set_to_none=True)


# ---- operators ----


def check_local_generator(case):
    """One region's generator: ours make all at once, so it is put beside another."""
    for label, spec in case.meta["nets"].items():
        if spec["class"] != "LocalGenerator":
            continue
        given = golden.inputs(case.meta[f"{label}_inputs"])
        kwargs, arrays = spec["kwargs"], golden.weights(spec)
        k = int(kwargs["use_depth"])  # region 0 has no depth, region 1 has
        local = ours.LocalGenerators(
            2, kwargs["in_channel"], kwargs["hidden_channel"], kwargs["out_channel"],
            kwargs["style_dim"], kwargs["n_layers"], kwargs["depth_layers"],
            kwargs["detach_texture"],
        )  # fmt: skip
        local = golden.ready(local)
        names = {
            name: ours.our_name(f"local_nets.{k}.{name}")[0].removeprefix("local.")
            for name in arrays
            if not name.endswith(".kernel")
        }
        with torch.no_grad():
            for name, own in names.items():
                slot = local.get_parameter(own)[k - own.startswith("to_depth")]
                slot.copy_(torch.as_tensor(arrays[name]).reshape(slot.shape))
        acts = []
        for layer in local.layers:
            layer.register_forward_hook(
                lambda m, x, y, k=k, acts=acts: acts.append(golden.stats(y[:, k]))
            )
        x, latent = given["x"].requires_grad_(), given["latent"].requires_grad_()
        codes = torch.stack([latent, latent], 1)
        h, depth = local(x.flatten(2)[:, None].repeat(1, 2, 1, 1), codes)
        only = torch.zeros_like(depth)
        only[:, k] = 1
        feat = local.features(h, only).view_as(given["cot_feat"])
        depth = depth[:, k : k + 1].reshape(given["cot_depth"].shape)
        case.equal(f"{label}/feat", feat)
        case.equal(f"{label}/depth", depth)
        for i, act in enumerate(acts):
            case.equal(f"{label}/act/linears.{i}", act)
        ((feat * given["cot_feat"]).sum() + (depth * given["cot_depth"]).sum()).backward()
        case.equal(f"{label}/grad_x", x.grad)
        case.equal(f"{label}/grad_latent", latent.grad)
        norms = [
            local.get_parameter(names[name]).grad[k - names[name].startswith("to_depth")].norm()
            for name in spec["param_names"]
        ]
        case.equal(f"{label}/grad_norm", torch.stack(norms))
    for label, spec in case.meta["nets"].items():
        if spec["class"] != "PositionEmbedding":
            continue
        side, kwargs = spec["hw"], spec["kwargs"]
        position = ours.FourierFeatures(kwargs["out_channels"], side, kwargs["N_freqs"])
        position = golden.ready(position)
        with torch.no_grad():
            weight = torch.as_tensor(golden.weights(spec)["weights"])
            position.weight.copy_(weight.reshape(position.weight.shape))
        case.equal(f"{label}/coords", position.features[:2].view(1, 2, side, side))
        case.equal(f"{label}/y", position().view(1, -1, side, side))


def check_composite(case):
    given, K = golden.inputs(case.meta["inputs"]), case.meta["seg_dim"]
    feats = torch.stack([given[f"feat/{k}"] for k in range(K)], 1)
    depth = torch.cat([given[f"depth/{k}"] for k in range(K)], 1)
    for i, spec in enumerate(case.meta["cases"]):
        shown = None if spec["mask"] is None else golden.ready(torch.tensor(spec["mask"]))
        m, a = ours.fusion_weights(depth, shown, spec["transparent_dims"])
        case.equal(f"{i}/feat", (a[:, :, None] * feats).sum(1))
        case.equal(f"{i}/seg", m)


# ---- networks ----


def compare_picture(case, key, picture, latent):
    """What a file holds of one generator call."""
    for name, t in dict(
        rgb=picture.img, seg=picture.seg, seg_coarse=picture.coarse, depths=picture.depth,
        latent=latent,
    ).items():  # fmt: skip
        for suffix, mine in (("", t), ("_stats", golden.stats(t))):
            if f"{key}/{name}{suffix}" in case:
                case.equal(f"{key}/{name}{suffix}", mine)


class Noise:
    """Recorded noise for the renderer, a map for each of its layers in turn."""

    def __init__(self, maps):
        self.maps = list(maps)

    def __call__(self, N, *shape):
        noise = self.maps.pop(0)
        assert noise.shape[1:] == shape
        return noise.expand(N, -1, -1, -1)


def noise_of(given):
    return Noise(given[f"noise/{i}"] for i in range(sum(k.startswith("noise/") for k in given)))


@torch.no_grad()
def check_generator(case):
    spec, given = case.meta["nets"]["generator"], golden.inputs(case.meta["inputs"])
    G, K = official_network(spec), spec["kwargs"]["seg_dim"]
    ws = G.mapping(given["z"])
    acts = record_acts(G, len(ws)) if any(key.startswith("act/") for key in case) else {}
    compare_picture(case, "z", G(given["z"], noise="const"), G.expand(ws))
    for key, act in acts.items():
        case.equal(key, act)
    case.equal("w", ws[:, 0])

    def compare(key, ws, **options):
        codes = G.expand(ws) if ws.shape[1] == G.num_ws else ws
        compare_picture(case, key, G.synthesis(ws, **{"noise": "const"} | options), codes)

    if "truncation" in case.meta:
        G.mapping.w_avg.copy_(given["truncation_latent"][0])
        compare("w_trunc", G.mapping(given["z"], case.meta["truncation"]))
    if "wplus" in given:
        case.equal("expand_latents", G.expand(given["wplus"]))
        compare("wplus", given["wplus"])
    if "wexp" in given:
        compare("wexp", given["wexp"])
    if "noise/0" in given:
        compare("noise_list", ws, noise=noise_of(given))
    for i, shown in enumerate(case.meta.get("composition_masks", ())):
        compare(f"cmask{i}", ws, shown=golden.ready(torch.tensor(shown)))
    if "z2" in given:
        ws2 = G.mapping(given["z2"])
        if "in/inject" in case:
            r = torch.as_tensor(case["in/inject"]).view(K, -1).T  # stored region by region
            compare("mix", ours.mixed_ws(ws, ws2, r))
        for region in case.meta.get("swap_regions", ()):
            r = torch.zeros(len(ws), K)
            r[:, region] = 2
            compare(f"swap{region}", ours.mixed_ws(ws, ws2, r))


def record_acts(G, n):
    """{key: summary}, filled by the next call of G: of its mapping, position features, each
    region's features, layers of the renderer and its two read-outs of every stage."""
    acts, K = {}, len(G.config["regions"])
    summary = golden.stats

    def mapping(m, x, ws):
        acts["act/style"] = summary(ws[:, 0])

    def position(m, x, y):
        acts["act/pos_embed"] = summary(y.expand(n, -1, -1))  # the official one repeats it

    def local(m, x, y):
        h, _ = y
        for k in range(K):
            only = torch.zeros(len(h), K, h.shape[3])
            only[:, k] = 1
            acts[f"act/local_nets.{k}"] = summary(m.features(h, only))

    G.mapping.register_forward_hook(mapping)
    G.position.register_forward_hook(position)
    G.local.register_forward_hook(local)

    def render(m, inputs, outputs):
        outs = None
        for i, heads in enumerate(zip(m.to_rgb, m.to_seg, strict=True)):
            x = features[2 * i + 1]
            new = [F.conv2d(x, head.weights()[0][:, :, None, None], head.bias[0]) for head in heads]
            if outs is not None:
                new = [y + ops.upsample2d(out, m.fir) for y, out in zip(new, outs, strict=True)]
            for name, y in zip(("rgb", "seg"), new, strict=True):
                acts[f"act/render_net.to_{name}s.{i}"] = summary(y)
            outs = new
            if m.residual_refine and x.shape[2] == m.coarse_size:
                outs[1] = outs[1] + inputs[1]

    features = {}
    for j, layer in enumerate(G.render.layers):

        def convolution(m, x, y, j=j):
            features[j], acts[f"act/render_net.convs.{j}"] = y, summary(y)

        layer.register_forward_hook(convolution)
    G.render.register_forward_hook(render)
    return acts


def check_discriminator(case):
    spec = case.meta["nets"]["discriminator"]
    for n in case.meta["batches"]:
        D, given = official_network(spec), golden.inputs(case.meta[f"b{n}_inputs"])
        img, seg = given["img"].requires_grad_(), given["seg"].requires_grad_()
        modules = {"final_conv": D.conv, "final_linear": D.out}
        for branch, net in (("img", D.of_img), ("seg", D.of_seg)):
            modules |= {f"convs_{branch}.{i}": layer for i, layer in enumerate(net)}
        for name, layer in modules.items():
            key = f"b{n}/act/{name}"

            def compare(m, x, y, key=key):
                if key not in case.compared:  # D(img) alone comes later
                    case.equal(key, golden.stats(y))

            layer.register_forward_hook(compare)
        logits = D(img, seg)
        case.equal(f"b{n}/logit", logits)
        (logits * given["cot"]).sum().backward()
        case.equal(f"b{n}/grad_img", img.grad)
        case.equal(f"b{n}/grad_img_stats", golden.stats(img.grad))
        case.equal(f"b{n}/grad_seg", seg.grad)
        case.equal(f"b{n}/grad_seg_stats", golden.stats(seg.grad))
        case.equal(f"b{n}/grad_norm", by_name(D, spec, gradient(D)))
        case.equal(f"b{n}/logit_img_only", D(img))


def check_full_channels(case):
    given = golden.inputs(case.meta["inputs"])
    G, D = (official_network(case.meta["nets"][name]) for name in ("generator", "discriminator"))
    with torch.no_grad():
        compare_picture(case, "z", G(given["z"], noise="const"), G.expand(G.mapping(given["z"])))
        case.equal("d/logit", D(given["img"], given["seg"]))
        case.equal("d/logit_img_only", D(given["img"]))


# ---- losses ----


def check_losses(case):
    meta, a = case.meta, case.meta["args"]
    given = golden.inputs(meta["inputs"])
    nets = {name: official_network(spec) for name, spec in meta["nets"].items()}
    G, D = nets["generator"], nets["discriminator"]
    reals = given["real_img"], given["real_mask"]

    def fakes():
        return G(given["z"], noise=noise_of(given))

    fake = fakes()
    real_logits, fake_logits = D(*reals), D(fake.img.detach(), fake.seg.detach())
    loss = (
        ours.logistic_loss(real_logits, True).mean() + ours.logistic_loss(fake_logits, False).mean()
    )
    loss.backward()
    case.equal("d/logistic", loss)
    case.equal("d/real_pred", real_logits)
    case.equal("d/fake_pred", fake_logits)
    equal_grads(case, "d", nets, "discriminator")

    clear(G, D)
    reals = [x.clone().requires_grad_(True) for x in reals]
    img, seg = (p.mean() for p in ours.r1_penalties(D(*reals), *reals))
    r1 = (a["r1_img"] / 2 * img + a["r1_seg"] / 2 * seg) * a["d_reg_every"]
    r1.backward()
    case.equal("r1/img", img)
    case.equal("r1/seg", seg)
    case.equal("r1/total", r1[None])
    equal_grads(case, "r1", nets, "discriminator")

    fake = fakes()
    nonsat = ours.logistic_loss(D(fake.img, fake.seg), True).mean()
    mask = ours.mask_loss(fake.seg, fake.coarse)
    case.equal("g/nonsat", nonsat)
    case.equal("g/mask", mask)
    case.equal("g/total", nonsat + a["lambda_mask"] * mask)
    for key, loss in (("g_adv", nonsat), ("g_mask", a["lambda_mask"] * mask)):
        clear(G, D)
        loss.backward(retain_graph=True)
        equal_grads(case, key, nets, "generator")

    clear(G, D)
    codes = G.expand(G.mapping(given["z_path"])).detach().requires_grad_(True)
    img = G.synthesis(codes, noise_of(given)).img
    lengths = ours.path_lengths(img, codes, given["pl_noise"])
    mean = a["mean_path_length"] + ours.PL_DECAY * (lengths.mean() - a["mean_path_length"])
    penalty = (lengths - mean).square().mean()
    weighted = a["path_regularize"] * a["g_reg_every"] * penalty
    weighted.backward()
    for name, value in dict(penalty=penalty, mean=mean, lengths=lengths, weighted=weighted).items():
        case.equal(f"path/{name}", value)
    equal_grads(case, "path", nets, "generator")


# ---- a trajectory ----


class Recorded(Eager):
    """Stands in for common.Run in train_step, with the draws that the file lists in order: whether
    to mix, one or two latents, which codes, then noise, which the renderer asks for itself."""

    def __init__(self, case, K):
        self.case, self.K = case, K
        self.log = [entry for entry in case.meta["draw_log"]]
        self.values = golden.inputs(
            dict(
                tag=case.meta["inputs_tag"],
                entries=[
                    dict(name=name, shape=shape, dist="normal", mul=1, add=0)
                    for name, shape in self.log
                    if isinstance(shape, list)
                ],
            )
        )
        self.uniform, self.inject = list(case["in/mix_u"]), list(case["in/inject"])
        self.second = None

    def next(self, kind):
        name, shape = self.log.pop(0)
        assert name.split("/")[0] == kind, (name, kind)
        return name, shape

    def randn(self, n, *shape):
        if len(shape) == 1:
            return self.latents(n, *shape)
        name, stored = self.next("pl_noise")
        assert stored == [n, *shape]
        return self.values[name]

    def latents(self, n, w_dim):
        if self.second is not None:
            z, self.second = self.second, None
            return z
        if self.case.meta["args"]["mixing"] > 0:  # else nothing is drawn
            self.next("mix_u")
        name, shape = self.next("z")
        z = self.values[name]
        assert z.shape[-2:] == (n, w_dim)
        self.mixes = len(shape) == 3
        z, self.second = z if self.mixes else (z, torch.zeros_like(z))
        return z

    def rand(self, n, *shape, shared=False):
        if shared:
            mixing = self.case.meta["args"]["mixing"]
            u = torch.tensor([self.uniform.pop(0) if mixing > 0 else 1.0])
            assert bool(u < self.case.meta["args"]["mixing"]) == self.mixes
            return u
        assert shape == (self.K,)
        if not self.mixes:
            return torch.rand(n, *shape)  # without effect
        _, count = self.next("inject")
        assert count == n * self.K
        taken, self.inject = self.inject[:count], self.inject[count:]
        return (torch.tensor(taken).view(self.K, n).T + 0.5) / 3

    def noise(self, *shape):
        name, stored = self.next("noise")
        assert stored == list(shape)
        return self.values[name]

    def mean(self, x):
        return x

    def backward(self, loss):
        loss.backward()

    def step(self, *opts):
        for opt in opts:
            for p in (p for group in opt.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            opt.step()
            opt.zero_grad(set_to_none=True)


def check_trajectory(case):
    meta, a = case.meta, case.meta["args"]
    nets = {name: official_network(spec) for name, spec in meta["nets"].items()}
    G, D = nets["generator"], nets["discriminator"]
    start = {
        label: {n: p.detach().clone() for n, p in net.named_parameters()}
        for label, net in nets.items()
    }
    G_ema = ours.average_of(G)
    args = types.SimpleNamespace(
        r1_img=a["r1_img"], r1_seg=a["r1_seg"], r1_every=a["d_reg_every"], mixing=a["mixing"],
        pl_weight=a["path_regularize"], pl_every=a["g_reg_every"], lambda_mask=a["lambda_mask"],
    )  # fmt: skip
    assert a["start_iter"] == 0
    opts = []
    rest = torch.nn.ModuleList([G.position, G.local, G.render])
    for net, every in (
        (G.mapping, a["g_reg_every"]),
        (rest, a["g_reg_every"]),
        (D, a["d_reg_every"]),
    ):
        lr, betas = ours.lazy(a["lr"], every)
        opts.append(torch.optim.Adam(net.parameters(), lr, betas))
    run, pl_mean = Recorded(case, a["seg_dim"]), torch.zeros(())
    rows, means, held = [], [], {}
    side = a["size"] // 4
    for step in range(a["iter"]):
        given = golden.inputs(
            dict(
                tag=meta["inputs_tag"],
                entries=[
                    dict(name=f"real_img/{step}", shape=[a["batch"], 3, a["size"], a["size"]],
                         dist="uniform", mul=2, add=-1),
                    dict(name=f"real_label/{step}", shape=[a["batch"], side, side],
                         dist="uniform", mul=1, add=0),
                ],
            )
        )  # fmt: skip
        labels = (given[f"real_label/{step}"] * a["seg_dim"]).floor().long()
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        seg = 2 * golden.ready(F.one_hot(labels, a["seg_dim"]).movedim(3, 1)) - 1
        shrink = a["path_batch_shrink"]
        if shrink == 2:  # the official default: ours must be right by itself
            shrink = ours.PL_SHRINK
        with mock.patch.object(ours, "PL_SHRINK", shrink):
            losses = ours.train_step(
                G, D, opts, pl_mean, given[f"real_img/{step}"], seg, step, args, run, run.noise
            )
        ours.update_ema(G_ema, G, ours.EMA_BETA)
        run.next("end_of_step")
        held |= {name: value.item() for name, value in losses.items()}
        rows.append(held.copy())
        if step % args.pl_every == 0:
            means.append(pl_mean.item())
    assert not run.log and not run.inject and not run.uniform
    ours_by_name = {
        "real_score": "D/real", "fake_score": "D/fake", "r1_img": "reg/r1_img",
        "r1_seg": "reg/r1_seg", "g": "G", "mask": "mask", "path": "reg/pl",
        "path_length": "reg/pl_length",
    }  # fmt: skip
    for k, name in enumerate(meta["loss_names"]):
        mine = [
            row["D_real"] + row["D_fake"] if name == "d" else row[ours_by_name[name]]
            for row in rows
        ]
        assert np.allclose(mine, case["losses"][:, k], rtol=1e-9, atol=0), name
    case.compared.add("losses")
    case.equal("mean_path_length", means)
    for label, net in nets.items():
        spec, params = meta["nets"][label], dict(net.named_parameters())
        case.equal(f"final/param_norm/{label}", by_name(net, spec, params.get), 1e-7)

        def moved(name, params=params, label=label):
            return params[name] - start[label][name]

        case.equal(f"final/update_norm/{label}", by_name(net, spec, moved), 1e-7)
        for official in meta["final_tensors"][label]:
            name, region = net.names[official]
            mine = part(params[name], name, region, shapes(spec)[official])
            case.equal(f"final/param/{label}/{official}", mine, 1e-7)
    averages, spec = dict(G_ema.named_parameters()), meta["nets"]["generator"]

    def moved(name):
        return averages[name] - start["generator"][name]

    case.equal("final/ema_update_norm/generator", by_name(G, spec, moved), 1e-7)
    for official in meta["final_tensors"]["generator"]:
        name, region = G.names[official]
        mine = part(averages[name], name, region, shapes(spec)[official])
        case.equal(f"final/ema/{official}", mine, 1e-7)


KINDS = {  # how a case's name begins: its check
    "local_generator": check_local_generator,
    "composite": check_composite,
    "generator": check_generator,
    "discriminator": check_discriminator,
    "full_channels": check_full_channels,
    "losses": check_losses,
    "trajectory": check_trajectory,
}


def check(case):
    next(function for kind, function in KINDS.items() if case.name.startswith(kind))(case)
