"""common.graph, and every paper's training steps through it: on a CPU with an emulation of CUDA's
graphs (emulated_graph.py), on a GPU with the real ones."""

import contextlib
import gc
import os
import types
from pathlib import Path

import emulated_graph
import pytest
import torch
from commands import ROOT, no_stray_files, one_thread  # noqa: F401

import common
import cyclegan
import ops_cuda as ops
import semantic_stylegan
import stargan_v2
import stylegan
import stylegan2
import stylegan2_ada

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def warp_without_a_look_at_reach(x, G, reach, f):
    """As on a GPU."""
    return ops.warp_ref(x, G, reach, f, max(x.shape[2:]))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=needs_gpu)])
def device(request, monkeypatch):
    """A device on which common.graph records."""
    if request.param == "emulated":
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(common, "side_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(common, "record", emulated_graph.record)
        monkeypatch.setattr(ops, "warp", warp_without_a_look_at_reach)
        of_a_gpu, gpu = common.graph, torch.device("cuda")
        monkeypatch.setattr(
            common, "graph", lambda function, device, *rest: of_a_gpu(function, gpu, *rest)
        )
    return torch.device("cpu" if request.param == "emulated" else "cuda")


# ---- common.graph ----


def test_a_graph_is_the_function_itself_on_a_cpu():
    assert common.graph(max, torch.device("cpu")) is max


def test_a_recording_computes_with_new_inputs_on_held_state(device):
    total, calls = torch.zeros(3, device=device), []

    def add(x, name, factor):
        calls.append(name)
        total.add_(x * factor)
        return total * 2

    added, graphed = torch.zeros(3, device=device), common.graph(add, device)
    for k in range(10):
        x = torch.full((3,), float(k), device=device)
        added += 2 * x
        torch.testing.assert_close(graphed(x, "x", 2), 2 * added)
    torch.testing.assert_close(total, added)
    assert len(calls) == 2


def test_state_that_is_passed_in_is_changed_in_place(device):
    mean, graphed = torch.zeros((), device=device), None
    graphed = common.graph(lambda mean, x: mean.lerp_(x, 0.5), device)
    for _ in range(8):
        graphed(mean, torch.ones((), device=device))
    assert mean.item() == pytest.approx(1 - 0.5**8)


def test_what_a_recording_cannot_follow_is_refused(device):
    graphed = common.graph(lambda x, factor: x * factor, device)
    x = torch.ones(2, device=device)
    for _ in range(2):
        graphed(x, 2)
    with pytest.raises(ValueError, match="cannot change 2 into 3"):
        graphed(x, 3)
    with pytest.raises(ValueError, match="cannot change"):
        graphed(torch.ones(1, device=device), 2)  # which copy_ would spread over both
    with pytest.raises(ValueError, match="cannot change"):
        graphed(x.double(), 2)


def test_draws_go_on_from_one_replay_to_the_next(device):
    generator = torch.Generator(device).manual_seed(0)

    def draw():
        own = torch.rand(4, generator=generator, device=device)
        return torch.stack([own, torch.rand(4, device=device)])

    def draws(function):
        generator.manual_seed(0)
        torch.manual_seed(0)
        return torch.stack([function().clone() for _ in range(8)])

    eager = draws(draw)
    assert torch.equal(draws(common.graph(draw, device, [generator])), eager)


@pytest.mark.parametrize(
    "phase",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0]).to(x.device),
    ],
)
def test_a_phase_that_waits_for_the_gpu_cannot_be_recorded(device, phase):
    if device.type == "cuda":
        pytest.skip("torch is unusable after a recording that failed")
    graphed = common.graph(phase, device)
    graphed(torch.ones(2, device=device))
    with pytest.raises(RuntimeError, match="in a CUDA graph"):
        graphed(torch.ones(2, device=device))


def test_a_network_that_finds_landmarks_can_be_recorded(device):
    fan = common.FAN().to(device)
    graphed = common.graph(fan.masks, device)
    for x in torch.rand(3, 1, 3, 32, 32, device=device) * 2 - 1:
        torch.testing.assert_close(graphed(x), fan.masks(x))


def test_batches_leave_what_they_are_given_as_it_was(device):
    x, few = torch.randn(11, 3, device=device), torch.randn(1, 3, device=device).expand(11, 3)
    for given in (x, few):
        before = given.clone()
        found = common.in_batches(lambda x, c: x * 2, device, 2, given, None)
        assert torch.equal(found, 2 * before.cpu()) and torch.equal(given, before)


# ---- the papers ----

TINY = {  # enough steps for every phase to be replayed some times
    stylegan: "--data faces/trainA --size 8 --channel-base 32 --channel-max 8 --z-dim 8 --w-dim 8"
    " --map-layers 2 --batch 100 --mbstd-group 2 --kimg 3 --every 3 --start-size 4 --train-kimg 1"
    " --fade-kimg 1 --batches=",
    stylegan2: "--data faces/trainA --size 8 --channel-base 32 --channel-max 8 --z-dim 8 --w-dim 8"
    " --map-layers 2 --batch 20 --mbstd-group 2 --kimg 1 --every 1 --pl-every 2 --r1-every 3",
    stylegan2_ada: "--data faces/trainA --size 8 --channel-base 32 --channel-max 8 --z-dim 8"
    " --w-dim 8 --map-layers 2 --batch 20 --mbstd-group 2 --kimg 1 --every 1 --pl-every 2"
    " --r1-every 3 --ada-kimg 1",
    cyclegan: "--data faces --load-size 36 --crop-size 32 --ngf 4 --ndf 4 --blocks 1 --D n_layers"
    " --n-layers 1 --batch 2 --epochs 1 --pool-size 6 --dropout",
    stargan_v2: "--data faces --size 32 --channel-base 128 --channel-max 8 --hidden-dim 8 --z-dim 4"
    " --style-dim 4 --batch 2 --iters 12 --every 12",
    semantic_stylegan: "--size 16 --coarse-size 8 --min-size 4 --layers 3 --base-layers 1"
    " --depth-layers 2 --local-channels 8 --coarse-channels 16 --channel-base 128 --w-dim 8"
    " --map-layers 2 --batch 4 --iters 24 --every 24 --pl-every 2 --r1-every 3 --noise-inputs",
}
MORE = [
    (cyclegan, "--gan-mode wgangp --lambda-id 0"),
    (cyclegan, "--gan-mode vanilla --norm batch --pool-size 0"),
    (cyclegan, "--precision bf16"),
    (stargan_v2, "--size 64 --w-hpf 1"),
    (stargan_v2, "--precision bf16"),
    (stylegan, "--loss wgan-gp --batch-gpu 50"),
]


def test_steps_are_not_recorded_where_pictures_differ_in_size(device):
    for k in range(8):
        for domain, part in enumerate(("d/trainA", "d/trainB")):
            Path(part).mkdir(parents=True, exist_ok=True)
            common.toy_face(k, domain, 32 + 4 * k).save(f"{part}/{k}.png")
    options = "--data d --preprocess none --batch 1 --pool-size 0 --ngf 4 --ndf 4 --blocks 1"
    cyclegan.main(f"{options} --epochs 1 --device {device.type} --out r".split())


PHASES = {
    cyclegan: 2, stargan_v2: 3, semantic_stylegan: 4, stylegan2: 4, stylegan2_ada: 4,
    stylegan: 6,  # before, in and after a fade
}  # fmt: skip


def draw_faces():
    for domain, part in enumerate(("faces/trainA", "faces/trainB")):
        Path(part).mkdir(parents=True)
        for k in range(24):
            common.toy_face(k, domain, 36).save(f"{part}/{k}.png")


def reflected(self, x):
    """nn.ReflectionPad2d, whose backward pass adds in any order on a GPU."""
    pad = self.padding[0]
    for d in (2, 3):
        first, last = x.narrow(d, 1, pad), x.narrow(d, x.shape[d] - 1 - pad, pad)
        x = torch.cat([first.flip(d), x, last.flip(d)], d)
    return x


def quick_masks(fan, x):
    """In the place of FAN's, which take seconds."""
    return common.landmark_masks(x.mean(1, keepdim=True).sigmoid() * fan.l0.weight[:98, 0].exp())


@pytest.mark.parametrize(("paper", "options"), [*((paper, "") for paper in TINY), *MORE])
def test_recorded_steps_give_the_weights_of_eager_ones(
    paper, options, device, monkeypatch, tmp_path
):
    monkeypatch.setattr(common.Run, "log_every", 1)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(common, "load_fan", lambda path: common.FAN())
    monkeypatch.setattr(common.FAN, "masks", quick_masks)
    if device.type == "cuda":
        monkeypatch.setattr(torch.nn.ReflectionPad2d, "forward", reflected)
    draw_faces()
    replays, record = [], common.record

    def counted(*args):
        replay = record(*args)
        replays.append(0)
        place = len(replays) - 1

        def counted_replay():
            replays[place] += 1
            replay()

        return counted_replay

    monkeypatch.setattr(common, "record", counted)
    states = []
    for graphs in ("off", "on"):
        monkeypatch.setenv("GAN_GRAPHS", graphs)
        out = str(tmp_path / graphs)
        tiny = f"{TINY[paper]} --precision fp32 {options} --device {device.type} --out {out}"
        paper.main(tiny.split())
        states.append(torch.load(next(Path(out).glob("*/checkpoint.pt")), weights_only=True))
        assert bool(replays) == (graphs == "on")
    assert sum(n >= 5 for n in replays) >= PHASES[paper]
    eager, recorded = states
    for name, net in eager["nets"].items():
        for key, wanted in net.items():
            found = recorded["nets"][name][key]
            if device.type == "cpu":
                assert torch.equal(found, wanted), f"{name}.{key}"
            else:
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    for name, pool in eager["ranks"][0]["pools"].items():
        for key, wanted in pool.items():
            found = recorded["ranks"][0]["pools"][name][key]
            assert device.type != "cpu" or found is wanted or torch.equal(found, wanted)
    assert all(map(torch.equal, recorded["ranks"][0]["rng"][:2], eager["ranks"][0]["rng"][:2]))


def test_recorded_steps_of_an_adaptation_without_labels(device, monkeypatch, tmp_path):
    options = f"{TINY[semantic_stylegan]} --device {device.type} --out {tmp_path / 'first'}".split()
    semantic_stylegan.main([*options, "--iters", "1"])
    (first,) = Path(tmp_path / "first").iterdir()
    options = f"--adapt --freeze --lambda-mask 1 --mixing 0.5 --checkpoint {first}"
    test_recorded_steps_give_the_weights_of_eager_ones(
        semantic_stylegan, options, device, monkeypatch, tmp_path
    )


# ---- memory ----


def memory(device):
    """Bytes that this process holds, on the GPU or in main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved() + torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_gpu
def test_no_more_than_a_few_batches_wait_for_a_busy_gpu():
    args = types.SimpleNamespace(batch=1, device="cuda", precision=None, seed=0)
    run = common.Run("bench", args, "")
    batch = torch.zeros(16, 3, 512, 512, dtype=torch.uint8).pin_memory()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        run.on_device([batch])
        torch.cuda._sleep(10**8)  # a step of some 50 ms
    held = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    assert held < 8 * 4 * batch.nbytes  # as floats; they are made by way of others


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_recorded_training_holds_no_more_memory_after_thousands_of_steps(
    device, monkeypatch, tmp_path
):
    """With GANS_SLOW=1 five thousand of them, else 300."""
    last, held, log = 5000 if os.environ.get("GANS_SLOW") else 300, {}, common.Run.log

    def watched(self, losses, **where):
        log(self, losses, **where)
        if self.steps_done in (200, last):
            gc.collect()
            held[self.steps_done] = memory(device), memory(torch.device("cpu"))

    monkeypatch.setattr(common.Run, "log", watched)
    draw_faces()
    options = f"{TINY[stylegan2]} --batch 10 --kimg {last // 100} --every 100"
    stylegan2.main([*options.split(), "--device", device.type, "--out", str(tmp_path)])
    (on_device, on_host), (on_device_later, on_host_later) = held[200], held[last]
    assert device.type == "cpu" or on_device_later <= on_device
    assert on_host_later - on_host < 5e6, f"{(on_host_later - on_host) / 1e6:.1f} MB more"
