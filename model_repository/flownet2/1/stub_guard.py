"""Protection of Triton's stub against requests with impossible shapes.

Triton counts a tensor's bytes in 64 bits, so ``[1, 2**62, 4, 3]`` counts as empty and is accepted
without content. Its Python stub creates an array of that shape before it calls the model; NumPy
raises an exception that the stub does not catch, and the process crashes.
"""

import contextlib
import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LARGEST = 2**62
"""Largest number of elements of an array."""

_ENTRIES = 300  # length of NumPy's table of C functions: more than the stub reads
_NEW_FROM_DESCR = 94  # index of `PyArray_NewFromDescr` in NumPy 1 and 2
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
_kept: list[object] = []  # kept alive: the stub has pointers to them


def is_possible(shape: Sequence[int]) -> bool:
    """Return True if an array can have this shape."""
    return math.prod(shape) < LARGEST


def guard(make_tensor: Callable[..., Any]) -> None:
    """Make the stub create an empty array for an impossible shape, which the model then rejects.

    The stub looks up NumPy's C functions when it creates its first array. This function creates it
    while a modified copy of NumPy's table is in place, and then restores the table.

    Args:
        make_tensor: the stub's `Tensor`.
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
    with contextlib.suppress(TypeError):  # a stub for NumPy 1 does not accept an array of NumPy 2
        make_tensor("first", np.zeros(1, np.uint8))
    numpy._ARRAY_API = original
