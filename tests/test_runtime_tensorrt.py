"""The TensorRT session, driven by doubles (tests/tensorrt_doubles.py).

No GPU has run this session yet.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lminf_export.errors import SessionError
from lminf_export.runtime import engine as runtime_engine
from lminf_export.runtime import gpu as runtime_gpu
from lminf_export.runtime import tensorrt as runtime
from lminf_export.runtime.gpu import Gpu, find_gpu
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.tensorrt import TensorRTSession
from lminf_export.tensors.dtypes import ELEMENT_TYPES
from tests.support.tensorrt_doubles import (
    ADA,
    TINY,
    Cudart,
    DataType,
    ExecutionContextAllocationStrategy,
    ICudaEngine,
    IExecutionContext,
    IPluginRegistry,
    Setup,
    Severity,
    TensorIOMode,
    bundle_with_plan,
)

LENGTH = 90  # more than four laps of the larger ring
TOLERANCE = 1e-4  # as in test_runtime: float32 sums of a few dozen terms in another order


@pytest.fixture
def setup(tmp_path, monkeypatch):
    return Setup(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def streams():
    return np.random.default_rng(7).integers(0, TINY.vocab_size, (3, LENGTH))


@pytest.fixture(scope="module")
def wanted(streams):
    return np.stack([TINY.reference_logits(row) for row in streams])


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [LENGTH], [2, 3, 5, 8, 13, 21, 34, 4]])
def test_any_chunks_give_the_logits_of_single_tokens(setup, streams, wanted, sizes):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(3)
    parts, start = [], 0
    for size in sizes:
        parts.append(lm.forward(streams[:, start : start + size], state))
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=TOLERANCE, rtol=0)


def test_rows_of_different_lengths_keep_their_streams_apart(setup, streams, wanted):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(3)
    random = np.random.default_rng(11)
    done = np.zeros(3, int)
    while (done < LENGTH - 7).any():
        lengths = random.integers(0, 8, 3)
        rows = np.stack([streams[row, done[row] : done[row] + 7] for row in range(3)])
        lengths = np.minimum(lengths, LENGTH - 7 - done)
        if not lengths.any():
            continue
        found = lm.forward(rows, state, lengths=lengths)
        for row, length in enumerate(lengths):
            span = slice(done[row], done[row] + length)
            np.testing.assert_allclose(
                found[row, :length], wanted[row, span], atol=TOLERANCE, rtol=0
            )
        done += lengths
    assert (state.past_length == done).all()


def test_no_chunk_crosses_a_rings_end(setup, streams):
    session = setup.open()
    state = session.new_state(2)
    rings = sorted({layer.ring_capacity for layer in TINY.layers})
    for past in ([0, 0], [1, 0], [13, 20], [20, 41], [14, 21]):
        session.stand_at(state, np.array(past))
        room = min(capacity - p % capacity for capacity in rings for p in past)
        assert session.step_limit(state) == min(7, room)


def test_single_tokens_take_the_first_profile_and_chunks_the_second(setup, streams):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(2)
    for size in (7, 1, 1, 4):
        lm.forward(streams[:2, :size], state)
    lm.forward(streams[:2, :1], state, logits="none")
    assert setup.engine._runs == [
        (1, (2, 7)),
        (0, (2, 1)),
        (0, (2, 1)),
        (1, (2, 4)),
        (0, (2, 1)),
    ]


def test_no_logits_wanted_means_none_returned(setup):
    session = setup.open()
    state = session.new_state(2)
    found = session.step(
        state, np.zeros((2, 3), np.int64), np.full(2, 3), np.zeros((2, 0), np.int64)
    )
    assert found.shape == (2, 0, TINY.vocab_size)


def test_two_states_are_independent_and_freed(setup, streams, wanted):
    lm = LanguageModel(setup.bundle, setup.open())
    first, second = lm.new_state(1), lm.new_state(1)
    for start in range(0, 35, 5):
        for state, row in ((first, 0), (second, 1)):
            found = lm.forward(streams[row : row + 1, start : start + 5], state)
            np.testing.assert_allclose(
                found[0], wanted[row, start : start + 5], atol=TOLERANCE, rtol=0
            )
    assert setup.cudart._held
    del first, second, state
    assert not setup.cudart._held


def test_a_failed_step_is_named_and_may_be_repeated(setup, streams, wanted):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(1)
    lm.forward(streams[:1, :20], state)
    setup.engine._failures.append("out of luck\nsomewhere")
    with pytest.raises(SessionError, match=r"the step at token 20 failed: out of luck$"):
        lm.forward(streams[:1, 20:23], state)
    found = lm.forward(streams[:1, 20:23], state)
    np.testing.assert_allclose(found[0], wanted[0, 20:23], atol=TOLERANCE, rtol=0)


def test_caches_are_on_the_gpu_and_a_session_knows_its_own_states(setup):
    session, other = setup.open(), setup.open()
    state = session.new_state(2)
    assert not session.caches_in_main_memory
    assert session.owns(state)
    assert not other.owns(state)
    assert state.nbytes == state.max_nbytes


def test_a_batch_above_the_plans_is_refused(setup):
    with pytest.raises(SessionError, match="batch_size=4: this plan takes at most 3"):
        setup.open().new_state(4)


def test_caches_larger_than_the_gpu_are_refused_with_both_numbers(tmp_path, monkeypatch):
    session = Setup(tmp_path, monkeypatch, capacity=2048).open()
    with pytest.raises(SessionError, match=r"take \S+ KiB, this GPU has 2\.0 KiB free"):
        session.new_state(3)


def test_a_failing_cuda_call_is_named(setup):
    session = setup.open()
    setup.cudart._capacity = 2**14
    state = session.new_state(1)
    setup.cudart._capacity = 10
    with pytest.raises(SessionError, match="cudaMalloc failed: cudaErrorMemoryAllocation"):
        session.step(state, np.zeros((1, 2), np.int64), np.full(1, 2), np.zeros((1, 1), np.int64))


def test_no_gpu_is_a_clear_error_before_any_library_is_loaded(setup, monkeypatch):
    monkeypatch.setattr(runtime, "find_gpu", lambda: "no NVIDIA driver is installed")
    monkeypatch.setattr(runtime, "load_libraries", None)
    with pytest.raises(
        SessionError,
        match=r"needs an NVIDIA GPU; none was found on this machine \(no NVIDIA driver is "
        r"installed\); run the bundle's model\.onnx with onnxruntime instead",
    ):
        TensorRTSession(setup.bundle)


@pytest.mark.skipif(isinstance(find_gpu(), Gpu), reason="this machine has a GPU")
def test_loading_a_plan_on_this_machine_is_a_clear_error(tmp_path):
    bundle, _ = bundle_with_plan(tmp_path)
    with pytest.raises(SessionError, match="needs an NVIDIA GPU"):
        load(bundle.path / "engine.plan")


def test_a_bundle_without_a_plan_is_refused(tmp_path):
    with pytest.raises(SessionError, match="holds no plan"):
        TensorRTSession(TINY.write(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("target", "capability", "fits"),
    [
        ("sm_80+", (8, 0), True),
        ("sm_80+", (12, 0), True),
        ("sm_80+", (7, 5), False),
        ("sm_89", (8, 9), True),
        ("sm_89", (12, 0), False),
        ("sm_75,sm_120", (12, 0), True),
        ("sm_75,sm_120", (12, 1), False),
        ("elsewhere", (8, 9), False),
    ],
)
def test_a_plan_runs_on_the_gpus_it_is_for(tmp_path, monkeypatch, target, capability, fits):
    setup = Setup(tmp_path, monkeypatch, gpu=Gpu("a card", capability), target=target)
    if fits:
        setup.open()
    else:
        with pytest.raises(SessionError, match=rf"is for {target}.*GPU \(a card\) is sm_"):
            setup.open()


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_a_plan_for_rtx_is_refused_on_the_gpus_it_excludes(tmp_path, monkeypatch, capability):
    setup = Setup(tmp_path, monkeypatch, gpu=Gpu("a card", capability), target="sm_80+")
    monkeypatch.setattr(runtime, "deserialize", None)
    with pytest.raises(
        SessionError,
        match=r"TensorRT for RTX does not run on .* 9\.x and 10\.x.*\(a card\) is "
        rf"sm_{capability[0]}{capability[1]}; build the plan with --builder tensorrt on this GPU",
    ):
        setup.open()


def test_a_plan_for_tensorrt_proper_runs_there(tmp_path, monkeypatch):
    Setup(tmp_path, monkeypatch, gpu=Gpu("H", (9, 0)), target="sm_90", plugin="beside").open()


def test_a_plan_of_another_version_is_refused(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, version="1.6.0.5")
    with pytest.raises(SessionError, match=r"built by tensorrt-rtx 1\.6\.0\.5, installed is 1\.7"):
        setup.open()


def test_an_engine_that_does_not_load_gives_the_librarys_reason(setup):
    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            self.logger.log(Severity.ERROR, "magic tag does not match\nat line 3")

    setup.trt.Runtime = Runtime
    with pytest.raises(SessionError, match=r"engine\.plan cannot be loaded: magic tag does not"):
        setup.open()


def test_an_engine_with_other_tensors_is_refused(setup, monkeypatch):
    def shape(self, name):
        return (5, 5)

    monkeypatch.setattr(ICudaEngine, "get_tensor_shape", shape)
    with pytest.raises(SessionError, match=r"has input_ids int64\[5, 5\], the manifest says"):
        setup.open()


def test_an_engine_that_copies_a_ring_is_refused(setup, monkeypatch):
    monkeypatch.setattr(ICudaEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(SessionError, match=r"does not update past_key_values\.0\.key in place"):
        setup.open()


def test_a_missing_package_is_named(monkeypatch):
    engine = SimpleNamespace(builder="tensorrt-rtx")
    monkeypatch.setitem(runtime_engine._PACKAGES, "tensorrt-rtx", "no_such_package")
    with pytest.raises(SessionError, match="pip install tensorrt-rtx"):
        runtime_engine.load_libraries(engine)
    with pytest.raises(SessionError, match="builder 'tvm'"):
        runtime_engine.load_libraries(SimpleNamespace(builder="tvm"))


def test_the_doubles_have_nothing_the_real_bindings_lack():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for double in (ICudaEngine, IExecutionContext, IPluginRegistry):
        names = {name for name in vars(double) if not name.startswith("_")}
        assert names <= set(dir(getattr(trt, double.__name__)))
    for name in ("deserialize_cuda_engine", "get_plugin_registry", "engine_host_code_allowed"):
        assert hasattr(trt.Runtime, name)
    for double, real in (
        (Severity, trt.ILogger.Severity),
        (TensorIOMode, trt.TensorIOMode),
        (DataType, trt.DataType),
        (ExecutionContextAllocationStrategy, trt.ExecutionContextAllocationStrategy),
    ):
        assert set(double.__members__) <= set(real.__members__)
    # What TensorRT's enumerations call a type is what the table of element types calls it.
    names = {row.tensorrt for row in ELEMENT_TYPES.values() if row.tensorrt}
    assert names <= set(trt.DataType.__members__)
    assert trt.DataType.HALF.name == "HALF"


def test_the_double_of_cuda_has_nothing_the_real_bindings_lack():
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    names = {name for name in vars(Cudart) if name.startswith("cuda")}
    assert names <= set(dir(cudart))
    for double in (Cudart.cudaError_t, Cudart.cudaMemcpyKind):
        assert set(double.__members__) <= set(getattr(cudart, double.__name__).__members__)


def test_the_real_message_log_remembers_errors():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    messages = runtime.message_log(trt, logging.getLogger("test"))
    trt.Builder(messages)
    messages.log(trt.ILogger.Severity.ERROR, "oh")
    assert messages.errors == ["oh"]


class Driver:
    """libcuda with one card, or with none."""

    def __init__(self, init=0, count=1):
        self.init, self.count = init, count

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, ordinal):
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"a card"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 12080
        return 0

    def cuGetErrorName(self, status, text):
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (Driver(), replace(ADA, driver_cuda=12080)),
        (Driver(count=0), "the NVIDIA driver shows no device"),
        (Driver(init=100), "the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE"),
        (object(), "the NVIDIA driver lacks a function: 'object' object has no attribute 'cuInit'"),
    ],
)
def test_the_driver_is_asked_for_a_gpu(monkeypatch, driver, found):
    monkeypatch.setattr(runtime_gpu.ctypes, "CDLL", lambda name: driver)
    assert find_gpu() == found


def test_no_driver_is_no_gpu(monkeypatch):
    monkeypatch.setattr(runtime_gpu, "_DRIVER", "libnothing.so.1")
    assert find_gpu() == "no NVIDIA driver is installed"
