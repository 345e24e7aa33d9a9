"""A guard for Triton's stub against requests whose shape no array can have.

Triton counts a tensor's bytes in 64 bits, where ``[1, 2**62, 4, 3]`` has none, and lets it pass
without content. Its Python stub then makes an array of that shape before the model is asked, and
NumPy's refusal there is an exception that nobody catches: the process ends.
"""

import contextlib
import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LARGEST = 2**62
"""Elements that an array has at most."""

_ENTRIES = 300  # of NumPy's table of C functions: more than the stub reads
_NEW_FROM_DESCR = 94  # that of `PyArray_NewFromDescr`, in NumPy 1 and 2
_NewFromDescr = ctypes.PYFUNCTYPE(
    ctypes.py_object,  # returns a new array
    ctypes.c_void_p,  # subtype
    ctypes.c_void_p,  # descr
    ctypes.c_int,  # nd
    ctypes.POINTER(ctypes.c_ssize_t),  # dims
    ctypes.c_void_p,  # strides
    ctypes.c_void_p,  # data
    ctypes.c_int,  # flags
    ctypes.c_void_p,  # obj
)
_kept: list[object] = []  # what the stub points to from now on


def is_possible(shape: Sequence[int]) -> bool:
    """Whether an array can have this shape."""
    return math.prod(shape) < LARGEST


def guard(make_tensor: Callable[..., Any]) -> None:
    """Have the stub make an empty array in place of an impossible one; the model sees the shape.

    The stub looks NumPy's functions up where its first array is made: here, in a copy of NumPy's
    table, after which the table is the old one for everybody else.

    Args:
        make_tensor: the stub's own `Tensor`.
    """
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

    numpy: Any = importlib.import_module("numpy.core.multiarray")  # where pybind11 looks it up
    original = numpy._ARRAY_API
    table = (ctypes.c_void_p * _ENTRIES)()
    ctypes.memmove(table, api.PyCapsule_GetPointer(original, None), ctypes.sizeof(table))
    new_from_descr = _NewFromDescr(table[_NEW_FROM_DESCR] or 0)

    def guarded(subtype: int, descr: int, nd: int, dims: Any, *rest: Any) -> Any:
        if not is_possible(dims[:nd]):
            dims = (ctypes.c_ssize_t * nd)()
        return new_from_descr(subtype, descr, nd, dims, *rest)

    callback = _NewFromDescr(guarded)
    table[_NEW_FROM_DESCR] = ctypes.cast(callback, ctypes.c_void_p).value
    _kept.extend((table, callback))
    numpy._ARRAY_API = api.PyCapsule_New(ctypes.addressof(table), None, None)
    with contextlib.suppress(TypeError):  # made for NumPy 1, it takes no array of NumPy 2
        make_tensor("first", np.zeros(1, np.uint8))
    numpy._ARRAY_API = original
