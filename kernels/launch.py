"""Launching a compiled Triton kernel without Triton's Python.

``kernel[grid](...)`` binds and specialises every argument, prints the options into a cache key and builds
every tensor map anew at each launch: tens of microseconds of host time, which eager training of small
batches waits for. :class:`Launcher` does that once a specialisation and then calls the compiled kernel.

Triton's specialisation, repeated here as a finer key: an integer by whether it is 1, divisible by 16, and
fits 32 or 64 bits; a pointer by its dtype and whether it is 16-byte aligned; None as a constant.

The direct call is not public API. It is taken where Triton's own ``JITFunction.run`` makes it in the same
words, which Triton 3.6 to 3.9 do. With another one every launch is an ordinary one, and a warning says so.
So is every launch under the interpreter, on other vendors' GPUs, and while a profiler has hooked them.
"""

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_logger = logging.getLogger("bayeslora")

_KEPT = 4096  # specialisations, or tensor maps, that are kept before they are gathered anew
_KEPT_ADDRESSES = 256  # tensor maps of one planned argument
_INT32, _INT64 = 1 << 31, 1 << 63
_CALL = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up. Triton's own is a compiler's function: microseconds a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


class _Compiled(NamedTuple):
    """What a direct launch needs of one compiled kernel."""

    run: Callable[..., None]
    function: int
    packed_metadata: Any
    make_map: Callable[[TensorDescriptor, int], list[Any]] | None  # None: run() makes the tensor maps
    maps: dict[Any, list[Any]]


class Launcher:
    """A Triton kernel with its compile-time choices.

    ::

        launch = Launcher(_kernel, {"BLOCK": 1024}, blocks={"x_desc": (128, 64)}, num_warps=4)
        launch((programs,), x, y, n)

    Args:
        kernel: a ``@triton.jit`` function whose ``constexpr`` parameters come last.
        constants: the value of every ``constexpr`` parameter.
        blocks: name of a parameter -> block shape: the tensor given for it becomes a TMA descriptor.
            Tensor maps are kept by address, shape and strides.
        options: ``num_warps``, ``num_stages``, ``maxnreg``, ``launch_pdl``, ``launch_cooperative_grid`` ...
            Products are fused with the sums they go into, which Triton 3.10 would no longer do unasked.

    Raises:
        ValueError: ``constants`` are not the kernel's last parameters, or ``blocks`` names no other one.
    """

    def __init__(
        self,
        kernel: Any,
        constants: Mapping[str, Any],
        *,
        blocks: Mapping[str, Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        names = list(kernel.arg_names)
        self._num_args = len(names) - len(constants)
        trailing = names[self._num_args :]
        if set(trailing) != set(constants):
            raise ValueError(f"constants must be the kernel's last parameters, got {sorted(constants)}")
        if unknown := set(blocks or ()) - set(names[: self._num_args]):
            raise ValueError(f"blocks must name runtime parameters of the kernel, got {sorted(unknown)}")
        self._kernel = kernel
        self._keywords = {**constants, "enable_fp_fusion": True, **options}
        self._constants = tuple(constants[name] for name in trailing)
        self._blocks = {names.index(name): list(block) for name, block in (blocks or {}).items()}
        self._compiled: dict[Any, _Compiled] = {}

    def __call__(self, grid: Sequence[int], *args: Any) -> None:
        """Launch on the device of the first argument and its current stream.

        Args:
            grid: one to three numbers of programs.
            args: the kernel's runtime parameters in order; the first is a tensor.

        Raises:
            TypeError: their number is not the kernel's.
        """
        if len(args) != self._num_args:
            raise TypeError(f"the kernel takes {self._num_args} runtime arguments, got {len(args)}")
        device = args[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, *args)
        recording = getattr(_recording, "launches", None)
        if recording is not None:
            recording.append((self, tuple(grid), args))
        if not self.direct:
            self._launch_plainly(grid, args)
            return None
        key, values = _specialize(args)
        compiled = self._compiled.get((device, *key)) if key else None
        if compiled is not None:
            _run(compiled, device, grid, self._arguments(compiled, args, values))
        else:
            compiled = self._launch_plainly(grid, args)
            if key and compiled is not None:
                _keep(self._compiled, (device, *key), compiled)
        return None

    @property
    def direct(self) -> bool:
        """Whether a launch may be made directly now."""
        return isinstance(self._kernel, JITFunction) and launches_directly() and not _hooked(self._kernel)

    def bind(self, grid: Sequence[int], *args: Any) -> Callable[[], None]:
        """Return a function that makes this launch again and again, at almost no cost.

        It keeps the arguments alive, and its caller promises that every tensor stays where it is.

        Args:
            grid: as for a call.
            args: as for a call.
        """
        return _Bound(self, grid, args)

    def prepared(self, args: Sequence[Any]) -> tuple[Any, list[Any]] | None:
        """Return the compiled kernel and its arguments for a launch made before; None if there is none."""
        key, values = _specialize(args)
        compiled = self._compiled.get((args[0].get_device(), *key)) if key else None
        return None if compiled is None else (compiled, self._arguments(compiled, args, values))

    def planned(
        self, grid: tuple[int, ...], args: Sequence[Any], addresses: Sequence[int]
    ) -> "_Planned | None":
        """Return a launch made before with its tensors left open; None where that cannot be.

        Args:
            grid: of that launch.
            args: of that launch; the address of every tensor among them is one of ``addresses``.
            addresses: of the tensors, all different but for zeros.
        """
        key, values = _specialize(args)
        compiled = self._compiled.get((args[0].get_device(), *key)) if key else None
        tensors = [arg.data_ptr() for arg in args if isinstance(arg, Tensor)]
        if not self.direct or compiled is None or not set(tensors) <= set(addresses):
            return None
        if self._blocks and compiled.make_map is None:
            return None
        arguments: list[Any] = []
        holes: list[tuple[int, int]] = []
        maps: list[_PlannedMap] = []
        for position, (arg, value) in enumerate(zip(args, values, strict=True)):
            if isinstance(arg, Tensor) and position in self._blocks:
                descriptor = TensorDescriptor.from_tensor(arg, self._blocks[position])
                expanded = list(compiled.make_map(descriptor, len(maps)))  # type: ignore[misc]
                start, stop = len(arguments), len(arguments) + len(expanded)
                where = addresses.index(value)
                made = {value: expanded}
                make = compiled.make_map
                maps.append(_PlannedMap(start, stop, where, descriptor, make, len(maps), made))  # type: ignore[arg-type]
                descriptor.base = _At(value)  # type: ignore[assignment] # the tensor's memory is not kept
                arguments += expanded
            else:
                if isinstance(arg, Tensor):
                    holes.append((len(arguments), addresses.index(value)))
                arguments.append(value)
        return _Planned(compiled, grid, [*arguments, *self._constants], holes, maps)

    def _launch_plainly(self, grid: Sequence[int], args: Sequence[Any]) -> _Compiled | None:
        """Launch through Triton; return what a direct launch needs, if it is to be had."""
        mapped = {
            position: TensorDescriptor.from_tensor(args[position], block)
            for position, block in self._blocks.items()
            if args[position] is not None
        }
        given = [mapped.get(position, arg) for position, arg in enumerate(args)]
        compiled = _dissect(self._kernel[tuple(grid)](*given, **self._keywords))
        if mapped and compiled is not None and compiled.make_map is None and launches_directly():
            _warn_of_slow_launches("makes tensor maps")
        return compiled

    def _arguments(self, compiled: _Compiled, args: Sequence[Any], values: list[Any]) -> list[Any]:
        """Return what the compiled kernel is called with: addresses, numbers, tensor maps, constants."""
        if not self._blocks:
            return [*values, *self._constants]
        out: list[Any] = []
        index = 0  # among the descriptors
        for position, value in enumerate(values):
            if position not in self._blocks or value is None:
                out.append(value)
                continue
            tensor = args[position]
            key = (index, value, tensor.shape, tensor.stride())
            expanded = compiled.maps.get(key)
            if expanded is None:
                descriptor = TensorDescriptor.from_tensor(tensor, self._blocks[position])
                if compiled.make_map is None:
                    expanded = [descriptor]  # not kept: it would hold the tensor's memory
                else:
                    expanded = list(compiled.make_map(descriptor, index))
                    _keep(compiled.maps, key, expanded)
            out += expanded
            index += 1
        return [*out, *self._constants]


class _At:
    """Stands for the tensor of a descriptor where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        """Return the address."""
        return self._address


class _PlannedMap(NamedTuple):
    """Where a tensor map goes among a launch's arguments, and what makes it for another address."""

    start: int
    stop: int
    tensor: int
    descriptor: TensorDescriptor
    make: Callable[[TensorDescriptor, int], list[Any]]
    descriptor_index: int
    made: dict[int, list[Any]]


class _Planned(NamedTuple):
    """One launch whose tensors are left open."""

    compiled: _Compiled
    grid: tuple[int, ...]
    arguments: list[Any]
    addresses: list[tuple[int, int]]  # position among the arguments, tensor
    maps: list[_PlannedMap]

    def run(self, device: int, stream: int, addresses: Sequence[int]) -> None:
        """Launch on tensors at these addresses."""
        arguments = self.arguments.copy()
        for position, tensor in self.addresses:
            arguments[position] = addresses[tensor]
        for start, stop, tensor, descriptor, make, index, made in self.maps:
            address = addresses[tensor]
            expanded = made.get(address)
            if expanded is None:
                elsewhere = copy.copy(descriptor)
                elsewhere.base = _At(address)  # type: ignore[assignment]
                expanded = make(elsewhere, index)
                _keep(made, address, expanded, _KEPT_ADDRESSES)
            arguments[start:stop] = expanded
        _run(self.compiled, device, self.grid, arguments, stream)


class Plans:
    """Remembers which launches a function makes for tensors of given shapes, and makes them without it.

    ::

        y = torch.empty_like(x)
        plans.run((scale,), (x,), (y,), lambda: launch_all(x, y, scale))

    Later calls with tensors of the same dtypes, shapes, strides and alignment launch the same compiled
    kernels on the new addresses, wherever those are.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Launcher, list[_Planned]] | None] = {}

    def run(
        self,
        numbers: Any,
        given: Sequence[Tensor | None],
        made: Sequence[Tensor],
        launches: Callable[[], bool | None],
    ) -> bool:
        """Make the launches that ``launches()`` makes; call it only if no such call was seen before.

        Args:
            numbers: everything that the launches depend on besides the tensors, hashable.
            given: the tensors that come from elsewhere, the first not None and all on its device.
            made: tensors that were allocated for this call, whose dtypes, shapes and strides follow from
                ``numbers`` and ``given``. With ``given`` they are all that a launch is passed, but for
                views at the same address.
            launches: makes launches through `Launcher`, and does nothing else on the device. It may
                return False, before it launches anything, to say that it cannot serve such tensors.

        Returns:
            Whether the launches were made.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*given, *made)]
        device = given[0].get_device()  # type: ignore[union-attr]
        key = (numbers, device, *map(_layout, given, addresses))
        plan = self._kept.get(key, ())
        if plan is None:
            return False
        nonzero = [address for address in addresses if address]
        apart = len(set(nonzero)) == len(nonzero)  # else one address may stand for two tensors
        if plan and apart and device == torch.cuda.current_device() and plan[0].direct:
            stream = triton.runtime.driver.active.get_current_stream(device)
            for planned in plan[1]:
                planned.run(device, stream, addresses)
            return True
        return self._record(key, addresses, launches, keep=apart)

    def _record(
        self, key: Any, addresses: Sequence[int], launches: Callable[[], bool | None], keep: bool
    ) -> bool:
        made: list[tuple[Launcher, tuple[int, ...], Sequence[Any]]] = []
        _recording.launches = made
        try:
            refused = launches() is False
        finally:
            _recording.launches = None
        if refused:
            _keep(self._kept, key, None)
        elif keep and made:
            planned = [launcher.planned(grid, args, addresses) for launcher, grid, args in made]
            complete = [launch for launch in planned if launch is not None]
            if len(complete) == len(made):
                _keep(self._kept, key, (made[0][0], complete))
        return not refused


def _layout(tensor: Tensor | None, address: int) -> Any:
    """Return all that a launch depends on of a tensor besides where it lies."""
    return None if tensor is None else (address % 16, tensor.dtype, tensor.shape, tensor.stride())


_recording = threading.local()  # backward runs in threads of its own


class _Bound:
    """One launch with all its arguments; see :meth:`Launcher.bind`."""

    def __init__(self, launcher: Launcher, grid: Sequence[int], args: Sequence[Any]) -> None:
        self._launcher, self._grid, self._args = launcher, tuple(grid), args
        self._device = args[0].get_device()
        self._ready: tuple[_Compiled, list[Any]] | None = None

    def __call__(self) -> None:
        launcher = self._launcher
        if self._ready is None or not launcher.direct:
            launcher(self._grid, *self._args)
            self._ready = launcher.prepared(self._args)
        elif self._device != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self()
        else:
            _run(self._ready[0], self._device, self._grid, self._ready[1])


def _specialize(args: Sequence[Any]) -> tuple[list[Any] | None, list[Any]]:
    """Return what Triton may specialise on, and the arguments with tensors as addresses.

    The key is None where Triton is to look for itself: a tensor not on a GPU, a type not known here.
    """
    key: list[Any] = []
    values: list[Any] = []
    on_gpu = True
    for arg in args:
        kind = type(arg)
        if kind is int:
            if arg == 1:
                key.append(1)
            else:
                width = 2 if -_INT32 <= arg < _INT32 else 4 if -_INT64 <= arg < _INT64 else 6
                key.append(width + (arg % 16 == 0))
            values.append(arg)
        elif isinstance(arg, Tensor):
            address = arg.data_ptr()
            key.append(arg.dtype)
            key.append(address % 16)
            on_gpu = on_gpu and arg.is_cuda
            values.append(address)
        elif arg is None or kind is float or kind is bool:
            key.append(kind)
            values.append(arg)
        else:
            return None, []
    return key if on_gpu else None, values


def _run(
    compiled: _Compiled,
    device: int,
    grid: Sequence[int],
    arguments: Sequence[Any],
    stream: int | None = None,
) -> None:
    if stream is None:
        stream = triton.runtime.driver.active.get_current_stream(device)
    grid_0, grid_1, grid_2 = (*grid, 1, 1)[:3]
    metadata = compiled.packed_metadata
    compiled.run(grid_0, grid_1, grid_2, stream, compiled.function, metadata, None, None, None, *arguments)


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int | None = None) -> None:
    if len(kept) >= (_KEPT if most is None else most):
        kept.clear()
    kept[key] = value


def _hooked(kernel: Any) -> bool:
    """Whether somebody (a profiler) wants to hear of every launch."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks) or any(h is not None and getattr(h, "calls", True) for h in hooks)


@cache
def launches_directly() -> bool:
    """Return whether Triton launches what it compiled by the call that ``_run`` makes; log once if not."""
    if torch.version.hip is not None:
        return False
    try:
        source = inspect.getsource(JITFunction.run)
    except (OSError, TypeError):
        source = ""
    known = hasattr(triton, "knobs") and _CALL in " ".join(source.split())
    if not known:
        _warn_of_slow_launches("launches kernels")
    return known


@cache
def _warn_of_slow_launches(what: str) -> None:
    _logger.warning(
        "Triton %s %s in a way that bayeslora does not know (it knows Triton 3.6 to 3.9): every launch goes "
        "through Triton's Python and takes tens of microseconds longer",
        triton.__version__,
        what,
    )


def _dissect(compiled: Any) -> _Compiled | None:
    """Take apart what Triton's launch returned; None if it is not a compiled kernel as we know it."""
    if not isinstance(compiled, triton.compiler.CompiledKernel):
        return None
    run, make_map = _map_maker(compiled)
    return _Compiled(run, compiled.function, compiled.packed_metadata, make_map, {})


def _map_maker(
    compiled: Any,
) -> tuple[Callable[..., None], Callable[[TensorDescriptor, int], list[Any]] | None]:
    """Return a ``run`` that takes ready tensor maps, and what makes them; or the kernel's own and None."""
    launch = getattr(compiled.run, "launch", None)
    if not isinstance(launch, FunctionType) or "launcher" not in launch.__code__.co_freevars:
        return compiled.run, None
    cells = inspect.getclosurevars(launch).nonlocals
    make = cells.get("make_tensordesc_arg") or launch.__globals__.get("make_tensordesc_arg")
    metadata = getattr(compiled.metadata, "tensordesc_meta", None)
    if make is None or not metadata:
        return compiled.run, None
    extra = [None] * (len(inspect.signature(make).parameters) - 2)
    run = copy.copy(compiled.run)
    run.launch = cells["launcher"]
    return run, lambda descriptor, index: make(descriptor, metadata[index], *extra)
