"""Official checkpoints: what they hold arrives, and nothing in them is ever run.

The attacks are real pickles: pickle.load would run them, and most would make a marker file.
"""

import argparse
import collections
import functools
import io
import operator
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from official_files import (
    EasyDict,
    module,
    write_pickle,
    write_pytorch_pickle,
    write_rosinality,
    write_tf_pickle,
)

from common import UserError, read_official

RNG = np.random.default_rng(0)
TORCH_NAMES = {
    "mapping.fc0.weight": (4, 4),
    "mapping.w_avg": (4,),
    "synthesis.b4.const": (3, 4, 4),
    "synthesis.b4.conv1.weight": (3, 2, 3, 3),
    "synthesis.b4.conv1.noise_const": (4, 4),
    "synthesis.b4.conv1.noise_strength": (),
    "synthesis.b4.resample_filter": (4, 4),
}
TF_NAMES = {
    "dlatent_avg": (4,),
    "lod": (),
    "mapping/Dense0/weight": (4, 4),
    "synthesis/4x4/Const/const": (1, 3, 4, 4),
    "synthesis/4x4/Conv/weight": (3, 3, 2, 3),
    "synthesis/noise0": (1, 1, 4, 4),
}
KWARGS = {"z_dim": 4, "synthesis_kwargs": EasyDict(num_fp16_res=0, act=("lrelu", np.float64(2.5)))}
PLAIN = {"z_dim": 4, "synthesis_kwargs": {"num_fp16_res": 0, "act": ["lrelu", 2.5]}}


def arrays_of(shapes):
    return {k: RNG.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def assert_same(network, arrays):
    assert list(network.arrays.keys() ^ arrays.keys()) == []
    for name, array in arrays.items():
        expected = array if torch.is_tensor(array) else torch.from_numpy(np.array(array))
        assert network.arrays[name].dtype == expected.dtype
        assert torch.equal(network.arrays[name], expected), name


# ---- what the files hold ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol, old_numpy", [(2, True), (3, True), (3, False), (4, True), (4, False), (5, True)]
)
def test_a_pytorch_pickle_comes_back_bit_by_bit(tmp_path, protocol, old_numpy):
    nets = {name: arrays_of(TORCH_NAMES) for name in ("G", "D", "G_ema")}
    path = tmp_path / "a.pkl"
    write_pytorch_pickle(path, nets, KWARGS, protocol, old_numpy=old_numpy)
    result = read_official(path)
    assert list(result) == ["G", "D", "G_ema"]
    for name, network in result.items():
        assert network.kind == "pytorch" and network.options == PLAIN
        assert_same(network, nets[name])


def test_an_augment_pipe_and_one_network_under_two_names_come_back(tmp_path):
    G, pipe = module(arrays_of(TORCH_NAMES), "Generator"), {"w_avg": np.float32(0.25)}
    pipe = module(pipe, "AugmentPipe", {"xflip": 1})
    write_pickle(tmp_path / "a.pkl", {"G": G, "G_ema": G, "augment_pipe": pipe})
    result = read_official(tmp_path / "a.pkl")
    assert list(result) == ["G", "G_ema", "augment_pipe"]
    assert result["augment_pipe"].options == {"xflip": 1}
    assert result["augment_pipe"].arrays["w_avg"].item() == 0.25


def test_strided_shared_half_and_empty_tensors_come_back(tmp_path):
    base = torch.arange(240.0)
    arrays = {
        "a": base[:108].view(3, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        "b": base[20:40].view(4, 5),
        "c": base[30:50].view(4, 5).t(),
        "d": base[::3],
        "e": torch.zeros(0, 3),
        "f": torch.tensor(2.5),
        "g": base.half()[:6].view(2, 3),
        "h": base.bfloat16()[:5],
        "i.w_avg": torch.arange(5),
    }
    write_pytorch_pickle(tmp_path / "a.pkl", {"G_ema": arrays})
    network = read_official(tmp_path / "a.pkl")["G_ema"]
    assert_same(network, arrays)
    assert network.arrays["a"].stride() == arrays["a"].stride()


def test_a_storage_that_was_on_a_gpu_is_read_on_the_cpu(tmp_path):
    arrays = {"weight": np.arange(99, dtype=np.float32)}  # over 255 bytes
    write_pytorch_pickle(tmp_path / "a.pkl", {"G": arrays}, protocol=3)
    data = (tmp_path / "a.pkl").read_bytes()
    start = data.index(b"\x80\2\x8a\nl\xfc\x9cF") - 4  # torch.save's stream, after its length
    n = int.from_bytes(data[start : start + 4], "little") + len("cuda:0") - len("cpu")
    data = data[:start] + n.to_bytes(4, "little") + data[start + 4 :]
    data = data.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
    (tmp_path / "a.pkl").write_bytes(data)
    network = read_official(tmp_path / "a.pkl")["G"]
    assert_same(network, arrays)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_tensorflow_pickle_comes_back_bit_by_bit(tmp_path, version, protocol):
    nets = {name: arrays_of(TF_NAMES) for name in ("G", "D", "Gs")}
    nets["G"]["lod"] = np.float32(0.5)  # a NumPy scalar
    nets["D"] = {
        "4x4/Conv/weight": np.asfortranarray(nets["D"]["mapping/Dense0/weight"]),
        "big": np.arange(3, dtype=">f8"),
        "flag": np.array([True, False]),
        "half": np.zeros((2, 2), np.float16),
    }
    if protocol > 2:
        nets["D"]["none"] = np.zeros((0, 2), np.int64)
    write_tf_pickle(tmp_path / "a.pkl", nets, KWARGS, version, protocol, old_numpy=version < 5)
    nets["D"]["big"] = nets["D"]["big"].astype("f8")
    result = read_official(tmp_path / "a.pkl")
    assert list(result) == ["G", "D", "Gs"]
    for name, network in result.items():
        assert network.kind == "tensorflow" and network.options == PLAIN
        assert_same(network, nets[name])


def test_a_pickle_of_python_2_whose_bytes_are_texts_is_read(tmp_path):
    def text(data):  # SHORT_BINSTRING
        return b"U" + bytes([len(data)]) + data

    raw = np.array([1.5, -2.0], np.float32).tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"f4") + b"K\0K\1\x87R(K\3" + text(b"<") + b"NNNtb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    )
    array += b"(K\1K\2\x85" + dtype + b"\x89" + text(raw) + b"tb"
    net = b"cdnnlib.tflib.network\nNetwork\n)\x81}" + text(b"variables")
    net += b"]" + text(b"lod") + array + b"\x86asb"
    (tmp_path / "a.pkl").write_bytes(b"\x80\2" + net * 3 + b"\x87.")
    assert_same(read_official(tmp_path / "a.pkl")["Gs"], {"lod": np.array([1.5, -2], np.float32)})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_rosinality_file_comes_back_bit_by_bit(tmp_path, zipped):
    nets = {name: arrays_of(TORCH_NAMES) for name in ("g_ema", "g", "d")}
    average = np.arange(4, dtype=np.float32)
    args = argparse.Namespace(size=256, lr=0.002, ckpt=None, more={"a": (1, 2)})
    write_rosinality(tmp_path / "a.pt", nets, average, args, zipped)
    result = read_official(tmp_path / "a.pt")
    assert list(result) == ["g_ema", "g", "d"]
    assert_same(result["g_ema"], {**nets["g_ema"], "latent_avg": average})
    assert_same(result["g"], {**nets["g"], "latent_avg": average})
    assert_same(result["d"], nets["d"])
    assert result["d"].kind == "rosinality"
    assert result["d"].options == {"size": 256, "lr": 0.002, "ckpt": None, "more": {"a": [1, 2]}}


# ---- what is no official file ----------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"<!DOCTYPE html><html>", b"a text\n" * 99, b"PK\3\4" + bytes(99), b"\x80", b"\x80\4."]
    + [pickle.dumps(x) for x in (1, [], {}, (1, 2, 3), {"G": 1}, {"a": "b"}, {"G": {}}, (), "G")]
    + [pickle.dumps({"G": None, "G_ema": None}), b"\x80\2\x88.", bytes(1000)],
)
def test_something_else_is_one_line_to_the_user(tmp_path, data):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(UserError) as e:
        read_official(tmp_path / "a.pkl")
    assert "a.pkl" in str(e.value) and "\n" not in str(e.value)


def test_a_missing_file_a_folder_and_a_strange_zip_are_refused(tmp_path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UserError, match="Name an official"):
            read_official(path)
    for name, value in [("data.pkl", b"x"), ("archive/data.pkl", pickle.dumps({"g_ema": 1}))]:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
            z.writestr(name, value)
        with pytest.raises(UserError, match="a.pt"):
            read_official(tmp_path / "a.pt")
    torch.save({"model": "cyclegan", "config": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no network under"):
        read_official(tmp_path / "a.pt")


def test_a_compressed_pt_that_grows_is_refused(tmp_path):
    write_rosinality(tmp_path / "a.pt", {"g_ema": {"a": np.zeros(300_000, np.float32)}})
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="b.pt"):
        read_official(tmp_path / "b.pt")


def small_files(folder):
    arrays = {"fc.weight": np.ones((2, 3), np.float32), "w_avg": np.zeros(2, np.float32)}
    tf = {"synthesis/a": np.ones((2, 3), np.float32), "lod": np.float32(0)}
    write_pytorch_pickle(folder / "a.pkl", {"G": arrays}, {"z_dim": 4})
    write_tf_pickle(folder / "b.pkl", {"G": tf, "D": {}, "Gs": tf}, {"a": np.float64(1)})
    args = argparse.Namespace(size=8)
    write_rosinality(folder / "c.pt", {"g_ema": arrays}, args=args, zipped=False)
    write_rosinality(folder / "d.pt", {"g_ema": arrays}, args=args)
    return sorted(folder.iterdir())


def test_every_beginning_of_a_file_is_refused_as_damaged(tmp_path):
    for path in small_files(tmp_path):
        data = path.read_bytes()
        read_official(path)
        for n in range(0, len(data), 1 if len(data) < 2000 else 7):
            path.write_bytes(data[:n])
            with pytest.raises(UserError):
                read_official(path)


@pytest.mark.filterwarnings("ignore")
def test_a_file_with_flipped_bytes_is_read_or_refused(tmp_path):
    rng = random.Random(0)
    for path in small_files(tmp_path):
        data = path.read_bytes()
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 5))):
                changed[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(changed)
            try:
                assert read_official(path)
            except UserError:
                pass


# ---- attacks ---------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


class Restored:
    """A class whose __setstate__ would run."""

    def __getstate__(self):
        return {"a": 1}

    def __setstate__(self, state):
        Path(os.environ["MARKER"]).touch()


def touch(marker):
    return f"touch {marker}"


ATTACKS = {
    "posix.system": lambda m: Call(os.system, touch(m)),
    "builtins.eval": lambda m: Call(eval, f"open({str(m)!r}, 'w')"),
    "builtins.exec": lambda m: Call(exec, f"open({str(m)!r}, 'w')"),
    "builtins.getattr": lambda m: Call(getattr, Call(set), "__class__"),
    "subprocess.Popen": lambda m: Call(subprocess.Popen, ["touch", str(m)]),
    "functools.partial": lambda m: functools.partial(os.system, touch(m)),
    "operator.attrgetter": lambda m: operator.attrgetter("system"),
    "numpy.load": lambda m: Call(np.load, str(m), None, True),
    "torch.serialization.load": lambda m: Call(torch.load, str(m)),
    "torch.storage.UntypedStorage": lambda m: Call(torch.UntypedStorage, 4),
    "collections.Counter": lambda m: collections.Counter("abc"),  # harmless, and not needed
    f"{__name__}.Restored": lambda m: Restored(),
}
OLD_NAMES = {"subprocess.Popen": "commands.Popen"}  # before protocol 3


def assert_refused(path, marker, name):
    with pytest.raises(UserError) as e:
        read_official(path)
    if name is not None:
        assert f"holds {name}," in str(e.value)
    assert not marker.exists()


@pytest.fixture
def marker(tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    return tmp_path / "marker"


def test_pickle_itself_runs_such_a_file(marker):
    pickle.loads(pickle.dumps(ATTACKS["posix.system"](marker)))
    assert marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_in_a_pickle_is_refused_by_name(tmp_path, marker, name, protocol):
    attack, good = ATTACKS[name](marker), arrays_of(TORCH_NAMES)
    path = tmp_path / "a.pkl"
    name = OLD_NAMES.get(name, name) if protocol == 2 else name
    shapes = {
        "alone": attack,
        "an entry": {"G": module(good, "G"), "x": attack},
        "deep inside": (1, [{"a": Call(set, [EasyDict(a=attack)])}]),
        "an option": {"G": module(good, "G", {"z_dim": [attack]})},
        "an argument": {"G": Call(torch._utils._rebuild_parameter, attack, True, {})},
    }
    for value in shapes.values():
        write_pickle(path, value, protocol)
        assert_refused(path, marker, name)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_call_inside_a_storage_or_a_pt_is_refused(tmp_path, marker, name):
    attack = ATTACKS[name](marker)
    inner = io.BytesIO()
    torch.save(attack, inner, _use_new_zipfile_serialization=False)
    path = tmp_path / "a.pkl"
    write_pickle(path, {"G": Call(torch.storage._load_from_bytes, inner.getvalue())})
    assert_refused(path, marker, OLD_NAMES.get(name, name))
    if name in ("collections.Counter", "torch.storage.UntypedStorage"):
        return  # torch.load knows these
    torch.save({"g_ema": {"a": torch.zeros(3)}, "args": attack}, path)
    assert_refused(path, marker, OLD_NAMES.get(name, name).removeprefix("builtins."))


RAW = {  # {what it tries: (pickle, name in the message or None)}; {} is a shell command
    "os.system": (b"\x80\2cos\nsystem\nX{}\x85R.", "os.system"),
    "nt.system": (b"\x80\2cnt\nsystem\nX{}\x85R.", "nt.system"),
    "protocol 0": (b"(cos\nsystem\nS'{}'\no.", None),
    "INST": (b"\x80\2(X{}ios\nsystem\n.", "os.system"),
    "INST of a known name": (b"\x80\2(icollections\nOrderedDict\n.", "collections.OrderedDict"),
    "OBJ": (b"\x80\2(ccollections\nOrderedDict\no.", "the pickle instruction OBJ"),
    "NEWOBJ_EX": (b"\x80\4ccollections\nOrderedDict\n)}\x92.", "the pickle instruction NEWOBJ_EX"),
    "EXT1": (b"\x80\2\x82\1.", "the pickle instruction EXT1"),
    "PERSID": (b"\x80\2Pabc\n.", "the pickle instruction PERSID"),
    "BINPERSID": (b"\x80\2X\1\0\0\0aQ.", "the pickle instruction BINPERSID"),
    "dotted name": (b"\x80\4\x8c\x08builtins\x8c\x0dset.__class__\x93.", "builtins.set.__class__"),
    "dotted path": (
        b"\x80\4\x8c\x0bdnnlib.util\x8c\x1dEasyDict.__init__.__globals__\x93.",
        "dnnlib.util.EasyDict.__init__.__globals__",
    ),
    "name that is no text": (b"\x80\4]]\x93.", None),
    "known names only": (b"\x80\2cbuiltins\nset\n(lR.", None),
    "call of a call": (b"\x80\2ccollections\nOrderedDict\n)R)R.", None),
    "call of a text": (b"\x80\2X{})R.", None),
    "call of an argument": (b"\x80\2cdnnlib.tflib.network\nNetwork\n)\x81)R.", None),
    "BUILD of a name": (b"\x80\2cnumpy\ndtype\n}X\4\0\0\0nameK\1sb.", None),
    "BUILD of a list": (b"\x80\2]}b.", None),
    "SETITEM of a name": (b"\x80\2cbuiltins\nset\nK\1K\2s.", None),
    "APPEND to a name": (b"\x80\2cbuiltins\nset\nK\1a.", None),
    "escape codes": (b"\x80\2c\x1b[31mos\nsys\ttem\n.", "??31mos.sys?tem"),
    "wrong arguments": (b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(K\1K\2tR.", None),
}


@pytest.mark.parametrize("case", RAW)
def test_a_hand_made_pickle_is_refused(tmp_path, marker, case):
    data, name = RAW[case]
    text = touch(marker).encode()
    text = text if case == "protocol 0" else len(text).to_bytes(4, "little") + text
    (tmp_path / "a.pkl").write_bytes(data.replace(b"{}", text))
    assert_refused(tmp_path / "a.pkl", marker, name)


def test_arrays_of_objects_and_wrong_sizes_are_refused(tmp_path, marker):
    def array(shape, code, raw, order="<"):
        from numpy._core.multiarray import _reconstruct

        dtype = Call(np.dtype, code, False, True, state=(3, order, None, None, None, -1, -1, 0))
        return Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, raw))

    def refused(value):
        write_tf_pickle(path, {"G": {"a": value}, "D": {}, "Gs": {}}, old_numpy=False)
        with pytest.raises(UserError, match="a.pkl"):
            read_official(path)
        assert not marker.exists()

    path = tmp_path / "a.pkl"
    write_tf_pickle(path, {"G": {"a": array((2,), "f4", bytes(8))}, "D": {}, "Gs": {}})
    assert read_official(path)["G"].arrays["a"].tolist() == [0, 0]
    inner = pickle.dumps(Call(os.system, touch(marker)))
    refused(array((1,), "O", [Call(os.system, touch(marker))]))
    refused(np.array([{"a": 1}], dtype=object))
    for code in ("O", "O8", "V8", "S8", "M8", "U2", "c8", "f4,f4", "f4\n", "f3", "i4" * 9):
        refused(array((1,), code, inner))
    for shape in ((3,), (2**62, 4), (-2,), (-1, -2), (True, 2), 2, [2], (2.0,), (10**30,), (0,)):
        refused(array(shape, "f4", bytes(8)))
    refused(array((2,), "f4", None))
    refused(array((2,), "f4", bytes(8), order="O"))
    refused(Call(np._core.multiarray.scalar, Call(np.dtype, "O", False, True), inner))
    refused(Call(np._core.multiarray.scalar, Call(np.dtype, "f8", False, True), bytes(7)))


def test_views_outside_their_storage_are_refused(tmp_path):
    def view(offset, size, stride):
        args = (storage, offset, size, stride, False, collections.OrderedDict())
        return Call(torch._utils._rebuild_tensor_v2, *args)

    def write(tensor):
        G = module({}, "Generator")
        G.meta["state"]["_buffers"]["a"] = tensor
        write_pickle(tmp_path / "a.pkl", {"G": G})

    storage = torch.arange(12.0)._typed_storage()
    write(view(2, (2, 3), (1, 4)))
    assert read_official(tmp_path / "a.pkl")["G"].arrays["a"][1].tolist() == [3, 7, 11]
    for offset, size, stride in [
        (0, (13,), (1,)),
        (6, (2, 3), (3, 2)),
        (12, (), ()),
        (-1, (2,), (1,)),
        (5, (3,), (-1,)),
        (0, (2**40, 2), (0, 1)),
        (0, (10**6, 10**6), (0, 0)),  # repeats one number
        (0, (2**62, 2**62), (1, 1)),
        (0, (-3, -4), (1, 1)),
        (0, (2, 2), (1,)),
        (0, [2], [1]),
        (True, (2,), (1,)),
        (0, (2.0,), (1,)),
        (0, (1,) * 30, (1,) * 30),
    ]:
        write(view(offset, size, stride))
        with pytest.raises(UserError):
            read_official(tmp_path / "a.pkl")


def test_a_storage_that_says_a_wrong_length_is_refused(tmp_path):
    inner = io.BytesIO()
    torch.save(torch.arange(3.0)._typed_storage(), inner, _use_new_zipfile_serialization=False)
    inner = inner.getvalue()
    i = inner.index(b"cpuq\x03K\x03") + 6  # the length in the pickle, BININT1
    long = inner[: i - 1] + b"\x8a\x06" + (2**44).to_bytes(6, "little") + inner[i + 1 :]
    for data in (
        inner[:-1],
        inner + b"x",
        inner[:i] + b"\4" + inner[i + 1 :],
        long,
        b"",
        b"PK\3\4",
    ):
        write_pickle(tmp_path / "a.pkl", {"G": Call(torch.storage._load_from_bytes, data)})
        with pytest.raises(UserError, match="not an official checkpoint"):
            read_official(tmp_path / "a.pkl")


# ---- bombs -----------------------------------------------------------------------------------


def nest(pair, start, n=60):
    """A value that holds twice a value that holds twice ..., n deep; as instructions of pickle.

    All of them lie in a list under "junk" of a dict that is still open; memo n (TOP) is the last.
    """
    values = b"".join(pair(b"h%c" % i) + b"q%c" % (i + 1) for i in range(n))
    return b"}(X\4\0\0\0junk](" + start + b"q\0" + values + b"e"


TOP, G = b"h\x3c", b"X\1\0\0\0G"


def bombs(folder):
    """{name: file}: small files that ask for more memory or time than there is."""
    tuples = nest(lambda x: x + x + b"\x86", b"N")
    lists = nest(lambda x: b"](" + x + x + b"e", b"]")
    dicts = nest(lambda x: b"}(X\1\0\0\0a" + x + b"X\1\0\0\0b" + x + b"u", b"}")
    persistent = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}"
    start = b"}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}X\x08\0\0\0_modules"

    def wrap(modules):
        return persistent + b"X\5\0\0\0state" + start + modules + b"us\x85R"

    modules = nest(lambda x: wrap(b"}(X\1\0\0\0a" + x + b"X\1\0\0\0b" + x + b"u"), wrap(b"}"))
    # its _modules (memo 1) are put under the module (memo 2), and get the module as an entry
    itself = wrap(b"}q\1") + b"q\2X\1\0\0\0bh\1X\1\0\0\0ah\2s"
    options = wrap(b"}X\x0c\0\0\0_init_kwargs" + TOP)
    long_name = b"X\0\0\x10\0" + b"a" * 2**20
    network = b"cdnnlib.tflib.network\nNetwork\n)\x81q\1}"
    own = network + b"(X\x09\0\0\0variables]X\x0a\0\0\0components}X\1\0\0\0ah\1sub"
    encode = b"c_codecs\nencode\nq\1X\0\0\x10\0" + b"a" * 2**20 + b"q\2X\6\0\0\0latin1q\3"
    files = {
        "tuples": tuples + G + TOP + b"u",
        "lists": lists + G + TOP + b"u",
        "tuple as key": tuples + G + b"}" + TOP + b"Nsu",
        "tuple in a set": tuples + G + b"\x8f(" + TOP + b"\x90u",
        "module of modules": modules + G + TOP + b"u",
        "module in itself": b"}(" + G + itself + b"u",
        "options": dicts + G + options + b"u",
        "long name": b"}" + G + wrap(b"}" + long_name + wrap(b"}") + b"s") + b"s",
        "network in itself": own + b"h\1h\1\x87",
        "deep tuple": b"N" + b"\x85" * 300_000,
        "deep list": b"]" * 300_000 + b"a" * 299_999,
        "marks": b"(" * 300_000,
        "endless": b"N" * 5_000_000,
        "encode": encode + b"(" + b"h\1h\2h\3\x86R" * 5000 + b"t",
        "memo index": b"Nr\xff\xff\xff\xff",
        "BINBYTES8": b"\x8e" + (2**50).to_bytes(8, "little"),
        "BINBYTES": b"B\xff\xff\xff\xff",
        "BYTEARRAY8": b"\x96" + (2**50).to_bytes(8, "little"),
        "BINUNICODE8": b"\x8d" + (2**62).to_bytes(8, "little"),
        "LONG4": b"\x8b\xff\xff\xff\x7f",
        "FRAME": b"\x95" + (2**60).to_bytes(8, "little"),
        "text number": b"I" + b"9" * 1_000_000 + b"\n",
    }
    for name, data in files.items():
        (folder / f"{name}.pkl").write_bytes(b"\x80\4" + data + b".")
    inner = io.BytesIO()
    torch.save(torch.zeros(250_000)._typed_storage(), inner, _use_new_zipfile_serialization=False)
    data = inner.getvalue()  # once in the file, and 2000 storages are to be made of it
    storages = [Call(torch.storage._load_from_bytes, data) for _ in range(2000)]
    write_pickle(folder / "storages.pkl", storages)
    return sorted(folder.glob("*.pkl"))


BOMB_CHECK = """
import resource, sys, time
from {module} import read_official
from common import UserError
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**29, pages + 2**29))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        read_official(path)
        print("was read:", path)
    except UserError:
        pass
    if time.process_time() - start > 4:
        print("took long:", path)
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_bombs_are_refused_in_little_time_and_half_a_gigabyte(tmp_path):
    script = BOMB_CHECK.replace("{module}", read_official.__module__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, bombs(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert (result.stdout, result.stderr, result.returncode) == ("done\n", "", 0)


def test_one_storage_named_many_times_is_not_copied_without_end(tmp_path):
    G = module({}, "Generator")
    tensor = torch.zeros(250_000)
    names = {f"a{i}": tensor for i in range(5000)}  # 1 MB in the file, 5 GB if each were a copy
    G.meta["state"]["_buffers"].update(names)
    write_pickle(tmp_path / "a.pkl", {"G": G})
    assert (tmp_path / "a.pkl").stat().st_size < 1_200_000
    with pytest.raises(UserError):
        read_official(tmp_path / "a.pkl")
    write_tf_pickle(
        tmp_path / "a.pkl", {"G": dict.fromkeys(names, tensor.numpy()), "D": {}, "Gs": {}}
    )
    with pytest.raises(UserError):
        read_official(tmp_path / "a.pkl")
