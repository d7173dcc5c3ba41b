"""The launcher: the same launches as Triton's own, by the compiled kernel, with a driver that only records.

Kernels are compiled for Hopper (no GPU is needed for that); launching is Triton's own Python down to the
call into C, which is replaced. `python tests/environments.py triton FOLDER` runs these tests with every
release of Triton that pyproject.toml admits.
"""

import types
import unittest.mock

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver as runtime_driver
from triton.runtime.jit import JITFunction

from bayeslora.kernels import launch as launch_module
from bayeslora.kernels.launch import Launcher, Plans

STREAM = 77
PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.condition, tl.core.tensor_descriptor_base)
LANGUAGE = [(place, dict(vars(place))) for place in PATCHED]  # before any kernel was interpreted
BUILT_CALL = hasattr(nvidia, "make_launcher")


def _scale(out_ptr, x_ptr, n, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0) * factor
    tl.store(out_ptr + index, x * 2 if TWICE else x, mask=index < n)


def _copy_tile(out_ptr, x_desc, other_desc, row, BLOCK: tl.constexpr):
    tile = x_desc.load([row, 0])
    if other_desc is not None:
        tile += other_desc.load([row, 0])
    tl.store(out_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], tile)


def _sum(out_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))  # itself a device function


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on the first GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def is_cuda(self):
        return True

    def get_device(self):
        return 0


def _gpu(*shape, dtype=torch.float32, offset=0):
    size = torch.Size(shape).numel()
    flat = torch.zeros(size + 64, dtype=dtype)
    skip = -flat.data_ptr() % 64 // flat.element_size() + offset
    return flat[skip : skip + size].view(shape).as_subclass(OnGPU)


class Recorder:
    """Stands for the GPU driver: keeps the arguments of each launch."""

    def __init__(self):
        self.launches, self.maps_made, self.built = [], 0, 0
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (None, 4321, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            fill_tma_descriptor=self._fill,
            fill_tma_descriptor_tiled=self._fill,
            launch=self.record,
            build_signature_metadata=lambda _: None,
        )
        recorder = self

        class RecordingLauncher(nvidia.CudaLauncher):
            def __init__(self, src, metadata):
                recorder.built += 1
                recorder.options = metadata
                with recorder._without_c():
                    super().__init__(src, metadata)

        self.launcher_cls = RecordingLauncher

    def _without_c(self):
        """Keep Triton from calling into C, and Triton 3.6 from compiling what it would call."""
        if BUILT_CALL:
            module = types.SimpleNamespace(launch=self.record)
            given = {"compile_module_from_src": lambda **_: module, "library_dirs": lambda: []}
        else:
            given = {"annotate_arguments": lambda _: None}
        return unittest.mock.patch.multiple(nvidia, **given)

    def _fill(self, *args):
        self.maps_made += 1
        return "map", args[0]

    def record(self, *args):
        metadata, kernel_args = (args[9], args[13:]) if BUILT_CALL else (args[7], args[-1])
        as_numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in kernel_args]
        self.launches.append((args[:7], metadata, as_numbers))


def _take_the_interpreter_out():
    """Put `triton.language` back, which interpreted kernels that call its functions leave patched."""
    for place, names in LANGUAGE:
        for name, value in dict(vars(place)).items():
            if name not in names:
                delattr(place, name)
            elif value is not names[name]:
                setattr(place, name, names[name])


@pytest.fixture
def recorder(monkeypatch):
    _take_the_interpreter_out()
    recorder = Recorder()
    launch_module.launches_directly.cache_clear()
    launch_module._warn_of_slow_launches.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    runtime_driver.set_active(recorder)
    yield recorder
    runtime_driver._active = None
    launch_module.launches_directly.cache_clear()


def _count_plain(launcher, monkeypatch):
    count = []
    plain = launcher._launch_plainly
    monkeypatch.setattr(launcher, "_launch_plainly", lambda *a: (count.append(1), plain(*a))[1])
    return count


def test_triton_in_use_is_one_that_is_launched_directly():
    assert launch_module.launches_directly()


def test_direct_launch_passes_what_triton_passes(recorder, monkeypatch):
    launcher = Launcher(JITFunction(_scale), {"TWICE": True, "BLOCK": 128}, num_warps=2)
    plain = _count_plain(launcher, monkeypatch)
    out, x = _gpu(256), _gpu(256)
    for _ in range(3):
        launcher((2,), out, x, 200, 0.5)
    assert len(plain) == 1
    first, *others = recorder.launches
    assert first == (
        (2, 1, 1, STREAM, 4321, False, False),
        (2, 1, 0),
        [out.data_ptr(), x.data_ptr(), 200, 0.5, 128, True],
    )
    assert others == [first, first]


@pytest.mark.parametrize(
    "other",
    [
        (_gpu(256, offset=1), 200, 0.5),
        (_gpu(256, dtype=torch.float64), 200, 0.5),
        (_gpu(256), 208, 0.5),
        (_gpu(256), 1, 0.5),
        (_gpu(256), 1 << 31, 0.5),
        (_gpu(256), 200, 2),
    ],
    ids=["alignment", "dtype", "divisible", "one", "int64", "type"],
)
def test_other_specialization_is_compiled_apart(recorder, other):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    out = _gpu(256)
    launcher((2,), out, _gpu(256), 200, 0.5)
    built = recorder.built
    launcher((2,), out, *other)
    assert recorder.built == built + 1


def test_options_reach_the_driver(recorder):
    launcher = Launcher(
        JITFunction(_scale),
        {"BLOCK": 64, "TWICE": False},
        num_warps=8,
        launch_cooperative_grid=True,
        launch_pdl=True,
    )
    for _ in range(2):
        launcher((1, 2, 3), _gpu(256), _gpu(256), 200, 0.5)
    for base, metadata, _ in recorder.launches:
        assert base == (1, 2, 3, STREAM, 4321, True, True)
        assert metadata[0] == 8


def test_products_are_fused_with_sums_whatever_tritons_default(recorder, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    Launcher(JITFunction(_scale), {"BLOCK": 32, "TWICE": False})((1,), _gpu(256), _gpu(256), 200, 0.5)
    assert recorder.options.enable_fp_fusion


def test_kernels_compile_after_one_that_the_interpreter_ran(device, request, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    out = torch.zeros(1, device=device)
    triton.jit(_sum)[(1,)](out, torch.ones(8, device=device), BLOCK=8)
    assert out.item() == 8
    recorder = request.getfixturevalue("recorder")
    Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})((2,), _gpu(256), _gpu(256), 200, 0.5)
    assert recorder.built == 1


def test_tensor_maps_are_made_once_an_address(recorder):
    launcher = Launcher(
        JITFunction(_copy_tile), {"BLOCK": 64}, blocks={"x_desc": (64, 64), "other_desc": (64, 64)}
    )
    out, x, y = (
        _gpu(64, 64, dtype=torch.bfloat16),
        _gpu(128, 64, dtype=torch.bfloat16),
        _gpu(64, 64, dtype=torch.bfloat16),
    )
    launcher((1,), out, x, y, 0)  # Triton's own launch
    own = recorder.maps_made
    launcher((1,), out, x, y, 0)
    assert recorder.maps_made == own + 2
    launcher((1,), out, x, y, 0)
    assert recorder.maps_made == own + 2
    launcher((1,), out, x[:64].as_subclass(OnGPU), y, 0)  # same address, other shape
    assert recorder.maps_made == own + 3
    first, second, third, _ = recorder.launches
    assert first == second == third
    assert ("map", x.data_ptr()) in first[2]


def test_absent_descriptor(recorder):
    launcher = Launcher(
        JITFunction(_copy_tile), {"BLOCK": 64}, blocks={"x_desc": (64, 64), "other_desc": (64, 64)}
    )
    out, x = _gpu(64, 64, dtype=torch.bfloat16), _gpu(128, 64, dtype=torch.bfloat16)
    for _ in range(2):
        launcher((1,), out, x, None, 3)
    assert recorder.launches[0] == recorder.launches[1]


def test_bound_launch_repeats(recorder, monkeypatch):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    out, x = _gpu(256), _gpu(256)
    again = launcher.bind((2,), out, x, 200, 0.5)
    plain = _count_plain(launcher, monkeypatch)
    for _ in range(3):
        again()
    assert len(plain) == 1
    assert recorder.launches == [recorder.launches[0]] * 3


def test_profilers_see_every_launch(recorder, monkeypatch, caplog):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    args = (2,), _gpu(256), _gpu(256), 200, 0.5
    again = launcher.bind(*args)
    again()
    plain = _count_plain(launcher, monkeypatch)
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        launcher(*args)
        again()
    finally:
        hooks.remove(print)
    again()
    assert len(plain) == 2
    assert not caplog.records


def test_unknown_triton_launches_plainly_and_says_so_once(recorder, monkeypatch, caplog):
    monkeypatch.setattr(launch_module, "_CALL", "another call")
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    plain = _count_plain(launcher, monkeypatch)
    for _ in range(2):
        launcher((2,), _gpu(256), _gpu(256), 200, 0.5)
    assert len(plain) == 2
    assert recorder.launches[0][0] == recorder.launches[1][0]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"Triton {triton.__version__} launches kernels in a way")


def test_unknown_tensor_maps_are_made_by_triton_and_it_says_so_once(recorder, monkeypatch, caplog):
    monkeypatch.setattr(launch_module, "_map_maker", lambda compiled: (compiled.run, None))
    launcher = Launcher(
        JITFunction(_copy_tile), {"BLOCK": 64}, blocks={"x_desc": (64, 64), "other_desc": (64, 64)}
    )
    out, x, y = (_gpu(64, 64, dtype=torch.bfloat16) for _ in range(3))
    launcher((1,), out, x, None, 0)
    launcher((1,), out, x, y, 0)
    launcher((1,), out, x, y, 0)
    assert recorder.launches[1] == recorder.launches[2]
    (record,) = caplog.records
    assert record.message.startswith(f"Triton {triton.__version__} makes tensor maps in a way")


def test_cpu_tensor_is_left_to_triton(recorder, monkeypatch):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    plain = _count_plain(launcher, monkeypatch)
    for _ in range(2):
        launcher((2,), _gpu(256), torch.zeros(256), 200, 0.5)
    assert len(plain) == 2


def test_full_cache_starts_anew(recorder, monkeypatch):
    monkeypatch.setattr(launch_module, "_KEPT", 2)
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    for n in (200, 208, 1, 200):
        launcher((2,), _gpu(256), _gpu(256), n, 0.5)
    assert len(launcher._compiled) <= 2
    assert len(recorder.launches) == 4


def test_result(device):
    kernel = triton.jit(_scale)
    launcher = Launcher(kernel, {"BLOCK": 128, "TWICE": True})
    x = torch.arange(200, dtype=torch.float32, device=device)
    out = torch.full_like(x, float("nan"))
    again = launcher.bind((2,), out, x, 200, 0.5)
    for call in (lambda: launcher((2,), out, x, 200, 0.5), again, again):
        out.fill_(float("nan"))
        call()
        torch.testing.assert_close(out, x)


def test_wrong_arguments():
    kernel = triton.jit(_scale)
    with pytest.raises(ValueError, match="last parameters"):
        Launcher(kernel, {"BLOCK": 128})
    with pytest.raises(ValueError, match="runtime parameters"):
        Launcher(kernel, {"BLOCK": 128, "TWICE": True}, blocks={"y_desc": (1, 1)})
    with pytest.raises(TypeError, match="takes 4"):
        Launcher(kernel, {"BLOCK": 128, "TWICE": True})((1,), torch.zeros(1))


def test_plans_repeat_launches_on_other_tensors_without_running_the_function(recorder):
    scale = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    copy = Launcher(
        JITFunction(_copy_tile), {"BLOCK": 64}, blocks={"x_desc": (64, 64), "other_desc": (64, 64)}
    )
    plans, runs = Plans(), []

    def run(out, x, other, factor=0.5):
        def launches():
            runs.append(1)
            scale((2,), out, x, 200, factor)
            copy((1,), out, x, other, 3)

        return plans.run((factor,), (out, x, other), (), launches)

    tensors = [_gpu(64, 64, dtype=torch.bfloat16) for _ in range(6)]
    out, x, y, out2, x2, y2 = tensors
    assert run(out, x, y)
    assert run(out, x, y)
    assert run(out2, x2, y2)
    assert len(runs) == 1
    assert recorder.launches[0:2] == recorder.launches[2:4]
    planned = recorder.launches[4:6]
    scale((2,), out2, x2, 200, 0.5)
    copy((1,), out2, x2, y2, 3)
    assert planned == recorder.launches[6:8]
    assert ("map", x2.data_ptr()) in planned[1][2]
    for other in (
        (out, x[:32].as_subclass(OnGPU), y),  # shape
        (out, x, None),
        (_gpu(64, 64), x, y),  # dtype
        (_gpu(64, 64, dtype=torch.bfloat16, offset=1), x, y),  # alignment
    ):
        before = len(runs)
        run(*other)
        assert len(runs) == before + 1
    run(out, x, y, 0.25)
    assert recorder.launches[-2][2][3] == 0.25


def test_planned_launches_do_not_take_one_tensor_for_another(recorder):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    plans, (one, two) = Plans(), (_gpu(256) for _ in range(2))

    def run(out, x):
        plans.run((), (out,), (x,), lambda: launcher((2,), out, x, 200, 0.5))

    run(one, one)  # one address stands for both
    run(two, one)
    run(two, one)
    run(one, one)
    addresses = [launch[2][:2] for launch in recorder.launches]
    a, b = one.data_ptr(), two.data_ptr()
    assert addresses == [[a, a], [b, a], [b, a], [a, a]]


def test_plans_under_a_profiler(recorder):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    plans, runs, out = Plans(), [], _gpu(256)

    def launches():
        runs.append(1)
        launcher((2,), out, out, 200, 0.5)

    plans.run((), (out,), (), launches)
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)  # a profiler wants to see every launch
    try:
        plans.run((), (out,), (), launches)
    finally:
        hooks.remove(print)
    plans.run((), (out,), (), launches)
    assert len(runs) == 2


def test_a_plan_that_failed_or_is_not_whole_is_not_kept(recorder, monkeypatch):
    launcher = Launcher(JITFunction(_scale), {"BLOCK": 128, "TWICE": False})
    plans, runs, out = Plans(), [], _gpu(256)

    def launches():
        runs.append(1)
        launcher((2,), out, out, 200, 0.5)
        if len(runs) == 1:
            raise RuntimeError("out of memory")
        if len(runs) == 2:
            launcher((2,), out, torch.zeros(256), 200, 0.5)  # left to Triton

    with pytest.raises(RuntimeError, match="out of memory"):
        plans.run((), (out,), (), launches)
    for _ in range(4):
        plans.run((), (out,), (), launches)
    assert len(runs) == 3
    assert getattr(launch_module._recording, "launches", None) is None


def test_refusals_are_remembered(recorder):
    plans, runs = Plans(), []
    for _ in range(2):
        assert not plans.run((), (_gpu(256),), (), lambda: runs.append(1) or False)
    assert len(runs) == 1
