"""common.graph, and every paper's training steps through it: on a CPU with an emulation of CUDA's
graphs (emulated_graph.py), on a GPU with the real ones."""

import contextlib
import types
from pathlib import Path

import emulated_graph
import pytest
import torch
from commands import ROOT, no_stray_files, one_thread  # noqa: F401

import common
import semantic_stylegan
import stylegan2

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def recorded_anywhere(function, device, generators=(), memory=None):
    return common.Graph(function, device, generators, memory)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """A device on which common.graph records."""
    if request.param == "emulated":
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(common, "record", emulated_graph.record)
        monkeypatch.setattr(common, "graph", recorded_anywhere)
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
    assert len(calls) == common.WARM_UP + 1


def test_state_that_is_passed_in_is_changed_in_place(device):
    mean, graphed = torch.zeros((), device=device), None
    graphed = common.graph(lambda mean, x: mean.lerp_(x, 0.5), device)
    for _ in range(8):
        graphed(mean, torch.ones((), device=device))
    assert mean.item() == pytest.approx(1 - 0.5**8)


def test_what_a_recording_cannot_follow_is_refused(device):
    graphed = common.graph(lambda x, factor: x * factor, device)
    x = torch.ones(2, device=device)
    for _ in range(common.WARM_UP + 1):
        graphed(x, 2)
    with pytest.raises(ValueError, match="cannot change 2 into 3"):
        graphed(x, 3)
    with pytest.raises(ValueError, match="cannot change"):
        graphed(torch.ones(1, device=device), 2)  # which copy_ would spread over both


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
    graphed = common.graph(phase, device)
    with pytest.raises((RuntimeError, common.UserError), match="graph"):
        for _ in range(common.WARM_UP + 1):
            graphed(torch.ones(2, device=device))


# ---- the papers ----

TINY = {  # enough steps for every phase to be recorded and replayed
    stylegan2: "--size 8 --channel-base 32 --channel-max 8 --z-dim 8 --w-dim 8 --map-layers 2"
    " --batch 8 --mbstd-group 2 --kimg 1 --every 1 --pl-every 2 --r1-every 3",
    semantic_stylegan: "--size 16 --coarse-size 8 --min-size 4 --layers 3 --base-layers 1"
    " --depth-layers 2 --local-channels 8 --coarse-channels 16 --channel-base 128 --w-dim 8"
    " --map-layers 2 --batch 4 --iters 24 --every 24 --pl-every 2 --r1-every 3 --noise-inputs",
}


@pytest.mark.parametrize("paper", TINY, ids=lambda paper: paper.__name__)
def test_recorded_steps_give_the_weights_of_eager_ones(paper, device, monkeypatch, tmp_path):
    monkeypatch.setattr(common.Run, "log_every", 1)
    replays, record = [], common.record

    def counted(*args):
        replay, result = record(*args)
        replays.append(0)
        place = len(replays) - 1

        def counted_replay():
            replays[place] += 1
            replay()

        return counted_replay, result

    monkeypatch.setattr(common, "record", counted)
    common_options = [*TINY[paper].split(), "--device", device.type]
    states = {}
    for how in ("--no-graphs", "--graphs"):
        paper.main([*common_options, how, "--out", str(tmp_path / how)])
        (folder,) = Path(tmp_path / how).iterdir()
        states[how] = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert bool(replays) == (how == "--graphs")
    print(replays)
    assert min(replays) >= 5
    eager, recorded = (states[how] for how in ("--no-graphs", "--graphs"))
    for name, net in eager["nets"].items():
        for key, wanted in net.items():
            found = recorded["nets"][name][key]
            if device.type == "cpu":
                assert torch.equal(found, wanted), f"{name}.{key}"
            else:
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert recorded["ranks"][0]["pools"].keys() == eager["ranks"][0]["pools"].keys()
    assert all(map(torch.equal, recorded["ranks"][0]["rng"][:2], eager["ranks"][0]["rng"][:2]))


def test_recorded_steps_of_an_adaptation_without_labels(device, monkeypatch, tmp_path):
    options = f"{TINY[semantic_stylegan]} --device {device.type} --out {tmp_path / 'first'}".split()
    semantic_stylegan.main([*options, "--iters", "1"])
    adapt = " --adapt --freeze --lambda-mask 1 --mixing 0.5 --checkpoint "
    adapted = TINY[semantic_stylegan] + adapt + str(*Path(tmp_path / "first").iterdir())
    monkeypatch.setitem(TINY, semantic_stylegan, adapted)
    test_recorded_steps_give_the_weights_of_eager_ones(
        semantic_stylegan, device, monkeypatch, tmp_path
    )
