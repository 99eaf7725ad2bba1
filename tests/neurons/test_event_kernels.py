"""The kernels for each kind of processor: those that run here by their integers, the others as code."""

import numpy as np
import pytest

pytest.importorskip("numba")

from llvmlite import binding, ir

from neurons.cpu import instructions, kernels
from neurons.cpu.instructions import INSTRUCTIONS
from neurons.cpu.linear import PackedLinear
from neurons.cpu.memory import HUGE_PAGE, aligned

HERE = [name for name in INSTRUCTIONS if instructions.runs_here(name)]
# a processor of each kind, and an instruction that must not be missing
TARGETS = {
    "avx512vnni": ("x86_64-unknown-linux-gnu", "cascadelake", "vpdpbusd"),
    "avxvnni": ("x86_64-pc-windows-msvc", "alderlake", "vpdpbusd"),
    "avx2": ("x86_64-apple-macosx", "haswell", "vpmaddwd"),
    "dotprod": ("arm64-apple-macosx", "apple-m1", "sdot"),
    "portable": ("aarch64-unknown-linux-gnu", "cortex-a53", "smull"),
}


def a_matrix(rng, inputs, outputs, bits):
    """Weights, their groups' scales if they have any, and the integers that the sums are of."""
    if bits == 8:
        weight = rng.integers(-128, 128, (inputs, outputs)).astype(np.int8)
        return weight, None, weight.astype(np.int64)
    weight = rng.integers(-8, 8, (inputs, outputs)).astype(np.int8)
    scales = rng.integers(0, 256, (-(-inputs // 32), outputs)).astype(np.uint8)
    return weight, scales, weight * np.repeat(scales.astype(np.int64), 32, 0)[:inputs]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("layout", ["rows", "tiles"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers(name, layout, bits):
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (3, 5), (32, 64), (33, 65), (64, 128), (63, 127), (100, 257), (257, 300)]
    for inputs, outputs in shapes:
        weight, scales, integers = a_matrix(rng, inputs, outputs, bits)
        linear = PackedLinear(weight, scales, layout, name)
        for share in (0.0, 0.05, 0.6, 1.0):
            spikes = rng.integers(-128, 128, (2, inputs)) * (rng.random((2, inputs)) < share)
            for threads in (1, 2, 3):
                sums = linear.sums(spikes.astype(np.int8), threads)
                assert sums.dtype == np.int32
                assert np.array_equal(sums, spikes @ integers)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_every_spike_times_every_weight(name, layout):
    weight = np.arange(-128, 128).astype(np.int8)[None]
    linear = PackedLinear(weight, None, layout, name)
    spikes = np.arange(-128, 128)[:, None]
    assert np.array_equal(linear.sums(spikes.astype(np.int8)), spikes @ weight.astype(np.int64))
    nibbles = np.arange(-8, 8).astype(np.int8)[None].repeat(256, 1)
    scales = np.arange(256).repeat(16).astype(np.uint8)[None]
    nibbles = np.tile(np.arange(-8, 8).astype(np.int8), 256)[None]
    linear = PackedLinear(nibbles, scales, layout, name)
    wanted = spikes @ (nibbles * scales.astype(np.int64))
    assert np.array_equal(linear.sums(spikes.astype(np.int8)), wanted)


def test_instructions_that_are_missing_are_refused():
    missing = [name for name in INSTRUCTIONS if name not in HERE]
    assert missing  # no processor is x86 and ARM
    with pytest.raises(ValueError, match="does not have the instructions"):
        PackedLinear(np.zeros((1, 1), np.int8), None, "rows", missing[0])
    assert instructions.best() == HERE[0]
    assert HERE[-1] == "portable"


def all_kernels(name):
    module, kind = ir.Module(), INSTRUCTIONS[name]
    functions = [kernels.rows_int8(module, kind), kernels.rows_int4(module, kind)]
    for bits in (8, 4):
        functions += [kernels.tiles(module, kind, bits, floats) for floats in (False, True)]
    for function in functions:
        function.linkage = "external"
    return module


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_code_for_every_kind_of_processor(name):
    triple, processor, instruction = TARGETS[name]
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=processor, opt=2)
    module = all_kernels(name)
    module.triple = triple
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(2))
    passes.getModulePassManager().run(parsed, passes)
    assembly = machine.emit_assembly(parsed)
    assert assembly.count(instruction) >= 4
    assert "prefetch" in assembly or "prfm" in assembly
    assert len(machine.emit_object(parsed)) > 1000


@pytest.mark.parametrize("size", [0, 1, 1000, HUGE_PAGE, HUGE_PAGE + 1])
def test_memory(size):
    for dtype in (np.uint8, np.float32):
        memory = aligned(size, dtype)
        assert (memory.size, memory.dtype, memory.any()) == (size, dtype, False)
        assert not size or memory.ctypes.data % 64 == 0
        memory[:] = 1
        assert memory.sum() == size
