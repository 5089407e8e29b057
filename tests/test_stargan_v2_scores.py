"""stargan_v2.py evaluate and app as a user runs them, and the LPIPS of its tables."""

import itertools
import json
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_common_app import Server, browser, generate, outcome, shown  # noqa: F401  a fixture
from test_stargan_v2 import (  # noqa: F401  two of them are fixtures for every test
    ROOT,
    TINY,
    domains,
    fails,
    main,
    no_stray_files,
    official_file,
    one_thread,
    run,
    tiny_networks,
)

import common
import stargan_v2

WIDTHS = 64, 192, 384, 256, 256
CONVS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
SCORES = {"n_real", "n_fake", "fd8", "diversity"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of one step on two domains."""
    out = tmp_path_factory.mktemp("trained")
    main("--data", domains(out / "d"), *TINY, "--iters", 1, "--out", out)
    return out / "stargan_v2-d-000"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights under torchvision's and LPIPS's names: --alexnet, --lpips."""
    folder, rng = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    weights = {}
    for i, (O, I, k) in CONVS.items():
        w = torch.randn(O, I, k, k, generator=rng)
        weights[f"features.{i}.weight"] = w * (2 / w[0].numel()) ** 0.5
        weights[f"features.{i}.bias"] = torch.randn(O, generator=rng) * 0.1
    for i, (O, I) in {1: (4096, 9216), 4: (4096, 4096), 6: (1000, 4096)}.items():
        weights[f"classifier.{i}.weight"] = torch.zeros(()).expand(O, I)  # not needed
        weights[f"classifier.{i}.bias"] = torch.zeros(()).expand(O)
    torch.save(weights, folder / "alexnet.pth")
    lin = {
        f"lin{k}.model.1.weight": torch.rand(1, C, 1, 1, generator=rng)
        for k, C in enumerate(WIDTHS)
    }
    torch.save(lin, folder / "lin.pth")
    return folder / "alexnet.pth", folder / "lin.pth"


def evaluate(trained, *options):
    """What --out holds."""
    main("evaluate", "--checkpoint", trained, "--out", "scores.json", *options)
    return json.loads(Path("scores.json").read_text())


# ---- LPIPS with AlexNet ----


def test_lpips_with_alexnet_is_the_formula_of_the_official_evaluation(files):
    alexnet, lin = (torch.load(file) for file in files)
    lpips = common.load_lpips_alex(*files)
    x, y = (torch.rand(2, 2, 3, 63, 40, dtype=torch.double) * 2 - 1).unbind()
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
    u, v, distance = (x - shift) / scale, (y - shift) / scale, 0
    for k, i in enumerate(CONVS):
        w, b = (alexnet[f"features.{i}.{part}"].double() for part in ("weight", "bias"))
        stride, padding = (4, 2) if i == 0 else (1, w.shape[-1] // 2)
        u, v = (F.conv2d(maps, w, b, stride, padding).relu() for maps in (u, v))
        a, b = (m * (m.square().sum(1, keepdim=True) + 1e-10).rsqrt() for m in (u, v))
        weighted = F.conv2d((a - b).square(), lin[f"lin{k}.model.1.weight"].double())
        distance = distance + weighted.mean([1, 2, 3])
        if i < 6:
            u, v = F.max_pool2d(u, 3, 2), F.max_pool2d(v, 3, 2)
    torch.testing.assert_close(lpips(x.float(), y.float()), distance.float(), rtol=1e-5, atol=0)


def test_lpips_weights_under_other_names_stand_in_the_order_of_the_stages(files):
    x, lin = torch.rand(2, 1, 3, 64, 64) * 2 - 1, torch.load(files[1])
    torch.save({f"net.{name}": w for name, w in lin.items()}, "lpips_weights.ckpt")
    torch.save(dict(reversed(lin.items())), "reversed.pth")  # names it knows may come in any order
    distance = common.load_lpips_alex(*files)(*x)
    for name in ("lpips_weights.ckpt", "reversed.pth"):
        assert torch.equal(common.load_lpips_alex(files[0], name)(*x), distance) and distance > 0
    for bad in (dict(list(lin.items())[:4]), {f"net.{name}": lin[name] for name in reversed(lin)}):
        torch.save(bad, "bad.pth")
        with pytest.raises(common.UserError, match="does not hold LPIPS of AlexNet weights"):
            common.load_lpips_alex(files[0], "bad.pth")


def test_alexnet_says_which_weights_it_has_and_from_which_size_it_works(files):
    lpips = common.load_lpips_alex(*files)
    assert lpips.label.startswith("LPIPS of AlexNet ") and " of AlexNet " in lpips.label[8:]
    assert lpips(torch.zeros(1, 1, 31, 31), torch.zeros(1, 3, 31, 31)) == 0
    with pytest.raises(ValueError, match="from 31 pixels"):
        lpips(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))


def test_a_checksum_of_which_digits_are_published_is_held_to_them(tmp_path, monkeypatch):
    name, url, digits = common.WEIGHTS["AlexNet"]
    assert digits in name and len(digits) == 8
    monkeypatch.setenv("GANS_CACHE", str(tmp_path))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(common.UserError, match="damaged.*not 7be5be79"):
        common.load_alexnet()
    with pytest.raises(common.UserError, match="expected 7be5be79"):
        common.download([url], tmp_path / name, digits)
    digits = common.sha256_of(tmp_path / name)[:8]
    common.download([url], tmp_path / name, digits)
    monkeypatch.setitem(common.WEIGHTS, "AlexNet", (name, url, digits))
    tensors, label = common.read_weights("AlexNet", None, {"features.0.weight": (1,)})
    assert label == "alexnet-owt-7be5be79" and list(tensors) == ["features.0.weight"]


# ---- evaluate ----


def test_evaluate_needs_no_download_and_says_what_it_leaves_out(trained, capsys):
    result = evaluate(trained)
    said = capsys.readouterr().out
    assert said.count("are left out: ") == 1 and said.count("LPIPS is left out: ") == 1
    for mode in ("latent", "reference"):
        assert list(result[mode]) == ["human to goblin", "goblin to human", "mean"]
        for row in result[mode].values():
            assert set(row) == (SCORES if "n_real" in row else {"fd8", "diversity"})
        *rows, mean = result[mode].values()
        assert {(row["n_real"], row["n_fake"]) for row in rows} == {(6, 60)}
        assert mean["fd8"] == pytest.approx((rows[0]["fd8"] + rows[1]["fd8"]) / 2)
        assert f"{mode}: mean" in said and f"{mean['fd8']:.4f}" in said
    assert result["outputs"] == 10 and result["seed"] == 0 and result["size"] == 32
    assert evaluate(trained) == result != evaluate(trained, "--seed", 1)


def test_a_domain_with_one_training_picture_has_no_frechet_distance(trained, tmp_path, capsys):
    shutil.copytree(domains(tmp_path / "whole"), tmp_path / "one")
    for path in sorted(Path("one/train/goblin").iterdir())[1:]:
        path.unlink()
    result = evaluate(trained, "--data", "one")["latent"]
    assert "fd8" not in result["human to goblin"] and "fd8" in result["goblin to human"]
    assert set(result["mean"]) == {"diversity"}
    said = capsys.readouterr().out.splitlines()
    header = next(line for line in said if line.split() == ["fd8", "diversity"])
    row = next(line for line in said if line.startswith("latent: human to goblin"))
    assert len(header) == len(row)
    assert row.split()[4:] == [f"{result['human to goblin']['diversity']:.4f}"]


def test_lpips_and_diversity_are_means_of_45_pairs_over_batches(files):
    def masks_of(x):
        bright = x.mean(1, keepdim=True) / 2 + 0.5
        return [bright, bright.square()]

    lpips, G = common.load_lpips_alex(*files), tiny_networks(64, w_hpf=1.0)["G"]
    sources = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    styles = torch.randn(5, 10, 4)
    fakes, row = stargan_v2.translated_often(G, sources, styles, masks_of, lpips, batch=3)
    assert fakes.shape == (50, 3, 64, 64)
    for i, k in ((0, 0), (2, 9), (4, 3)):
        x = sources[i : i + 1]
        masks = stargan_v2.masks_for(x, masks_of, "cpu")
        one = stargan_v2.translated(G, x, styles[i, k][None], masks)
        assert (fakes[10 * i + k].int() - one[0].int()).abs().max() <= 1
    ten, pairs = fakes.unflatten(0, (5, 10)), list(itertools.combinations(range(10), 2))
    assert len(pairs) == 45
    x, y = (torch.stack([common.to_float(ten[:, p[i]], "cpu") for p in pairs]) for i in (0, 1))
    with torch.no_grad():
        distances = torch.stack([lpips(a, b) for a, b in zip(x, y, strict=True)])  # (45, 5)
    for name, d in (("lpips", distances), ("diversity", (x - y).abs().mean([2, 3, 4]))):
        wanted = (d[:, :3].mean() + d[:, 3:].mean()) / 2
        assert row[name] == pytest.approx(float(wanted), rel=1e-4), name


def test_given_weights_fill_the_columns_and_the_networks_are_named(
    trained, files, capsys, monkeypatch
):
    def real_statistics(real, net, mode):
        for _ in range(2):  # it may pass over them twice
            assert [x.shape for x in real()] == [(4, 3, 32, 32), (2, 3, 32, 32)]
        computed.append(mode)
        return {"n": 6}

    def fid_kid(real, fake, net, mode):
        assert real == {"n": 6} and mode == "clean"
        assert fake.shape == (60, 3, 32, 32)
        return {"fid": 1.5, "kid_x1000": 2.5, "resize": mode, "features": net.label, "warning": "!"}

    inception = types.SimpleNamespace(label="some network")
    monkeypatch.setattr(common, "load_inception_or_explain", lambda *args: inception)
    computed = []
    monkeypatch.setattr(common, "real_statistics", real_statistics)
    monkeypatch.setattr(common, "fid_kid", fid_kid)
    monkeypatch.setattr(common.ImageSet.batches, "__defaults__", (4,))
    weights = ["--alexnet", files[0], "--lpips", files[1], "--fid-resize", "clean"]
    result = evaluate(trained, *weights)
    assert computed == ["clean"] * 2  # once for each domain
    said = capsys.readouterr().out
    assert "some network, resize clean. The official FIDs are of another Inception" in said
    assert "LPIPS: LPIPS of AlexNet" in said and "left out" not in said
    assert "training + test pictures: goblin 6 + 6, human 6 + 6\n" in said
    assert "fd8" in said and "fid  kid_x1000" in said and said.endswith("!\n")
    mean = result["latent"]["mean"]
    assert mean["fid"] == 1.5 and mean["kid_x1000"] == 2.5 and mean["lpips"] > 0
    assert result["reference"]["goblin to human"]["features"] == "some network"


def test_on_toy_what_changes_nothing_has_the_error_of_doing_nothing(trained, monkeypatch):
    official_file("ema.ckpt", {k: v for k, v in tiny_networks(domains=3).items() if k != "D"})
    small = {
        name: (domain, first, 12) for name, (domain, first, _) in common.TOY_DOMAIN_FOLDERS.items()
    }
    monkeypatch.setattr(common, "TOY_DOMAIN_FOLDERS", small)
    monkeypatch.setattr(stargan_v2, "translated", lambda G, images, s, masks: images)
    result = evaluate("ema.ckpt", "--data", "toy")
    for mode in ("latent", "reference"):
        assert len(result[mode]) == 6 + 1
        for row in result[mode].values():
            assert row["error"] == pytest.approx(row["error_of_doing_nothing"]) and row["error"] > 0
            assert row["error_in_mean_style"] == pytest.approx(row["error"])
            assert row["diversity"] == 0 and row["fd8"] > 0
    real = [np.asarray(common.toy_face(3000 + i, 0, 32), float) for i in range(12)]
    true = [np.asarray(common.toy_face(3000 + i, 2, 32), float) for i in range(12)]
    wanted = np.abs(np.array(real) - true).mean() / 127.5
    assert result["latent"]["human to robot"]["error"] == pytest.approx(wanted)


def test_scores_during_training_give_each_picture_its_masks():
    nets = tiny_networks(64, w_hpf=1.0)
    three = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    tests = dict.fromkeys("ab", types.SimpleNamespace(all=lambda n: three))
    ema = [nets[name].eval() for name in "GFE"]
    row = stargan_v2.scores(ema, tests, False, lambda x: [x[:, :1].abs()] * 2, diverse=2)
    assert row["n_fake"] == 6 and row["diversity"] > 0


def toy_scores(monkeypatch, *options):
    """{mode: mean scores} on the test faces, which are not trained on, of a run on toy data."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # its layers are large enough for that
    run(*options, "--out", ".")
    run("evaluate", "--checkpoint", "stargan_v2-toy-000", "--out", "scores.json")
    result = json.loads(Path("scores.json").read_text())
    return {mode: result[mode]["mean"] for mode in ("latent", "reference")}


def test_a_short_toy_run_translates_faces_that_it_has_not_seen_in_many_ways(monkeypatch):
    """A tenth of the toy preset. Seeds 0 to 2 reach 70 to 73% of the error of doing nothing with
    latents, 64 to 66% with references, and diversities of 0.14 to 0.16, 0.057 to 0.067."""
    scores = toy_scores(monkeypatch, "--iters", 170, "--ema-beta", 0.97, "--every", 170)
    for mode, error, diversity in (("latent", 0.78, 0.1), ("reference", 0.72, 0.04)):
        assert scores[mode]["error"] < error * scores[mode]["error_of_doing_nothing"]
        assert scores[mode]["diversity"] > diversity


@pytest.mark.skipif("GANS_SLOW" not in os.environ, reason="five minutes: set GANS_SLOW=1")
def test_the_toy_preset_comes_to_60_percent_of_doing_nothing_on_unseen_faces(monkeypatch):
    for mean in toy_scores(monkeypatch).values():
        assert mean["error"] <= 0.6 * mean["error_of_doing_nothing"]
        assert mean["diversity"] >= 0.1


def test_ten_references_of_a_picture_differ_and_all_are_used_alike(monkeypatch):
    monkeypatch.setattr(
        stargan_v2, "styles_of_references", lambda E, refs, y: torch.arange(len(refs))[:, None]
    )
    nets, rng = tiny_networks(), torch.Generator().manual_seed(0)
    styles = stargan_v2.random_styles(nets, 1, 6, torch.zeros(20, 3, 32, 32), rng)
    assert styles["latent"].shape == (6, 10, 4)
    drawn = styles["reference"][:, :, 0]
    assert all(len(set(row.tolist())) == 10 for row in drawn)
    assert torch.equal(drawn.flatten().bincount(), torch.full((20,), 3))


def test_mistakes_end_in_one_line(trained, capsys):
    data = trained.parent / "d"
    official_file("three.ckpt", {k: v for k, v in tiny_networks(domains=3).items() if k != "D"})
    official_file("none.ckpt", {k: net for k, net in tiny_networks().items() if k in "GE"})
    domains("train_only", 2, parts=("train",)), domains("other", 2, names=("cat", "dog"))
    run = ["evaluate", "--checkpoint", trained]
    for options, message in (
        (["evaluate", "--checkpoint", "three.ckpt"], "--data is missing"),
        (["evaluate", "--checkpoint", "three.ckpt", "--data", data], "the checkpoint 0, 1, 2"),
        (["evaluate", "--checkpoint", "none.ckpt", "--data", data], "has no F"),
        ([*run, "--data", "other"], "has the domains cat, dog, the checkpoint goblin, human"),
        ([*run, "--data", "train_only"], "neither val nor test"),
        ([*run, "--data", data, "--alexnet", "no.pth"], "no.pth: no such file"),
        (["app", "--checkpoint", "nowhere"], "nowhere"),
        (["app", "--checkpoint", trained, "--port", 70000], "--port 70000"),
    ):
        assert message in fails(capsys, *options)


# ---- app ----


def test_the_page_does_what_translate_does_by_seeds_and_by_references(trained):
    folder = trained.parent / "d/test"
    picture, ref = folder / "human/0.jpg", folder / "goblin/1.jpg"
    app = Server(ROOT / "stargan_v2.py", "app", "--checkpoint", trained, "--port", 0)
    try:
        assert "StarGAN v2 d: " in app.said
        page = app.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % app.port)[2].decode()
        assert "<option>goblin</option><option>human</option>" in page
        for k, style in enumerate((["--seeds", 3], ["--ref", ref])):
            for domain in (0, 1):
                main("translate", "--checkpoint", trained, "--input", picture, "--domain", domain,
                     *style, "--out", "t.png")  # fmt: skip
                upload, query = picture.read_bytes(), f"domain={domain}&seed=3"
                if k:
                    query += f"&reference={ref.stat().st_size}"
                    upload += ref.read_bytes()
                status, _, body = app.post(upload, query)
                assert status == 200, body
                Path("a.png").write_bytes(body)
                assert Image.open("a.png").tobytes() == Image.open("t.png").tobytes()
    finally:
        assert app.stop() == ""


def test_in_a_browser_domain_and_style_are_chosen_and_the_result_is_saved(trained, browser):  # noqa: F811
    folder, at = trained.parent / "d/test", "document.getElementById('{}')".format
    picture, ref = folder / "human/0.jpg", folder / "goblin/1.jpg"

    def translated(*style):
        main("translate", "--checkpoint", trained, "--input", picture, *style, "--out", "t.png")
        return Image.open("t.png").tobytes()

    app = Server(ROOT / "stargan_v2.py", "app", "--checkpoint", trained, "--port", 0)
    try:
        browser.tab(app.url)
        assert (
            browser.value(f"[...{at('domain')}.options].map(o => o.text).join()") == "goblin,human"
        )
        browser.choose("picture", picture)
        assert generate(browser).startswith("Done")
        assert shown(browser).tobytes() == translated("--domain", "goblin", "--seeds", 0)
        browser.value(f"{at('domain')}.value = 'human'")
        browser.value(f"{at('another')}.click()")
        assert outcome(browser).startswith("Done")
        seed = browser.value(f"{at('seed')}.value")
        assert shown(browser).tobytes() == translated("--domain", "human", "--seeds", seed)
        browser.value(f"{at('domain')}.value = 'goblin'")
        browser.choose("reference", ref)
        assert browser.value(f"{at('guided')}.checked") and generate(browser).startswith("Done")
        assert shown(browser).tobytes() == translated("--domain", "goblin", "--ref", ref)
        browser.value(f"{at('save')}.click()")
        file, end = browser.downloads / "0-translated.png", time.monotonic() + 10
        while not file.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert Image.open(file).tobytes() == Image.open("t.png").tobytes()
    finally:
        assert app.stop() == ""
