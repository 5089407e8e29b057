"""CelebAMask-HQ as it is published, made into pictures with label maps, on a fabricated set."""

import argparse
import shutil
import zipfile
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import no_stray_files, one_thread  # noqa: F401
from PIL import Image

import common
import semantic_stylegan
from common import CELEBAMASK, CELEBAMASK_PARTS, UserError

script, run, main, fails = commands.of(semantic_stylegan)
CLASS = {name: k for k, name in enumerate(CELEBAMASK[0])}
SIDE = 32  # of masks; 512 in the published set


def boxed(part):
    """A mask of a part, a box of its own: rows and columns from where it starts, one by two cells
    of 4 x 4 pixels, so that a part overlaps its neighbours in the order of painting."""
    k = list(CELEBAMASK_PARTS).index(part)
    cells = np.zeros((8, 8), np.uint8)
    cells.flat[3 * k : 3 * k + 6] = 255
    return cells.repeat(4, 0).repeat(4, 1)


def write_raw(folder, number, masks, side=2 * SIDE, mode="L"):
    """Picture `number`, red where its number says, and masks {part: (H, W) of 0 and 255}."""
    image = np.zeros((side, side, 3), np.uint8)
    image[:, :, 0], image[: side // 2, :, 1] = number % 200, 200
    photo = folder / f"CelebA-HQ-img/{number}.jpg"
    photo.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(photo, quality=100)
    for part, mask in masks.items():
        file = folder / f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{part}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).convert(mode).save(file)


@pytest.fixture
def raw(tmp_path):
    """Two pictures to train with, two for validation, in four folders of masks."""
    folder = tmp_path / "CelebAMask-HQ"
    for number, part in ((0, "skin"), (2001, "hair"), (28_000, "cloth"), (29_999, "skin")):
        write_raw(folder, number, {part: boxed(part), "nose": boxed("nose")})
    return folder


def prepare(raw, *options, out="set", size=16):
    main("prepare", "--input", raw, "--out", out, "--size", size, *options)


def read(file):
    return common.decode_labels(file, file)


def files_of(out="set"):
    return sorted(str(p.relative_to(out)) for p in Path(out).rglob("*") if p.is_file())


# ---- maps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "below, above",
    [
        ("eye_g", "l_eye"),
        ("eye_g", "r_brow"),
        ("skin", "hair"),
        ("skin", "nose"),
        ("mouth", "nose"),
        ("hair", "l_ear"),
        ("r_ear", "neck"),
        ("neck_l", "cloth"),
        ("cloth", "hat"),
        ("hat", "ear_r"),
    ],
)
def test_where_two_parts_overlap_the_later_one_of_the_official_order_is_seen(
    tmp_path, below, above
):
    one, other = np.zeros((2, SIDE, SIDE), np.uint8)
    one[:, 8:24], other[:, 16:] = 255, 255
    write_raw(tmp_path / "raw", 5, {above: other, below: one})
    prepare(tmp_path / "raw", size=SIDE)
    row = [0] * 8 + [CLASS[CELEBAMASK_PARTS[below]]] * 8 + [CLASS[CELEBAMASK_PARTS[above]]] * 16
    assert (read("set/train/labels/5.png") == row).all()


def test_every_part_has_the_class_of_the_paper(tmp_path):
    official = dict(skin=1, eye_g=10, l_eye=2, r_eye=2, l_brow=3, r_brow=3, mouth=4, l_lip=4)
    official |= dict(u_lip=4, nose=5, hair=7, l_ear=6, r_ear=6, neck=8, neck_l=8, cloth=9)
    official |= dict(hat=11, ear_r=12)
    assert official.keys() == CELEBAMASK_PARTS.keys()
    for number, part in enumerate(official):
        write_raw(tmp_path / "raw", number, {part: boxed(part)})
    prepare(tmp_path / "raw", size=SIDE)
    for number, (part, k) in enumerate(official.items()):
        assert np.array_equal(read(f"set/train/labels/{number}.png"), boxed(part) // 255 * k)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
def test_masks_may_be_grey_coloured_or_two_valued(tmp_path, mode):
    write_raw(tmp_path / "raw", 3, {"hair": boxed("hair")}, mode=mode)
    prepare(tmp_path / "raw", size=SIDE)
    assert np.array_equal(read("set/train/labels/3.png"), boxed("hair") // 255 * CLASS["hair"])


# ---- the set ----------------------------------------------------------------------------------


def test_pictures_from_28000_on_are_for_validation_and_all_have_the_size(raw, capsys):
    prepare(raw)
    assert files_of() == [
        "classes.txt",
        "train/images/0.jpg", "train/images/2001.jpg",
        "train/labels/0.png", "train/labels/2001.png",
        "val/images/28000.jpg", "val/images/29999.jpg",
        "val/labels/28000.png", "val/labels/29999.png",
    ]  # fmt: skip
    assert capsys.readouterr().out == "2 pairs to train with and 2 others are in set, 4 new\n"
    image = np.asarray(Image.open("set/train/images/0.jpg")).astype(int)
    expected = Image.open(raw / "CelebA-HQ-img/0.jpg").resize((16, 16), Image.Resampling.LANCZOS)
    assert np.abs(image - np.asarray(expected)).max() <= 8
    label = read("set/val/labels/29999.png")
    whole = np.zeros((SIDE, SIDE), np.uint8)
    for part in ("skin", "nose"):
        whole[boxed(part) > 0] = CLASS[CELEBAMASK_PARTS[part]]
    assert np.array_equal(label, whole[::2, ::2])  # cells of 4 pixels: any nearest one


def test_a_prepared_set_is_one_to_train_with_whose_classes_have_names(raw):
    prepare(raw)
    args = argparse.Namespace(data="set", size=None, classes=None, group=None, cache="auto")
    for part, names in (("train", ["0.jpg", "2001.jpg"]), ("val", ["28000.jpg", "29999.jpg"])):
        data, size, classes = common.labelled_pictures(args, common.open_data("set"), part)
        assert (data.names, size, classes) == (names, 16, CELEBAMASK[0])
        assert data.all()[1].max() == data.all()[1].unique()[-1] > 0
    args.group = "celebamask"
    with pytest.raises(UserError, match="joins 19 classes, but 13 in set have names already"):
        common.labelled_pictures(args, common.open_data("set"))


def test_a_zip_is_read_as_the_folder_in_it(raw):
    prepare(raw)
    with zipfile.ZipFile("CelebAMask-HQ.zip", "w") as z:
        for path in raw.rglob("*.*"):
            z.write(path, path.relative_to(raw.parent))
        z.writestr("CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file")
    prepare("CelebAMask-HQ.zip", out="zipped")
    assert files_of("zipped") == files_of()
    for file in files_of():
        assert Path("zipped", file).read_bytes() == Path("set", file).read_bytes()


def test_workers_change_nothing(raw):
    prepare(raw)
    prepare(raw, "--workers", 0, out="alone")
    for file in files_of():
        assert Path("alone", file).read_bytes() == Path("set", file).read_bytes()


# ---- going on, mistakes -----------------------------------------------------------------------


def test_what_is_there_is_left_alone_and_the_rest_is_made(raw, capsys):
    prepare(raw)
    before = {
        f: (Path("set", f).read_bytes(), Path("set", f).stat().st_mtime_ns) for f in files_of()
    }
    for lost in ("val/images/28000.jpg", "train/labels/0.png"):
        Path("set", lost).unlink()
    capsys.readouterr()
    prepare(raw)
    assert capsys.readouterr().out.endswith("are in set, 2 new\n")
    assert files_of() == sorted(before)
    for file, (content, time) in before.items():
        assert Path("set", file).read_bytes() == content
        if not file.endswith(("28000.jpg", "28000.png", "/0.jpg", "/0.png", "classes.txt")):
            assert Path("set", file).stat().st_mtime_ns == time


def test_a_damaged_mask_is_named_and_mended_leaves_only_the_rest_to_do(raw, capsys):
    mask = raw / "CelebAMask-HQ-mask-anno/14/28000_cloth.png"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:60])
    message = fails(capsys, "prepare", "--input", raw, "--out", "set", "--size", 16, "--workers", 0)
    assert "14/28000_cloth.png: " in message and "what is done stays" in message
    assert files_of() == [
        "train/images/0.jpg", "train/images/2001.jpg",
        "train/labels/0.png", "train/labels/2001.png",
    ]  # fmt: skip
    mask.write_bytes(whole)
    prepare(raw)
    assert capsys.readouterr().out.endswith("are in set, 2 new\n")


def test_a_file_that_cannot_be_written_leaves_none_behind(raw, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    options = ("--out", "set", "--size", 16, "--workers", 0)  # others would still be at theirs
    message = fails(capsys, "prepare", "--input", raw, *options)
    assert "No space left on device" in message and files_of() == []


def test_a_mistake_is_one_line_that_names_it(raw, tmp_path, capsys):
    def refused(change, folder="CelebAMask-HQ", size=16):
        copied = tmp_path / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(raw, copied / folder)
        change(copied / folder)
        options = ("prepare", "--input", copied, "--out", tmp_path / "new", "--size", size)
        message = fails(capsys, *options, "--workers", 0)
        assert not (tmp_path / "new").exists()
        return message

    anno = "CelebAMask-HQ-mask-anno"
    assert "1 pictures of masks are missing: 2001.jpg." in refused(
        lambda raw: (raw / "CelebA-HQ-img/2001.jpg").unlink()
    )
    message = refused(lambda raw: shutil.rmtree(raw / anno / "14"))
    assert "2 pictures without masks: 28000.jpg, 29999.jpg. Unpack all" in message
    message = refused(lambda raw: shutil.rmtree(raw / anno))
    assert f"no folder {anno} in it" in message and "Expected: CelebA-HQ-img and" in message
    for wrong in ("0/00000_hand.png", "1/00000_hair.png", "0/0_hair.png", "0/00000_hair.jpg"):
        message = refused(
            lambda raw, to=wrong: (raw / anno / "0/00000_nose.png").rename(raw / anno / to)
        )
        assert f"{wrong} is not as 0/00012_skin.png. Parts: skin, eye_g" in message
    white = Image.new("L", (8, 8), 255)
    message = refused(lambda raw: white.save(raw / anno / "0/00000_nose.png"))
    assert "00000_nose.png and 0/00000_skin.png differ in size" in message
    wide = Image.new("RGB", (32, 8))
    message = refused(lambda raw: wide.save(raw / "CelebA-HQ-img/0.jpg"))
    assert "parts of 0 are 32x32, the picture 32x8" in message
    assert "a power of two from 8 on" in refused(lambda raw: None, size=100)
    (tmp_path / "a.txt").write_text("no set")
    for path in ("nowhere", tmp_path / "a.txt"):
        message = fails(capsys, "prepare", "--input", path, "--out", "new")
        assert "name the folder or the .zip of CelebAMask-HQ" in message


def test_a_set_of_another_size_is_not_mixed_with_this_one(raw, capsys):
    prepare(raw, size=16)
    message = fails(capsys, "prepare", "--input", raw, "--out", "set", "--size", 32)
    assert "--out set has pictures of 16x16" in message


def test_the_public_name_says_how_to_get_the_set_and_then_is_the_set(raw, capsys):
    message = fails(capsys, "--data", "celebamask_hq")
    assert "by hand" in message and "github.com/switchablenorms/CelebAMask-HQ" in message
    command = "prepare --input CelebAMask-HQ.zip --out data/celebamask_hq"
    assert f"python semantic_stylegan.py {command}" in message
    prepare(raw, out="data/celebamask_hq")
    tiny = "--coarse-size 8 --min-size 4 --layers 3 --base-layers 1 --depth-layers 2 --map-layers 1"
    tiny += " --local-channels 4 --coarse-channels 4 --channel-max 4 --w-dim 4 --batch 2 --iters 1"
    main("--data", "celebamask_hq", "--device", "cpu", *tiny.split())
    folder = Path("runs/semantic_stylegan-celebamask_hq-000")
    config = torch.load(folder / "checkpoint.pt", weights_only=True)["config"]["G_ema"]
    assert (config["size"], config["regions"]) == (16, CELEBAMASK[0])
    assert config["see_through"] == [CLASS["glasses"], CLASS["earring"]]
