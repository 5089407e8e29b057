"""CUDA graphs on a CPU: the operators of a phase are recorded with the tensors they ran on, and run
again on the same memory.

Like a CUDA graph, a recording knows no Python: a number that was computed on the host, a random
choice of Python's, a tensor made anew in each step or an optimiser's own counter repeats as it was,
and then the weights differ from those of eager steps. What a GPU would refuse in a recording is
refused here: reading a tensor's value, shapes that depend on values, copies from the host.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

REFUSED = (
    "_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal",
    "unique", "_unique2", "bincount", "repeat_interleave.Tensor",
)  # fmt: skip


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in REFUSED or str(function).removeprefix("aten.") in REFUSED:
            raise RuntimeError(f"{function} in a CUDA graph")
        if name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_iter(args[1])
        ):
            raise RuntimeError(f"{function} by a mask in a CUDA graph")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            tree_map(self.keep, result, again)

    @staticmethod
    def keep(old, new):
        """What ran again goes where it went before, unless it is there already: views, and what
        operators changed in place."""
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def record(stream, generators, memory, function):
    """In the place of common.record. Recording runs the function here: that counts as the first
    replay."""
    with Recording() as recording:
        function()
    once = [True]

    def replay():
        if not once:
            with torch.no_grad():
                recording.replay()
        once.clear()

    return replay
