"""vLLM's second model runner without a GPU: its Triton kernels run in Triton's interpreter.

Import this before vLLM; processes that are started later import it by themselves. Slow, up to a second per step. What
is not seen this way: CUDA graphs, attention on a GPU, the kernel for top-k and top-p.
"""

import os
import types
from pathlib import Path

_HERE = Path(__file__).resolve().parent

os.environ["TRITON_INTERPRET"] = "1"
if str(_HERE) not in os.environ.get("PYTHONPATH", ""):
    _inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE / "interpreted"), str(_HERE.parents[1]), *_inherited])

import numpy as np
import triton.backends
import triton.language as tl
import triton.runtime.interpreter as interpreter


class _Driver:
    @staticmethod
    def is_active():
        return True


def _with_boolean_masks(name, place):
    """Masks can come as whole numbers, by which NumPy would select places."""
    original = getattr(interpreter.InterpreterBuilder, name)

    def wrapped(self, *args, **kwargs):
        mask = args[place]
        if mask is not None and mask.data.dtype != np.bool_:
            mask.data = mask.data.astype(np.bool_)
        return original(self, *args, **kwargs)

    setattr(interpreter.InterpreterBuilder, name, wrapped)


triton.backends.backends.clear()
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)
_with_boolean_masks("create_masked_load", 1)
_with_boolean_masks("create_masked_store", 2)

from vllm.triton_utils import tldevice  # noqa: E402
from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402

tldevice.log1p = lambda x, **_: tl.log(x + 1.0)  # a function of CUDA's own library
topk_topp_sampler.HAS_TRITON = False  # the one kernel that the interpreter cannot run; vLLM's torch version instead
