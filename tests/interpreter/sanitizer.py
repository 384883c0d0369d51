"""Finds in the interpreter what it does not look for: accesses out of bounds, races, and use of undefined values.

The interpreter runs programs one after another on raw addresses, so an access beyond a tensor reads or writes whatever
lies there, and a race gives the result of one order. Here every load and store is checked against the elements of the
tensors that the launch was given, and against what other programs of the launch did to the same element. Masked lanes
of a load without `other` become NaN or a large integer. Atomics are refused: the kernels promise a fixed order.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Executor = interpreter.GridExecutor


class AccessError(AssertionError):
    """What a kernel did to memory that it must not do."""


NOBODY, SEVERAL = 0, -1


class Storage:
    """The bytes behind some arguments: which belong to elements, and which program wrote or read them."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.begin = storage.data_ptr()
        self.owned = np.zeros(storage.nbytes(), bool)
        self.writer = np.zeros(storage.nbytes(), np.int32)
        self.reader = np.zeros(storage.nbytes(), np.int32)

    def add(self, tensor: torch.Tensor) -> None:
        element = np.array(tensor.storage_offset(), np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            element = element[..., None] + np.arange(size) * (stride if size > 1 else 0)
        width = tensor.element_size()
        self.owned[(element.ravel()[:, None] * width + np.arange(width)).ravel()] = True


class Launch:
    """The memory of one launch."""

    current: "Launch | None" = None

    def __init__(self, arguments: Iterable[Any]) -> None:
        storages: dict[int, Storage] = {}
        for tensor in tensors(arguments):
            if tensor.numel():
                storage = tensor.untyped_storage()
                storages.setdefault(storage.data_ptr(), Storage(storage)).add(tensor)
        self.storages = list(storages.values())

    def locate(self, what: str, pointers: Any, mask: Any) -> tuple[Storage, np.ndarray] | None:
        """The storage and byte offsets that a tile of pointers means; None if all of it is masked."""
        mask = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        addresses = pointers.data[mask].astype(np.int64)
        if not addresses.size:
            return None
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        offsets = addresses[:, None] + np.arange(width)
        for storage in self.storages:
            within = offsets - storage.begin
            if ((within >= 0) & (within < storage.owned.size)).all():
                if storage.owned[within].all():
                    return storage, within[:, 0]
                break
        raise AccessError(f"{what} outside the elements of every argument")

    def check_load(self, program: int, pointers: Any, mask: Any) -> None:
        if (found := self.locate("load", pointers, mask)) is None:
            return
        storage, at = found
        if not np.isin(storage.writer[at], (NOBODY, program)).all():
            raise AccessError("load of an element that another program stores")
        reader = storage.reader[at]
        storage.reader[at] = np.where(np.isin(reader, (NOBODY, program)), program, SEVERAL)

    def check_store(self, program: int, pointers: Any, mask: Any) -> None:
        if (found := self.locate("store", pointers, mask)) is None:
            return
        storage, at = found
        if np.unique(at).size != at.size:
            raise AccessError("two lanes of a store mean the same element")
        if not np.isin(storage.writer[at], (NOBODY, program)).all():
            raise AccessError("store to an element that another program stores")
        if not np.isin(storage.reader[at], (NOBODY, program)).all():
            raise AccessError("store to an element that another program loads")
        storage.writer[at] = program


def tensors(arguments: Iterable[Any]) -> Iterable[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


def undefined(pointers: Any) -> Any:
    """What lanes hold that a mask without `other` leaves undefined."""
    dtype = pointers.get_element_ty()
    np_dtype = interpreter._get_np_dtype(dtype)
    if dtype.is_floating():
        value = np.nan
    else:
        value = True if np_dtype.kind == "b" else np.iinfo(np_dtype).max // 3
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, np_dtype), dtype)


def install() -> None:
    load, store = Builder.create_masked_load, Builder.create_masked_store
    init_arguments, call = Executor._init_args_hst, Executor.__call__

    def program(builder: Builder) -> int:
        (x, y, z), (size_x, size_y, _) = builder.grid_idx, builder.grid_dim
        return 1 + x + size_x * (y + size_y * z)

    def masked_load(self, pointers, mask, other, *options):
        Launch.current.check_load(program(self), pointers, mask)
        return load(self, pointers, mask, undefined(pointers) if other is None else other, *options)

    def masked_store(self, pointers, value, mask, *options):
        Launch.current.check_store(program(self), pointers, mask)
        return store(self, pointers, value, mask, *options)

    def atomic(self, *arguments):
        raise AccessError("atomic: the order of its effects is not fixed")

    def init_args_hst(self, arguments, keywords):
        arguments, keywords = init_arguments(self, arguments, keywords)
        Launch.current = Launch([*arguments, *keywords.values()])
        return arguments, keywords

    def checked_call(self, *arguments, **keywords):
        try:
            return call(self, *arguments, **keywords)
        except interpreter.InterpreterError as error:
            # The interpreter wraps what a kernel raises; the tests want to see what it was.
            raise error.__cause__ from None
        finally:
            Launch.current = None

    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    Builder.create_atomic_rmw = Builder.create_atomic_cas = atomic
    Executor._init_args_hst, Executor.__call__ = init_args_hst, checked_call
