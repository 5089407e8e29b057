"""Pictures with label maps, and what is measured on regions."""

import argparse
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import NO_CLASS, TOY_LABELLED, TOY_REGIONS, UserError, augment_pair, labelled_pictures

WIDE = np.arange(24 * 40).reshape(24, 40) % 7


def options(data="toy", size=16, classes=None, group=None):
    return argparse.Namespace(data=str(data), size=size, classes=classes, group=group, cache="auto")


def write_pair(folder, name, label=WIDE, suffix=".png", mode="L"):
    """A label map, and a picture whose red is 30 times the label."""
    label = np.asarray(label, np.uint8)
    image = np.zeros((*label.shape, 3), np.uint8)
    image[:, :, 0] = 30 * label
    for kind in ("images", "labels"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / f"{name}{suffix}")
    picture = Image.fromarray(label)
    if mode == "P":
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
    picture.save(folder / "labels" / f"{name}.png")
    return folder


@pytest.fixture
def pairs(tmp_path):
    """Five pairs of 40 x 24 pixels, at any depth."""
    for name in ("a", "b", "c.1", "deep/a", "deep/er/b"):
        write_pair(tmp_path / "set", name)
    return tmp_path / "set"


def load(args, part="train"):
    source = common.open_data(args.data, size=args.size, toy=TOY_LABELLED)
    return labelled_pictures(args, source, part)


def refused(args):
    with pytest.raises(UserError) as e:
        data, _, _ = load(args)
        data.all()
    return str(e.value)


# ---- labelled pictures ------------------------------------------------------------------------


def test_a_toy_pair_is_a_face_and_its_regions():
    data, size, classes = load(options())
    image, label = data[7]
    assert (len(data), size, classes) == (4000, 16, list(TOY_REGIONS))
    assert np.array_equal(image, np.asarray(common.toy_face(7, 0, 16)))
    assert np.array_equal(label, np.asarray(common.toy_labels(7, 0, 16)))
    images, labels = data.all(3)
    assert images.shape == (3, 3, 16, 16) and labels.shape == (3, 16, 16)
    assert images.dtype == labels.dtype == torch.uint8
    assert np.array_equal(labels[2], data[2][1])
    assert np.array_equal(images[2].permute(1, 2, 0), data[2][0])


def test_the_test_faces_of_toy_are_in_no_training():
    data, _, _ = load(options(), "test")
    assert len(data) == 200
    assert np.array_equal(data[0][0], np.asarray(common.toy_face(30_000, 0, 16)))
    first = TOY_LABELLED["test"][1]
    assert first >= common.CLASSIFIER_SEEDS + 16_000 + 2000  # of toy_classifier
    assert all(a + n <= first for _, a, n in common.TOY_CLASSES.values())


def test_a_folder_with_train_and_test_gives_the_part_asked_for_and_otherwise_all(pairs, tmp_path):
    write_pair(tmp_path / "both/train", "a")
    write_pair(tmp_path / "both/train", "b")
    write_pair(tmp_path / "both/test", "c")
    write_pair(tmp_path / "both/test", "d")
    for part, names in (("train", ["a.png", "b.png"]), ("test", ["c.png", "d.png"])):
        assert load(options(tmp_path / "both"), part)[0].names == names
        assert len(load(options(pairs), part)[0]) == 5


@pytest.mark.parametrize("padding", [((0, 0), (1, 1)), ((2, 2), (0, 0))])
@pytest.mark.parametrize("step", [1, 3])
def test_picture_and_map_are_cut_alike_whatever_their_shape_and_size(tmp_path, padding, step):
    blocks = np.random.default_rng(0).integers(0, 7, (4, 4)).astype(np.uint8)
    label = np.pad(blocks, padding, constant_values=6).repeat(12, 0).repeat(12, 1)
    for name in "ab":
        write_pair(tmp_path, name, label)
        Image.fromarray(40 * label[::step, ::step]).save(tmp_path / f"labels/{name}.png")
    image, seg = load(options(tmp_path, size=16))[0][0]
    assert np.array_equal(seg, 40 * blocks.repeat(4, 0).repeat(4, 1))
    within = np.ix_(*[np.arange(16).reshape(4, 4)[:, 1:3].ravel()] * 2)  # off the edges of blocks
    assert np.array_equal(np.rint(image[:, :, 0] / 30)[within], seg[within] / 40)


def test_a_side_that_was_rounded_is_the_same_shape_and_another_is_refused(tmp_path):
    label = np.tile(np.arange(3), (64, 31))[:, :91]
    for name in "ab":
        write_pair(tmp_path, name, label)
    for size, fits in (((30, 21), True), ((31, 22), True), ((45, 32), True), ((45, 30), False)):
        Image.fromarray(label.astype(np.uint8)).resize(size, 0).save(tmp_path / "labels/b.png")
        if fits:
            assert load(options(tmp_path))[0][1][1].shape == (16, 16)
        else:
            message = refused(options(tmp_path))
            assert "b.png is 45x30, its picture 91x64" in message


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".JPG"])
def test_pairs_are_found_at_any_depth_and_with_any_suffix(tmp_path, suffix):
    for name in ("a", "deep/a", "deep/er/c.1"):
        write_pair(tmp_path, name, suffix=suffix)
    (tmp_path / "README.md").write_text("no picture")
    data, _, _ = load(options(tmp_path))
    assert data.names == [f"{name}{suffix}" for name in ("a", "deep/a", "deep/er/c.1")]
    assert data.pairs[f"deep/er/c.1{suffix}"] == "deep/er/c.1.png"


def test_a_zip_gives_what_its_folder_gives_at_its_top_or_below_it(pairs, tmp_path):
    images, labels = load(options(pairs))[0].all()
    for top in ("", "set/"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
            for path in pairs.rglob("*.png"):
                z.write(path, f"{top}{path.relative_to(pairs)}")
        zipped = load(options(tmp_path / "a.zip"))[0].all()
        assert torch.equal(images, zipped[0]) and torch.equal(labels, zipped[1])


def test_indices_of_palettes_and_black_and_white_are_classes(tmp_path):
    for name in "ab":
        write_pair(tmp_path / "P", name, mode="P")
        write_pair(tmp_path / "1", name, WIDE % 2)
        Image.fromarray(WIDE % 2 > 0).save(tmp_path / f"1/labels/{name}.png")
    assert Image.open(tmp_path / "P/labels/a.png").mode == "P"
    assert Image.open(tmp_path / "1/labels/a.png").mode == "1"
    for mode, K in (("P", 7), ("1", 2)):
        write_pair(tmp_path / "L", "a", WIDE % K)
        write_pair(tmp_path / "L", "b", WIDE % K)
        data, _, classes = load(options(tmp_path / mode))
        assert classes == [str(k) for k in range(K)]
        assert torch.equal(data.all()[1], load(options(tmp_path / "L"))[0].all()[1])


def test_names_of_classes_come_from_a_file_and_may_be_more_than_are_seen(pairs, tmp_path):
    (tmp_path / "names.txt").write_text("sky\n a b \r\n\nc\nd\ne\nf\ng\nnever seen\n\n")
    _, _, classes = load(options(pairs, classes=str(tmp_path / "names.txt")))
    assert classes == ["sky", "a b", "c", "d", "e", "f", "g", "never seen"]


def test_names_of_classes_may_come_with_the_data_and_others_be_given(pairs, tmp_path):
    (pairs / "classes.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    assert load(options(pairs))[2] == list("abcdefgh")
    (tmp_path / "names.txt").write_text("1\n2\n3\n4\n5\n6\n7\n")
    assert load(options(pairs, classes=tmp_path / "names.txt"))[2] == list("1234567")
    (pairs / "images").rename(pairs / "train-images")
    for part in ("train", "test"):
        shutil.copytree(pairs / "train-images", pairs / part / "images")
        shutil.copytree(pairs / "labels", pairs / part / "labels")
    shutil.rmtree(pairs / "train-images"), shutil.rmtree(pairs / "labels")
    assert load(options(pairs), "test")[2] == list("abcdefgh")
    for top in ("", "set/"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
            for path in pairs.rglob("*.*"):
                z.write(path, f"{top}{path.relative_to(pairs)}")
        assert load(options(tmp_path / "a.zip"))[2] == list("abcdefgh")
    (pairs / "classes.txt").write_text("a\nb\n")
    assert "a.png holds label 6; with 2 classes they go to 1" in refused(options(pairs))
    (pairs / "classes.txt").write_text("a\n")
    assert "classes.txt: 1 lines; 2 to 255 different names" in refused(options(pairs))


def test_the_19_classes_of_celebamask_are_joined_when_asked_and_not_otherwise(tmp_path, capsys):
    raw = np.arange(19).repeat(16)[None].repeat(304, 0)
    for name in "ab":
        write_pair(tmp_path, name, raw % 9)
        Image.fromarray(raw.astype(np.uint8)).save(tmp_path / f"labels/{name}.png")
    data, _, classes = load(options(tmp_path, group="celebamask", size=512))
    assert len(classes) == 13 and capsys.readouterr().err == ""
    assert (classes[5], classes[10], classes[12]) == ("nose", "glasses", "earring")
    seen = data[0][1][0, np.rint((np.arange(19) + 0.5) * 512 / 19).astype(int)].tolist()
    assert seen == [0, 1, 5, 10, 2, 2, 3, 3, 6, 6, 4, 4, 4, 7, 11, 12, 8, 8, 9]
    _, _, classes = load(options(tmp_path))
    assert len(classes) == 19
    assert capsys.readouterr().err.startswith("19 classes: ")


def test_a_pair_with_a_damaged_file_is_named_and_its_neighbour_stands_in(tmp_path, capsys):
    for k in range(200):
        write_pair(tmp_path, f"{k:03}", np.full((8, 8), k % 5))
    bad = ["images/007.png", "labels/100.png"]
    for name in bad:
        (tmp_path / name).write_bytes(b"no picture")
    data, _, _ = load(options(tmp_path, size=8))
    images, labels = data.all()
    assert len(images) == len(labels) == 198
    assert (data[7][1] == 3).all() and (data[100][1] == 1).all()
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == [f"skipped {name}" for name in bad]
    (tmp_path / "labels/150.png").write_bytes(b"no map")
    assert "3 of 200 pictures are damaged" in refused(options(tmp_path, size=8))


def test_a_mistake_in_labelled_pictures_is_one_line_that_names_it(pairs, tmp_path):
    def remove(folder, *names):
        for name in names:
            (folder / name).unlink()

    write_pair(tmp_path / "alone", "a")
    write_pair(tmp_path / "alone", "b")
    write_pair(tmp_path / "alone", "c")
    remove(tmp_path / "alone", "images/b.png", "labels/c.png", "labels/a.png")
    message = refused(options(tmp_path / "alone"))
    assert "2 pictures without a partner, a.png for one; 1 label maps without" in message
    assert "b.png for one" in message

    write_pair(tmp_path / "twice", "a")
    write_pair(tmp_path / "twice", "a", suffix=".jpg")
    assert "a.jpg and a.png have one name" in refused(options(tmp_path / "twice"))

    write_pair(tmp_path / "none", "a")
    write_pair(tmp_path / "none", "b")
    for kind in ("images", "labels"):
        (tmp_path / "none" / kind).rename(tmp_path / "none/other")
        message = refused(options(tmp_path / "none"))
        assert f"no folder {kind} in it" in message and "Expected: images and labels" in message
        (tmp_path / "none/other").rename(tmp_path / "none" / kind)

    (tmp_path / "few.txt").write_text("a\nb\nc\n")
    message = refused(options(pairs, classes=tmp_path / "few.txt"))
    assert "a.png holds label 6; with 3 classes they go to 2" in message
    (tmp_path / "same.txt").write_text("a\nb\na\n")
    assert "2 to 255 different names" in refused(options(pairs, classes=tmp_path / "same.txt"))
    assert "No such file" in refused(options(pairs, classes=tmp_path / "missing.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert "not a text file" in refused(options(pairs, classes=tmp_path / "bytes.txt"))

    write_pair(tmp_path / "raw", "a", WIDE + 13)
    write_pair(tmp_path / "raw", "b", WIDE + 13)
    assert "a.png holds label 19; with 19 classes they go to 18" in refused(
        options(tmp_path / "raw", group="celebamask")
    )
    write_pair(tmp_path / "mask", "a", 255 * (WIDE % 2))
    write_pair(tmp_path / "mask", "b")
    assert (
        "a.png holds label 255; with 255 classes they go to 254. Save masks of two classes"
        in refused(options(tmp_path / "mask"))
    )
    write_pair(tmp_path / "jpeg", "a")
    write_pair(tmp_path / "jpeg", "b")
    for path in (tmp_path / "jpeg/labels").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert "a.jpg is a JPEG, which changes labels" in refused(options(tmp_path / "jpeg"))
    write_pair(tmp_path / "flat", "a", 0 * WIDE)
    write_pair(tmp_path / "flat", "b", 0 * WIDE)
    assert "all labels are 0" in refused(options(tmp_path / "flat"))
    assert "a.png is 40x24, not square" in refused(options(pairs, size=None))
    write_pair(tmp_path / "one", "a")
    assert "one picture is no set" in refused(options(tmp_path / "one"))


# ---- augmented pairs, planes of classes -------------------------------------------------------


def draws(image, label, n=200, **options):
    return [augment_pair(image, label, np.random.default_rng(k), **options) for k in range(n)]


def test_an_augmented_picture_and_its_map_stay_aligned_and_what_moves_in_is_black_and_no_class():
    label = np.kron(np.arange(16).reshape(4, 4), np.ones((16, 16))).astype(np.uint8)
    image = np.repeat(15 * label[:, :, None] + 15, 3, 2)
    shares, wrong = [], 0
    for moved, seg in draws(image, label):
        assert moved.shape == image.shape and seg.shape == label.shape
        assert moved.dtype == seg.dtype == np.uint8
        outside = seg == NO_CLASS
        wrong += ((moved.max(2) == 0) != outside).sum()
        shown = np.rint(moved[:, :, 0] / 15) - 1
        shares.append((shown == seg)[~outside].mean())
    assert wrong <= 5  # of 819,200: Pillow's nearest pixels have places of 16 binary digits
    assert min(shares) > 0.8  # pixels between blocks hold mixed colours
    assert np.mean([seg.max() == NO_CLASS for _, seg in draws(image, label)]) > 0.3


def test_left_and_right_change_places_in_a_mirrored_pair(tmp_path):
    names = ["sky", "l_eye", "r_eye", "neck_l", "Left ear", "Right ear", "brow"]
    names += ["RIGHT_EYE", "LEFT_EYE"]
    table = common.mirror_table(names)
    assert table.tolist() == [0, 2, 1, 3, 5, 4, 6, 8, 7, *range(9, 256)]
    for k in range(2):  # the left half is class 1, the right 2
        write_pair(tmp_path, str(k), np.repeat([[1, 2]], 8, 1).repeat(16, 0))
    (tmp_path / "classes.txt").write_text("sky\nleft\nright\n")
    data, _, _ = load(options(tmp_path))
    image, label = data[0]
    for moved, seg in draws(image, label, 20, affine=False, swap=data.swap):
        assert np.array_equal(seg, label)
        assert np.array_equal(moved, image) or np.array_equal(moved, image[:, ::-1])


def test_enlarged_pictures_are_said_to_be(pairs, capsys):
    load(options(pairs, size=8)), load(options(size=64))
    assert "enlarged" not in capsys.readouterr().out
    load(options(pairs, size=256))
    assert "pixels are enlarged to 256" in capsys.readouterr().out


def test_half_of_the_pairs_are_mirrored_and_without_affine_nothing_else_happens():
    data, _, _ = load(options(size=32))
    image, label = data[0]
    mirrored = 0
    for moved, seg in draws(image, label, affine=False):
        which = not np.array_equal(seg, label)
        mirrored += which
        assert np.array_equal(moved, image[:, ::-1] if which else image)
        assert np.array_equal(seg, label[:, ::-1] if which else label)
    assert 80 < mirrored < 120
    assert all(a is image and b is label for a, b in draws(image, label, flip=False, affine=False))


def test_moves_are_the_official_ones_in_range_and_share():
    """A dot at the centre moves by the shift; another tells the angle and the scale."""
    label = np.zeros((401, 401), np.uint8)
    label[195:206, 195:206], label[195:206, 295:306] = 1, 2
    image, found = np.zeros((401, 401, 3), np.uint8), []
    for _, seg in draws(image, label, 300, flip=False):
        a, b = (np.argwhere(seg == k).mean(0) for k in (1, 2))
        y, x = b - a
        found.append([*((a - 200) / 401), np.hypot(x, y) / 100, np.degrees(np.arctan2(y, x))])
    still = np.array([np.allclose(f, [0, 0, 1, 0]) for f in found])
    assert 120 < still.sum() < 180
    moved = np.array(found)[~still]
    limits = np.array([[-0.1, 0.1], [-0.1, 0.1], [0.8, 1.2], [-15, 15]])
    slack = np.array([0.002, 0.002, 0.01, 0.5])
    width = limits[:, 1] - limits[:, 0]
    for k in range(4):
        assert limits[k, 0] - slack[k] < moved[:, k].min() < limits[k, 0] + 0.1 * width[k]
        assert limits[k, 1] - 0.1 * width[k] < moved[:, k].max() < limits[k, 1] + slack[k]
        assert abs(moved[:, k].mean() - limits[k].mean()) < 0.08 * width[k]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_planes_of_classes_hold_1_where_the_class_is_and_minus_1_elsewhere(dtype):
    labels = torch.tensor([[[0, 2], [1, NO_CLASS]]], dtype=dtype)
    planes = common.one_hot_seg(labels, 3)
    assert planes.dtype == torch.float32
    assert planes.tolist() == [[[[1, -1], [-1, -1]], [[-1, -1], [1, -1]], [[-1, 1], [-1, -1]]]]


# ---- pictures of regions ----------------------------------------------------------------------


def test_classes_have_the_official_colours_and_further_ones_that_are_all_different():
    official = {1: (239, 234, 90), 7: (107, 137, 198), 12: (207, 113, 192), 16: (116, 95, 159)}
    for K in (1, 13, 17, 18, 256):
        colors = common.SEG_COLORS[:K]
        assert colors.shape == (K, 3) and colors.dtype == torch.uint8
        assert len({tuple(color) for color in colors.tolist()}) == K
        for k, color in official.items():
            assert k >= K or tuple(colors[k].tolist()) == color


def test_labels_are_shown_in_the_colours_of_their_classes():
    labels = torch.tensor([[[0, 3, 40]], [[255, 12, 1]]], dtype=torch.uint8)
    pictures = common.color_labels(labels)
    assert pictures.shape == (2, 3, 1, 3) and pictures.dtype == torch.uint8
    for n, x in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        assert torch.equal(pictures[n, :, 0, x], common.SEG_COLORS[labels[n, 0, x].long()])


def test_inferno_spans_each_map_and_interpolates_between_its_colours():
    x = torch.tensor([[[-5.0, -4, -3, 4]], [[1, 1, 1, 1]]], dtype=torch.float64)
    pictures = common.inferno(x)
    assert pictures.shape == (2, 3, 1, 4) and pictures.dtype == torch.uint8
    assert [tuple(c) for c in pictures[0, :, 0].T.tolist()] == [
        common.INFERNO[k] for k in (0, 1, 2, 9)
    ]
    assert (pictures[1] == torch.tensor(common.INFERNO[0])[:, None, None]).all()
    middle = common.inferno(torch.tensor([[[0, 0.5, 1]]]))[0, :, 0, 1]
    assert (middle - torch.tensor([186.0, 56.5, 83])).abs().max() <= 0.5  # of INFERNO[4] and [5]


def test_a_difference_is_shown_on_a_fixed_scale():
    a = torch.zeros(1, 3, 1, 5, dtype=torch.uint8)
    b = a.clone()
    b[0, :, 0, 1], b[0, 0, 0, 2], b[0, :, 0, 3], b[0, :, 0, 4] = 64, 192, 128, 255
    for shown in (common.difference(a, b), common.difference(b, a)):
        colors = [tuple(c) for c in shown[0, :, 0].T.tolist()]
        assert colors[0] == common.INFERNO[0] and colors[3] == colors[4] == common.INFERNO[-1]
        assert colors[1] == colors[2] not in common.INFERNO
        assert torch.equal(shown, common.difference(*(common.to_float(x, "cpu") for x in (a, b))))


# ---- locality ---------------------------------------------------------------------------------


def disc(size, radius):
    y, x = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
    return (y**2 + x**2 <= radius**2)[None]


def test_an_edit_inside_its_region_has_share_1_and_one_far_off_share_0():
    before, region = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8), disc(64, 9)
    after = torch.where(region, 130, before)
    shares, outside = common.locality(before, after, region)
    assert shares.dtype == outside.dtype == torch.float64
    assert (shares.tolist(), outside.tolist()) == ([1], [0])
    shares, outside = common.locality(before, after.roll(32, 2), region)
    grown = region.clone()
    grown[0] = torch.nn.functional.max_pool2d(region.float(), 5, 1, 2) > 0  # 3% of 64: 2 pixels
    assert shares.tolist() == [0]
    assert outside.item() == pytest.approx(30 * region.sum().item() / (~grown).sum().item())


@pytest.mark.parametrize("size, reach", [(16, 1), (33, 1), (34, 2), (100, 3), (101, 4)])
def test_a_uniform_change_has_the_share_of_the_region_grown_by_3_percent_of_the_side(size, reach):
    region = torch.zeros(1, size, size, dtype=torch.bool)
    region[0, 8, 6:9] = True
    image = torch.zeros(1, 3, size, size)
    shares, outside = common.locality(image, image + 0.1, region)
    area = (2 * reach + 1) * (2 * reach + 3)
    assert shares.item() == pytest.approx(area / size**2)
    assert outside.item() == pytest.approx(12.75, rel=1e-6)


def test_the_share_is_of_squares_and_floats_count_as_their_8_bits():
    before = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    after, region = before.clone(), torch.zeros(1, 64, 64, dtype=torch.bool)
    region[0, 10, 10] = True
    after[0, 0, 10, 10], after[0, 1, 50, 50] = 90, 30
    shares, outside = common.locality(before, after, region)
    assert shares.item() == pytest.approx(8100 / 9000)
    assert outside.item() == pytest.approx(10 / (64 * 64 - 25))
    floats = [common.to_float(x, "cpu") for x in (before, after)]
    for a, b in zip(common.locality(*floats, region), (shares, outside), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_where_nothing_changes_there_is_no_share_and_where_all_is_inside_no_outside():
    image = torch.zeros(2, 3, 8, 8)
    region = torch.stack([torch.zeros(8, 8, dtype=torch.bool), torch.ones(8, 8, dtype=torch.bool)])
    shares, outside = common.locality(image, image, region)
    assert shares.isnan().all() and outside[0] == 0 and outside[1].isnan()
    line = common.describe_locality(shares, outside)
    assert "2 pairs, 2 without any change" in line and "inside" not in line and "0.00 of" in line
    assert "outside" not in common.describe_locality(shares, outside[1:])


def test_a_description_gives_medians_quartiles_and_counts():
    nan = float("nan")
    shares = torch.tensor([0.1, 0.2, nan, 0.4, 0.8, 0.9], dtype=torch.float64)
    outside = torch.tensor([1.0, nan, 0, 3, 2, 9], dtype=torch.float64)
    line = common.describe_locality(shares, outside)
    assert "6 pairs, 1 without any change" in line
    assert "40.0% are inside (quartiles 20.0%, 80.0%)" in line
    assert "2.00 of 255 levels" in line and "\n" not in line


# ---- attributes and their directions ----------------------------------------------------------


def test_attributes_of_regions_are_their_area_and_their_light():
    labels = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    images[0, 0, 1], images[0, 1, 1], images[0, 2, 1], images[1] = 100, 200, 50, 255
    area, light = (
        [score(k, images, labels).tolist() for k in range(3)]
        for score in (common.region_area, common.region_light)
    )
    assert area == [[0.25, 1], [0.75, 0], [0, 0]]
    expected = (0.299 * 100 + 0.587 * 200 + 0.114 * 50) * 2 / 3
    nan = float("nan")
    assert light[0] == pytest.approx([0, 255])
    assert light[1:] == [
        pytest.approx([expected, nan], nan_ok=True),
        pytest.approx([nan] * 2, nan_ok=True),
    ]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale, shift", [(1, 0), (0.01, 3), (50, -100)])
def test_a_direction_is_the_normal_of_the_plane_between_two_sets(scale, shift):
    normal = torch.nn.functional.normalize(random(8, seed=1), dim=0)
    x = random(4000, 8)
    direction, accuracy = common.fit_direction(scale * x + shift, x @ normal > 0.5)
    assert direction.dtype == torch.float32 and direction.norm().item() == pytest.approx(1)
    assert direction @ normal > 0.995 and accuracy > 0.97
    opposite, _ = common.fit_direction(scale * x + shift, x @ normal <= 0.5)
    torch.testing.assert_close(opposite, -direction, rtol=0, atol=1e-5)


def test_the_plane_is_the_minimum_of_the_stated_objective_over_four_fifths_of_either_class():
    x, y = random(100, 3), torch.arange(100) % 3 == 0
    x[y] += 1
    direction, accuracy = common.fit_direction(x, y)
    learn = torch.ones(100, dtype=torch.bool)
    for of in (y, ~y):
        learn[of.nonzero()[4::5, 0]] = False
    x = (x.double() - x[learn].double().mean(0)) / x[learn].double().var(0).mean().sqrt()
    v = torch.zeros(4, dtype=torch.float64)
    for _ in range(3000):  # plain descent
        share = torch.sigmoid(x[learn] @ v[:3] + v[3])
        slope = (share - y[learn].double()) / learn.sum()
        v[:3] -= 0.5 * (x[learn].T @ slope + 0.01 * v[:3])
        v[3] -= 0.5 * slope.sum()
    torch.testing.assert_close(direction, (v[:3] / v[:3].norm()).float(), rtol=0, atol=1e-5)
    right = (x @ v[:3] + v[3] > 0) == y
    assert accuracy == pytest.approx(right[~learn].double().mean().item())


def test_accuracy_is_of_samples_that_were_not_learned_from():
    _, accuracy = common.fit_direction(random(100, 400), torch.arange(100) % 2 == 0)
    assert 0.2 < accuracy < 0.8  # a plane splits the 80 that it learns from, by chance


def test_directions_need_ten_samples_of_either_class():
    x, y = random(100, 3), torch.arange(100) < 9
    for of in (y, ~y, torch.zeros(100, dtype=torch.bool)):
        with pytest.raises(UserError, match=f"{of.sum()} of 100 samples have the attribute"):
            common.fit_direction(x, of)
    common.fit_direction(x, torch.arange(100) < 10)


def stripes_model(w):
    """Three regions of a third each; w[:, k] is the light of region k, w[:, 3] moves the border."""
    n, edge = len(w), (8 + (3 * w[:, 3]).clamp(-7, 7).round()).long()
    x = torch.arange(24)[None]
    labels = ((x >= edge[:, None]).long() + (x >= 16)).to(torch.uint8)  # (n, 24)
    light = w[:, :3].gather(1, labels.long())
    images = common.to_uint8(0.2 * light)[:, None, None].expand(n, 3, 24, 24)
    return images.contiguous(), labels[:, None].expand(n, 24, 24).contiguous()


@pytest.fixture
def edited(tmp_path):
    """edit(text, render=...) -> what edit_directions finds of the attributes in text."""

    def edit(text, render=None, **options):
        defaults = dict(alpha=2.0, batch=70, seeds=[3, 4, 9], out=str(tmp_path / "out"))
        args = argparse.Namespace(**defaults | options)
        attributes = common.attributes_of(text, ["left", "middle", "ri/ght"])
        render = render or (lambda w, move, a: stripes_model(w if move is None else w + move))
        return common.edit_directions(
            args, attributes, random(600, 4), random(3, 4, seed=1), render
        )

    return edit


def test_an_edit_finds_the_latent_number_of_an_attribute_and_changes_its_region_only(
    edited, tmp_path, capsys
):
    found = edited("left.light, ri/ght.light,left.area")
    assert list(found) == ["left.light", "ri/ght.light", "left.area"]
    for (name, row), k in zip(found.items(), (0, 2, 3), strict=True):
        assert row["direction"][k] > 0.98, name
        assert row["deviation"] == pytest.approx(1, abs=0.1) and row["accuracy"] > 0.9
        assert row["before"] == pytest.approx(0.5, abs=0.12) and row["after"] > 0.9
        assert len(row["inside"]) == len(row["outside"]) == common.PAIRS == 200
        assert row["inside"].median() > 0.98 and row["outside"].median() < 3
    out = capsys.readouterr().out
    assert "ri/ght.light: locality, medians of 200 pairs, 0 without any change; of the" in out
    assert f"the plane is right on {found['left.area']['accuracy']:.1%} of held-out" in out
    names = {"left.light.png", "ri-ght.light.png", "left.area.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_an_edit_that_changes_everything_has_the_share_of_its_grown_region(edited):
    def render(w, move, attribute):
        images, labels = stripes_model(w * torch.tensor([1, 1, 1, 0]))
        return images + (0 if move is None else 10), labels

    row = edited("middle.light", render)["middle.light"]
    assert row["inside"].median().item() == pytest.approx(10 / 24)
    assert row["outside"].median().item() == pytest.approx(10)


def test_alpha_counts_deviations_and_0_changes_nothing(edited, capsys):
    moves = []

    def render(w, move, attribute):
        moves.append((move, attribute))
        return stripes_model(w if move is None else w + move)

    row = edited("left.light", render, alpha=-1.5)["left.light"]
    move, attribute = next(m for m in moves if m[0] is not None)
    torch.testing.assert_close(move, -1.5 * row["deviation"] * row["direction"])
    assert attribute.classes == (0,) and row["after"] < row["before"]
    assert moves[0] == (None, None)
    row = edited("left.light", alpha=0)["left.light"]
    assert row["before"] == row["after"] and row["inside"].isnan().all()
    assert "200 pairs, 200 without any change" in capsys.readouterr().out


def test_samples_without_a_region_do_not_count_for_its_light_and_a_missing_one_is_refused(edited):
    def render(w, move, attribute):
        images, labels = stripes_model(w if move is None else w + move)
        labels[w[:, 1] > 0.5] = 0
        return images, labels

    row = edited("ri/ght.light", render)["ri/ght.light"]
    assert row["direction"][2] > 0.9 and row["before"] == pytest.approx(0.5, abs=0.08)
    with pytest.raises(UserError, match="--direction ri/ght.light: 0 of 0 samples"):
        edited("ri/ght.light", lambda *args: (render(*args)[0], 0 * render(*args)[1]))


def test_attributes_are_those_of_regions_and_on_toy_those_of_its_faces(monkeypatch, capsys):
    quick = dict(size=8, faces=320, held_out=100, epochs=1)
    mouth, bright = common.attributes_of("mouth open,nose.light", TOY_REGIONS, quick)
    assert mouth.classes == (TOY_REGIONS.index("mouth"),) and mouth.threshold == 0
    assert bright.classes == (TOY_REGIONS.index("nose"),) and bright.threshold is None
    net, accuracy = common.toy_classifier(**quick)
    images, _ = common.toy_examples(range(40), 0, 8)
    expected = net(common.to_float(images, "cpu"))[:, list(common.TOY_BINARY).index("mouth open")]
    torch.testing.assert_close(mouth.score(images, None), expected.double())
    out = capsys.readouterr().out
    assert f"mouth open: the classifier is right on {accuracy['mouth open']:.1%}" in out
    assert "glasses" not in out
    labels = torch.from_numpy(np.stack([common.toy_labels(k, 0, 8) for k in range(40)]))
    found = common.region_light(TOY_REGIONS.index("nose"), images, labels)
    assert bright.score(images, labels).tolist() == pytest.approx(found.tolist(), nan_ok=True)
    with pytest.raises(UserError, match="no 'mouth open'; there are a.area, a.light, b.area"):
        common.attributes_of("a.area,mouth open", ["a", "b"])


def test_toy_faces_of_one_domain_have_their_own_regions():
    image, label = load(options("toy/goblin"), "test")[0][4]
    assert np.array_equal(image, np.asarray(common.toy_face(30_004, 1, 16)))
    assert np.array_equal(label, np.asarray(common.toy_labels(30_004, 1, 16)))
    assert "there are toy/human, toy/goblin, toy/robot" in refused(options("toy/elf"))


# ---- a segmenter ------------------------------------------------------------------------------


class Stripes:
    """Labelled pictures whose class is which channel is brightest, in stripes of random width."""

    def __init__(self, n=60, size=16, seed=0):
        self.n, self.size, self.seed = n, size, seed
        self.swap = common.mirror_table("abc")

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        label = np.sort(rng.integers(0, 3, self.size)).astype(np.uint8)
        label = np.tile(rng.permutation(3).astype(np.uint8)[label], (self.size, 1))
        image = rng.integers(0, 100, (self.size, self.size, 3), dtype=np.uint8)
        image += (120 * (label[:, :, None] == np.arange(3))).astype(np.uint8)
        return image, label

    def all(self):
        images, labels = zip(*(self[i] for i in range(self.n)), strict=True)
        return common.stack(images), torch.from_numpy(np.stack(labels))


TINY = dict(K=3, size=16, steps=30, batch=8)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A short training: the network, the folder of its file, torch's random state around it."""
    folder = tmp_path_factory.mktemp("segmenter")
    before = torch.get_rng_state()
    net = common.load_segmenter(Stripes(), folder=folder, **TINY)
    return net, folder, before, torch.get_rng_state()


def test_a_segmenter_learns_classes_and_says_how_right_it_is_on_pictures_it_did_not_see(learned):
    net, *_ = learned
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.scores["n"] == 7 and net.scores["accuracy"] > 0.95
    images, labels = Stripes(40, seed=1).all()
    seen = common.segment(net, images)
    assert seen.shape == labels.shape and seen.dtype == torch.uint8
    iou, accuracy = common.mean_iou(seen, labels, 3)
    assert accuracy == pytest.approx(net.scores["accuracy"], abs=0.03)
    assert iou == pytest.approx(net.scores["mean_iou"], abs=0.06)


def test_its_training_is_a_pure_function_and_leaves_the_random_state_alone(learned):
    net, _, before, after = learned
    assert torch.equal(before, after)
    torch.rand(3)
    for seed in (0, 1):
        other = common.load_segmenter(Stripes(), seed=seed, **TINY)
        same = [
            torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True)
        ]
        assert all(same) if seed == 0 else not all(same)


def test_a_segmenter_is_read_from_its_folder_unless_data_or_options_changed(
    learned, monkeypatch, capsys
):
    net, folder, *_ = learned
    images = Stripes(5).all()[0]

    def no_training(*args):
        raise InterruptedError

    monkeypatch.setattr(common, "train_segmenter", no_training)
    again = common.load_segmenter(Stripes(), folder=folder, **TINY)
    assert torch.equal(common.segment(again, images), common.segment(net, images))
    assert again.scores == net.scores and not again.training
    assert f"on 7 pictures that it did not learn from: {net.scores['accuracy']:.1%}" in (
        capsys.readouterr().out
    )
    for data, changed in ((Stripes(seed=1), {}), (Stripes(), {"seed": 1}), (Stripes(), {"K": 4})):
        with pytest.raises(InterruptedError):
            common.load_segmenter(data, folder=folder, **TINY | changed)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InterruptedError):
        common.load_segmenter(Stripes(), folder=folder, **TINY)
    file.write_bytes(whole)
    assert f"{file} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("size", [8, 16, 128, 256, 512])
def test_a_segmenter_takes_every_size_and_averages_large_pictures_to_128_pixels(size):
    net, x = common.Segmenter(5).eval(), random(1, 3, size, size)
    factor = max(1, size // 128)
    small = net(x.reshape(1, 3, size // factor, factor, -1, factor).mean([3, 5]))
    logits = net(x)
    assert logits.shape == (1, 5, size, size)
    enlarged = torch.nn.functional.interpolate(small, (size, size), mode="bilinear")
    torch.testing.assert_close(logits, enlarged, rtol=1e-4, atol=1e-5)


def test_pictures_that_a_segmenter_is_judged_by_are_not_learned_from():
    class Plain(Stripes):
        def __getitem__(self, k):
            return np.full((8, 8, 3), 200 * k, np.uint8), np.full((8, 8), k, np.uint8)

    pictures = Plain(2, 8)
    net = common.load_segmenter(pictures, 2, 8, steps=20)  # of two pictures, one is held out
    assert net.scores == {"accuracy": 0, "mean_iou": 0, "n": 1}


def test_large_pictures_are_learned_at_128_pixels():
    net = common.load_segmenter(Stripes(4, 256), **TINY | dict(size=256, steps=2, batch=2))
    assert net.scores["n"] == 1


def test_agreement_is_counted_over_the_classes_that_appear():
    a = torch.tensor([[[0, 0, 1, 1, NO_CLASS]]], dtype=torch.uint8)
    b = torch.tensor([[[0, 1, 1, 4, 1]]], dtype=torch.uint8)
    iou, accuracy = common.mean_iou(a, b, 8)
    assert iou == pytest.approx((1 / 2 + 1 / 3 + 0) / 3) and accuracy == pytest.approx(0.5)
    assert common.mean_iou(a, a, 8) == (1, 1)
    assert common.mean_iou(b, a, 8) == (iou, accuracy)
