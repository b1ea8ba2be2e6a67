"""vLLM's second model runner without a GPU: its Triton kernels run in Triton's interpreter.

Slow, up to a second per step. Not tested this way: CUDA graphs, attention on a GPU, the kernel for
top-k and top-p.
"""

import os
import types
import warnings
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def install():
    """Call this before vLLM is imported; processes that are started later do it by themselves."""
    os.environ["TRITON_INTERPRET"] = "1"
    if str(_HERE) not in os.environ.get("PYTHONPATH", ""):
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(_HERE / "interpreted"), str(_HERE.parents[2]), *inherited]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _mend_triton()
        _mend_vllm()


class _Driver:
    """As of a device that is there, but not for torch.compile."""

    @staticmethod
    def is_active():
        return True

    @staticmethod
    def get_current_target():
        raise RuntimeError("there is no device")


def _mend_triton():
    import triton.backends
    from triton.runtime.interpreter import InterpreterBuilder

    triton.backends.backends.clear()
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(
            InterpreterBuilder, name, _with_boolean_mask(getattr(InterpreterBuilder, name), place)
        )


def _with_boolean_mask(original, place):
    """Masks can come as whole numbers, by which NumPy would select places."""

    def wrapped(self, *args, **kwargs):
        mask = args[place]
        if mask is not None and mask.data.dtype != bool:
            mask.data = mask.data.astype(bool)
        return original(self, *args, **kwargs)

    return wrapped


def _mend_vllm():
    import triton.language as tl
    from vllm.triton_utils import tldevice
    from vllm.v1.sample.ops import topk_topp_sampler

    tldevice.log1p = lambda x, **_: tl.log(x + 1.0)  # a function of CUDA's own library
    topk_topp_sampler.HAS_TRITON = (
        False  # the one kernel that the interpreter cannot run; vLLM's torch version instead
    )
