"""Makes checkpoints in the formats of the official releases, from {network: {name: array}}.

Nothing of the official code is needed: classes of the same names stand in while pickle writes.
"""

import collections
import contextlib
import pickle
import sys
import types
from unittest import mock

import numpy as np
import torch

BUFFERS = ("noise_const", "w_avg", "resample_filter")  # the rest are parameters
SOURCE = "raise RuntimeError('the source text in the file was run')\n"


class EasyDict(dict):
    pass


class Network:
    def __init__(self, state):
        self.state = state

    def __getstate__(self):
        return self.state


class Persistent:
    def __init__(self, meta):
        self.meta = meta


def _reconstruct_persistent_obj(meta):
    raise RuntimeError("only named, never called")


def _reconstruct(subtype, shape, dtype):
    raise RuntimeError("only named, never called")


def scalar(dtype, raw):
    raise RuntimeError("only named, never called")


PLACES = {
    "torch_utils.persistence": [_reconstruct_persistent_obj],
    "dnnlib.util": [EasyDict],
    "dnnlib.tflib.network": [Network],
    "numpy.core.multiarray": [_reconstruct, scalar],
}


@contextlib.contextmanager
def stand_ins():
    """Modules of the official names exist, and hold the definitions above."""
    modules = {}
    for path, definitions in PLACES.items():
        for i in range(1, path.count(".") + 2):
            name = ".".join(path.split(".")[:i])
            if name != "numpy":
                modules.setdefault(name, types.ModuleType(name))
        for definition in definitions:
            definition.__module__ = path
            setattr(modules[path], definition.__name__, definition)
    with mock.patch.dict(sys.modules, modules):
        yield


class Pickler(pickle.Pickler):
    def __init__(self, file, protocol, old_numpy=True):
        super().__init__(file, protocol)
        self.old_numpy = old_numpy

    def reducer_override(self, obj):
        if isinstance(obj, Persistent):
            return _reconstruct_persistent_obj, (obj.meta,)
        if self.old_numpy and isinstance(obj, np.ndarray):
            return (_reconstruct, *obj.__reduce__()[1:])
        if self.old_numpy and isinstance(obj, np.generic):
            return scalar, obj.__reduce__()[1]
        return NotImplemented


def write_pickle(path, value, protocol=4, old_numpy=True):
    with stand_ins(), open(path, "wb") as file:
        Pickler(file, protocol, old_numpy).dump(value)


def as_tensor(array):
    """A tensor keeps its strides and its storage, which it may share; an array is copied."""
    return array if torch.is_tensor(array) else torch.from_numpy(np.array(array))


def module(arrays, class_name, kwargs=None):
    """A persistent nn.Module, with its submodules, from {dotted name: array}."""
    own, below = {}, {}
    for name, array in arrays.items():
        head, dot, rest = name.partition(".")
        if dot:
            below.setdefault(head, {})[rest] = array
        else:
            own[head] = as_tensor(array)
    parameters = {k: torch.nn.Parameter(v) for k, v in own.items() if k not in BUFFERS}
    buffers = {k: v for k, v in own.items() if k in BUFFERS}
    state = {
        "training": False,
        "_parameters": collections.OrderedDict(parameters),
        "_buffers": collections.OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": collections.OrderedDict(),
        "_modules": collections.OrderedDict(
            (k, module(v, "SynthesisLayer")) for k, v in below.items()
        ),
        "weight_gain": np.float64(0.25),
        "in_size": np.array([16, 16]),
        "_init_args": (),
        "_init_kwargs": EasyDict(kwargs or {}),
    }
    state["_parameters"]["bias_off"] = None
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name}
    return Persistent(EasyDict(meta, state=state))


def write_pytorch_pickle(path, nets, init_kwargs=None, protocol=4, **rest):
    """stylegan2-ada-pytorch, stylegan3. rest: further entries of the dict, and old_numpy."""
    old_numpy = rest.pop("old_numpy", True)
    data = {"training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset")}
    for name, arrays in nets.items():
        class_name = "Discriminator" if name == "D" else "Generator"
        data[name] = module(arrays, class_name, init_kwargs)
    write_pickle(path, {**data, "augment_pipe": None, **rest}, protocol, old_numpy)


def network(name, arrays, static_kwargs, version):
    parts = {"mapping": {}, "synthesis": {}}
    own = []
    for full_name, array in arrays.items():
        head, slash, rest = full_name.partition("/")
        if slash and head in parts:
            parts[head][rest] = array
        else:
            own.append((full_name, array))
    components = {k: network(k, v, {}, version) for k, v in parts.items() if v}
    state = {
        "version": version,
        "name": name,
        "static_kwargs": EasyDict(static_kwargs),
        "components": EasyDict(components),
        "build_module_src": SOURCE,
        "build_func_name": "G_main",
        "variables": own,
    }
    return Network(state)


def write_tf_pickle(path, nets, static_kwargs=None, version=4, protocol=4, old_numpy=True):
    """StyleGAN (versions 2, 3), StyleGAN2 (4), StyleGAN2-ADA (5); nets: "G", "D", "Gs"."""
    state = tuple(network(k, nets[k], static_kwargs or {}, version) for k in ("G", "D", "Gs"))
    write_pickle(path, state, protocol, old_numpy)


def write_rosinality(path, nets, latent_avg=None, args=None, zipped=True):
    """rosinality/stylegan2-pytorch; nets: "g_ema", "g", "d"."""
    data = {k: {n: as_tensor(a) for n, a in arrays.items()} for k, arrays in nets.items()}
    if latent_avg is not None:
        data["latent_avg"] = as_tensor(latent_avg)
    if args is not None:
        data["args"] = args
        data["g_optim"] = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.002}]}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
