"""vLLM's second model runner without a GPU: its Triton kernels run in Triton's interpreter.

Import this before vLLM, in every process. Slow (about a second per step), and the same kernels as on a GPU.
"""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
import triton.backends
import triton.language as tl
import triton.runtime.interpreter as interpreter


class _Driver:
    @staticmethod
    def is_active():
        return True


def _with_boolean_masks(name, place):
    """The interpreter's masks can come as whole numbers, on which it then selects by index."""
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

tldevice.log1p = lambda x, **_: tl.log(x + 1.0)  # a function of CUDA's own library
