"""Landmarks of faces, and StarGAN v2's alignment by them."""

import pickle
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import no_stray_files, one_thread  # noqa: F401
from PIL import Image, ImageDraw
from test_stargan_v2 import official_file, tiny_networks

import common
import stargan_v2

_, _, main, fails = commands.of(stargan_v2)


def some_face(seed=0):
    """98 landmarks, x and y in pixels of 256: eyes, a mouth, and others somewhere."""
    points = np.random.default_rng(seed).uniform(70, 190, (98, 2))
    for part, centre in ((range(60, 68), (100, 110)), (range(68, 76), (154, 112))):
        turn = np.linspace(0, 2 * np.pi, 8, endpoint=False)
        points[part] = centre + 9 * np.stack([np.cos(turn), 0.5 * np.sin(turn)], 1)
    points[[96, 97, 76, 82]] = (100, 110), (154, 112), (106, 168), (150, 170)
    return points


MEAN = some_face()
SHOWN = {96: (255, 0, 0), 97: (0, 255, 0), 76: (0, 0, 255), 82: (255, 255, 0), 5: (0, 255, 255)}


def moved(points, scale, degrees, shift):
    """Points (n, 2) scaled and turned around (128, 128), then shifted."""
    t = np.radians(degrees)
    turn = scale * np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])
    return (points - 128) @ turn + 128 + shift


def picture_of(points, size=(256, 256), mode="RGB"):
    """A grey picture with a coloured disc at each of the landmarks that are SHOWN."""
    img = Image.new("RGB", [4 * side for side in size], (128, 128, 128))
    for k, colour in SHOWN.items():
        x, y = 4 * points[k]
        ImageDraw.Draw(img).ellipse((x - 20, y - 20, x + 19, y + 19), colour)
    return img.reduce(4).convert(mode)


def disc(img, colour):
    """The centre (x, y) of what has a colour in a picture."""
    near = 1 - np.abs(np.asarray(img, float) - colour).max(2) / 110  # grey is 127 away
    y, x = np.mgrid[: img.height, : img.width] + 0.5
    weight = near.clip(0, 1)
    assert weight.sum() > 5, f"nothing is {colour}"
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


class Places(torch.nn.Module):
    """In place of FAN: maps with a hill at each of 98 places, in pixels of a picture of `size`."""

    def __init__(self, points, size=(256, 256)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.points = torch.as_tensor(points / size * 64).float()

    def forward(self, x):
        assert x.shape[2:] == (256, 256) and x.min() >= -1 and x.max() <= 1
        at = torch.arange(64) + 0.5
        dx, dy = at[None] - self.points[:, :1], at[None] - self.points[:, 1:]
        hills = torch.exp(-(dx[:, None].square() + dy[:, :, None].square()) / 4)
        return torch.cat([hills, torch.ones(1, 64, 64)])[None]

    def masks(self, x):
        return [torch.ones(len(x), 1, 256, 256)] * 2


# ---- landmarks ----


def test_a_landmark_is_its_maps_largest_pixel_and_a_quarter_towards_the_larger_neighbour():
    maps = torch.zeros(1, 98, 64, 64)
    maps[0, :, 20, 10] = 1.0  # row, column
    maps[0, 1, 20, 11] = maps[0, 1, 19, 10] = 0.5
    maps[0, 2, 20, 9] = maps[0, 2, 21, 10] = 0.5
    maps[0, 3, 20, 9], maps[0, 3, 20, 11] = 0.2, -0.1
    maps[0, 4] = 0
    maps[0, 4, 63, 30], maps[0, 4, 63, 31] = 1.0, 0.5  # at an edge: as it is
    found = common.landmarks_of_maps(maps)[0] / 4
    wanted = [(10.5, 20.5), (10.75, 20.25), (10.25, 20.75), (10.25, 20.5), (30.5, 63.5)]
    assert torch.equal(found[:5], torch.tensor(wanted))


def test_a_hills_top_is_found_to_a_pixel():
    found = common.landmarks_of_maps(Places(MEAN)(torch.zeros(1, 3, 256, 256))[:, :-1])[0]
    assert np.abs(found.numpy() - MEAN).max() <= 1 + 1e-4


# ---- alignment ----


@pytest.mark.parametrize("how", [(1.7, 0, (0, 0)), (0.6, 35, (20, -9)), (1, -170, (400, 3))])
def test_similarity_undoes_a_similarity(how):
    source = moved(MEAN, *how)
    a, b = common.similarity(source, MEAN)
    z = a * (source[:, 0] + 1j * source[:, 1]) + b
    np.testing.assert_allclose(np.stack([z.real, z.imag], 1), MEAN, atol=1e-9)
    assert abs(a) == pytest.approx(1 / how[0])
    assert np.angle(a, deg=True) == pytest.approx(-how[1])


def test_eyes_and_mouth_tell_the_direction_whatever_the_face_is_like():
    face = some_face()
    face[[*range(60, 76), 96, 97, 76, 82], 1] = [110] * 18 + [170] * 2
    face[[76, 82], 0] = 105, 149  # in the middle under the eyes
    other = face.copy()
    other[:60] += 20 * np.random.default_rng(1).standard_normal((60, 2))
    wide = (other - 128) * [1.5, 1]
    assert np.angle(common.similarity(wide, face)[0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("how", [(1, 0, (0, 0)), (0.7, 25, (15, -20)), (1.2, -12, (-9, 14))])
@pytest.mark.parametrize("size", [256, 128])
def test_a_face_is_mapped_back_so_that_its_landmarks_lie_on_the_mean_ones(how, size):
    points = moved(MEAN, *how)
    result = common.aligned(Places(points), MEAN, size, picture_of(points))
    assert result.size == (size, size) and result.mode == "RGB"
    for k, colour in SHOWN.items():
        assert np.abs(disc(result, colour) - MEAN[k] * size / 256).max() < 1, k


@pytest.mark.parametrize(("times", "size"), [(1, (256, 400)), (1, (300, 256)), (6, (2400, 1600))])
def test_sides_may_differ_and_large_photos_are_shrunk(times, size):
    points = moved(MEAN, 1, 10, (20, 0))
    small = picture_of(points, [-(-side // times) for side in size])
    img = small.resize([side * times for side in small.size]).crop((0, 0, *size))
    result = common.aligned(Places(times * points, size), MEAN, 128, img)
    for k, colour in SHOWN.items():
        assert np.abs(disc(result, colour) - MEAN[k] / 2).max() < 1, k


def test_beyond_the_edge_is_the_pictures_reflection_blurred_outwards():
    rng = np.random.default_rng(0)
    img = Image.fromarray(rng.integers(256, size=(400, 30, 3), dtype=np.uint8))
    around, x = np.asarray(common.mirrored_around(img)).astype(int), np.asarray(img).astype(int)
    assert around.shape == (800, 60, 3)
    assert np.array_equal(around[200:600, 15:45], x)
    reflected = np.pad(x, ((200, 200), (15, 15), (0, 0)), "reflect")[:, 15:45]
    off = np.abs(around[:, 15:45] - reflected).mean((1, 2))
    assert off[199] < 2 < 20 < off[150] < off[100] < off[5] and np.std(around[5]) < 30
    grey = Image.new("L", (7, 5), 77)
    assert set(np.asarray(common.mirrored_around(grey)).ravel()) == {77}
    assert common.mirrored_around(Image.new("L", (1, 1), 5)).size == (1, 1)


def test_what_lies_beyond_the_photo_is_filled(tmp_path):
    points = moved(MEAN, 1.1, 0, (60, 0))  # its right edge is inside the result
    img = Image.new("RGB", (256, 256), (10, 200, 30))
    result = np.asarray(common.aligned(Places(points), MEAN, 64, img))
    assert (result == (10, 200, 30)).all()


# ---- the commands ----


@pytest.fixture
def photos(monkeypatch):
    """Two photos in `photos`, the mean landmarks in mean.npz, and a network that finds theirs."""
    points = moved(MEAN, 0.8, 20, (10, 5))
    Path("photos").mkdir()
    picture_of(points).save("photos/a.png")
    picture_of(points, mode="L").save("photos/b.png")
    np.savez("mean.npz", mean=MEAN)
    monkeypatch.setattr(common, "load_fan", lambda path: Places(points))


def test_align_writes_each_photos_face(photos, capsys):
    main("align", "--input", "photos", "--out", "faces", "--landmarks", "mean.npz", "--size", 128)
    assert sorted(p.name for p in Path("faces").iterdir()) == ["a.png", "b.png"]
    for k, colour in SHOWN.items():
        assert np.abs(disc(Image.open("faces/a.png"), colour) - MEAN[k] / 2).max() < 1, k


def test_a_photo_without_a_face_is_named_and_skipped(photos, capsys, monkeypatch):
    calls = iter([Places(np.full((98, 2), 9.0)), Places(MEAN)])

    class Once(Places):
        def forward(self, x):
            return next(calls)(x)

    monkeypatch.setattr(common, "load_fan", lambda path: Once(MEAN))
    main("align", "--input", "photos", "--landmarks", "mean.npz")
    said = capsys.readouterr()
    assert said.err == "skipped a.png: no face was found in it\n" and "1 skipped" in said.out
    assert [p.name for p in Path("out").iterdir()] == ["b.png"]


@pytest.mark.parametrize(("w_hpf", "refs"), [(0.0, "photos"), (1.0, "faces")])
def test_translate_and_app_align_sources_and_with_masks_references(
    photos, monkeypatch, w_hpf, refs
):
    nets = tiny_networks(64, w_hpf)
    official_file("ema.ckpt", {name: nets[name] for name in "GFE"})
    run, marks = ["--checkpoint", "ema.ckpt"], ["--landmarks", "mean.npz"]
    main("align", "--input", "photos", "--out", "faces", "--size", 64, *marks)
    for style in (["--seeds", 3, "--domain", 1], ["--ref", "photos/b.png", "--domain", 0]):
        known = ["--ref", f"{refs}/b.png", "--domain", 0] if "--ref" in style else style
        main("translate", *run, "--input", "faces/a.png", *known, "--out", "x.png")
        main("translate", *run, "--input", "photos/a.png", *style, "--align", *marks,
             "--out", "y.png")  # fmt: skip
        assert Image.open("x.png").tobytes() == Image.open("y.png").tobytes()
    pages = []
    monkeypatch.setattr(
        common, "serve_page", lambda args, title, function, **_: pages.append(function)
    )
    main("app", *run, "--align", *marks)
    photo, ref = (Image.open(f"photos/{name}.png").convert("RGB") for name in "ab")
    assert pages[0](photo, 0, 0, ref).tobytes() == Image.open("x.png").tobytes()


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("run"),)


def test_other_files_of_landmarks_end_in_one_line_and_run_nothing(photos, capsys):
    np.savez("key.npz", average=MEAN)
    np.savez("shape.npz", mean=MEAN[:68])
    np.savez("nan.npz", mean=MEAN * np.nan)
    np.savez("point.npz", mean=np.ones((98, 2)))
    np.savez("text.npz", mean=np.full((98, 2), "a"))
    np.savez("code.npz", mean=np.array([[Attack()] * 2] * 98))
    np.save("mean.npy", MEAN)
    Path("code.pkl").write_bytes(pickle.dumps(Attack()))
    Path("empty.npz").touch()
    command = ["align", "--input", "photos"]
    cases = [
        ([*command, "--landmarks", name], "mean landmarks")
        for name in (
            "key.npz", "shape.npz", "nan.npz", "point.npz", "text.npz", "code.npz", "mean.npy",
            "code.pkl", "empty.npz", "photos/a.png",
        )
    ]  # fmt: skip
    cases += [
        ([*command, "--landmarks", "none.npz"], "none.npz"),
        (command, "celeba_lm_mean.npz"),  # there is no network in tests
        (["align", "--input", "nowhere", "--landmarks", "mean.npz"], "--input nowhere"),
        ([*command, "--size", 0], "--size"),
    ]
    commands.each_ends_in_one_line(fails, capsys, cases)
    assert not Path("run").exists()
