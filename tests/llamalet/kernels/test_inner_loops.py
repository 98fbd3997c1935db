"""The inner loops compiled for processors that need not be this one, and what is known of Arm without one.

llvmlite holds LLVM's code generators. How fast the loops are there is not known. How many instructions they take is.
"""

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
import numba
import pytest
from llvmlite import ir

from llamalet import cores
from llamalet.kernels import processor, simd
from llamalet.kernels.llvm import F32, I8, I32, I64, i64
from llamalet.model_file.quantize import CHUNK_COLS, Q4_GROUP_SIZE, Q8_GROUP_SIZE, ROW_BLOCK

GROUP_SIZES = {8: Q8_GROUP_SIZE, 4: Q4_GROUP_SIZE}
ARM_FEATURES = {"neoni8mm": "+neon,+dotprod,+i8mm", "neondot": "+neon,+dotprod", "neon": "+neon"}
FEATURES = ARM_FEATURES | {"avx2": "+avx2,+fma"}
# Processors by LLVM's names: Intel's of 2013, AMD's of 2020; of Graviton 2 and 3, Raspberry Pi 5 and 4, Macs.
PROCESSORS = {
    "avx2": ("haswell", "znver3"),
    "neoni8mm": ("neoverse-v1", "apple-m2"),
    "neondot": ("neoverse-n1", "cortex-a76", "apple-m1"),
    "neon": ("cortex-a72",),
}
WITH_DOT_PRODUCTS = [(path, cpu) for path in ("neoni8mm", "neondot") for cpu in PROCESSORS[path]]


def inner_loops(monkeypatch, path: str, cpu: str, bits: int, blocks: int, vectors: int) -> list[list[str]]:
    """Return the loops of simd.multiply_blocks, each the text of its instructions."""
    monkeypatch.setattr(simd, "instruction_path", lambda: path)
    monkeypatch.setattr(processor, "features", lambda: processor.added_in(FEATURES[path]))
    chunk, scales, x = (
        ir.ArrayType(I8, n) for n in (ROW_BLOCK * CHUNK_COLS * bits // 8, 2 * ROW_BLOCK, GROUP_SIZES[bits])
    )
    of_block, of_vector = (chunk, scales), (x, F32, I32)
    kinds = [*of_block * blocks, *of_vector * vectors, ir.VectorType(F32, ROW_BLOCK)]
    module, function, builder = program(path, kinds)
    width, *pointers, out = function.args
    w_rows, x_rows = pointers[: 2 * blocks], pointers[2 * blocks :]
    w_rows, x_rows = (
        [rows[i : i + n] for i in range(0, len(rows), n)] for rows, n in ((w_rows, len(of_block)), (x_rows, 3))
    )
    values = SimpleNamespace(dtype=SimpleNamespace(size=chunk.count), width=width)  # all that it needs of a Table
    for i, total in enumerate(simd._block_products(builder, w_rows, x_rows, values, x.count)):
        builder.store(builder.load(total), builder.gep(out, [i64(i)]))
    builder.ret_void()
    return loops_of(assembly(str(module), cpu, FEATURES[path]))


def program(path: str, kinds: list[Any]) -> tuple[ir.Module, ir.Function, ir.IRBuilder]:
    """Return an empty program for a processor with a path: a function of an integer and pointers to these types."""
    module = ir.Module("products")
    module.triple = f"{'aarch64' if path in ARM_FEATURES else 'x86_64'}-unknown-linux-gnu"
    signature = ir.FunctionType(ir.VoidType(), [I64, *(kind.as_pointer() for kind in kinds)])
    function = ir.Function(module, signature, "products")
    return module, function, ir.IRBuilder(function.append_basic_block())


def loop_over_groups(*args: Any) -> list[str]:
    """Return the instructions of one group in simd.multiply_blocks; takes what inner_loops does."""
    return max(inner_loops(*args), key=len)


def assembly(code: str, cpu: str, features: str) -> str:
    """Compile LLVM's language as numba does, for a processor that need not be this one."""
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    module = llvmlite.binding.parse_assembly(code)
    target = llvmlite.binding.Target.from_triple(module.triple)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    options = llvmlite.binding.create_pipeline_tuning_options(speed_level=3)
    passes = llvmlite.binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module)


def loops_of(text: str) -> list[list[str]]:
    """Return the instructions of each piece of a program that ends with a jump back to its beginning."""
    instructions, labels, loops = [], {}, []
    for line in text.splitlines():
        line = re.split("//|#", line)[0].strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif line and not line.startswith("."):
            instructions.append(line)
            if line.startswith(("b.", "cb", "tb", "j")) and line.split()[-1] in labels:
                loops.append(instructions[labels[line.split()[-1]] :])
    return loops


def per_64_products(loop: list[str], bits: int, blocks: int, vectors: int) -> float:
    return len(loop) * 64 / (ROW_BLOCK * GROUP_SIZES[bits] * blocks * vectors)


@pytest.mark.parametrize("bits, blocks, vectors, limit", [(8, 1, 4, 8), (4, 1, 4, 10.5), (8, 2, 1, 14), (4, 2, 1, 14)])
@pytest.mark.parametrize("path, cpu", WITH_DOT_PRODUCTS)
def test_an_instruction_multiplies_16_bytes_and_few_others_are_needed(
    monkeypatch, path, cpu, bits, blocks, vectors, limit
):
    loop = loop_over_groups(monkeypatch, path, cpu, bits, blocks, vectors)
    name = {"neoni8mm": "usdot", "neondot": "sdot"}[path]
    n_products = ROW_BLOCK * GROUP_SIZES[bits] * blocks * vectors
    assert Counter(line.split()[0] for line in loop)[name] == n_products // 16
    assert per_64_products(loop, bits, blocks, vectors) <= limit
    # The activations are not repeated in a register, but taken by the number of their lane.
    assert all(re.search(r"\.4b\[\d\]$", line) for line in loop if line.startswith(name))
    assert simd.tile_blocks() == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_without_dot_products_sums_are_16_bits_wide_at_first(monkeypatch, bits):
    loop = loop_over_groups(monkeypatch, "neon", "cortex-a72", bits, 2, 1)
    found = Counter(line.split()[0] for line in loop)
    n_products = 2 * ROW_BLOCK * GROUP_SIZES[bits]
    assert sum(found[name] for name in ("smull", "smull2", "smlal", "smlal2")) == n_products // 8
    assert found["sadalp"] + found["saddlp"] == n_products // 16
    assert per_64_products(loop, bits, 2, 1) <= 30


@pytest.mark.parametrize("bits, limit", [(8, 11), (4, 8.5)])
@pytest.mark.parametrize("cpu", PROCESSORS["avx2"])
def test_with_avx2_a_chunk_needs_few_instructions_and_no_sum_leaves_its_register(monkeypatch, cpu, bits, limit):
    vectors = 4
    loops = inner_loops(monkeypatch, "avx2", cpu, bits, 1, vectors)
    loop = min((loop for loop in loops if any(line.startswith("vpmaddubsw") for line in loop)), key=len)
    assert simd.tile_blocks() == 1
    assert sum(line.startswith("vpmaddubsw") for line in loop) == 4 * vectors
    assert len(loop) * 64 <= limit * ROW_BLOCK * CHUNK_COLS * vectors
    assert sum(line.endswith("(%rsp)") and "ymm" in line for line in loop) <= 2


@pytest.mark.parametrize("path, limit", [("avx2", 2), ("neondot", 1.9)])
def test_sums_of_floats_stay_in_registers(monkeypatch, path, limit):
    monkeypatch.setattr(simd, "instruction_path", lambda: path)
    monkeypatch.setattr(processor, "is_arm", lambda: path in ARM_FEATURES)
    monkeypatch.setattr(processor, "features", lambda: processor.added_in(FEATURES[path]))
    rows, vectors = simd.float_tile()
    module, function, builder = program(path, [F32] * (rows + vectors + 1))
    width, *pointers, out = function.args
    for i, total in enumerate(simd._dots(builder, pointers[:rows], pointers[rows:], width)):
        builder.store(total, builder.gep(out, [i64(i)]))
    builder.ret_void()

    def n_products(loop: list[str]) -> int:
        return sum(line.startswith(("vfmadd", "fmla")) for line in loop)

    loop = max(loops_of(assembly(str(module), PROCESSORS[path][-1], FEATURES[path])), key=n_products)
    assert n_products(loop) % (rows * vectors * simd.FLOAT_LANES // (8 if path == "avx2" else 4)) == 0  # it may repeat
    assert len(loop) <= limit * n_products(loop)
    assert not any("sp" in line for line in loop)


@pytest.mark.parametrize("path", ARM_FEATURES)
def test_scales_are_multiplied_and_added_with_one_rounding(monkeypatch, path):
    """As on x86, where the bits of q8 and q4 come from."""
    loop = loop_over_groups(monkeypatch, path, PROCESSORS[path][0], 8, 1, 1)
    assert sum(line.startswith("fmla") for line in loop) == ROW_BLOCK // 4
    assert not any(line.startswith("fadd") for line in loop)


# -- what the processor has -------------------------------------------------------------------------------------------


def system(monkeypatch, platform: str, **functions: Any) -> None:
    """Let the C library of another system answer."""
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(**functions))
    monkeypatch.setattr("platform.machine", lambda: {"darwin": "arm64", "linux": "aarch64"}[platform])


def auxiliary_vector(monkeypatch, hwcap: int, hwcap2: int) -> None:
    """Let Linux name these features."""

    def getauxval(number: int) -> int:
        return {16: hwcap, 26: hwcap2}[number] & (2**64 - 1)

    system(monkeypatch, "linux", getauxval=getauxval)


@pytest.mark.parametrize(
    "hwcap, hwcap2, expected",
    [
        (0x8FB, 0, set()),  # Cortex-A72
        (0x119FFB, 0, {"dotprod"}),  # Neoverse N1
        (0xECFFFFFB, 0x7F877FFF, {"dotprod", "i8mm"}),  # what qemu calls max
        (~(1 << 20), 1 << 13, {"i8mm"}),
        (-1, ~(1 << 13), {"dotprod"}),
    ],
)
def test_linux_names_the_dot_products(monkeypatch, hwcap, hwcap2, expected):
    auxiliary_vector(monkeypatch, hwcap, hwcap2)
    assert processor.dot_products() == expected


def macos(monkeypatch, numbers: dict[str, int]) -> None:
    """Let macOS know these numbers under these names."""

    def sysctlbyname(name: bytes, value: Any, size: Any, new: None, new_size: int) -> int:
        if name.decode() not in numbers:
            return -1
        value._obj.value = numbers[name.decode()]
        return 0

    system(monkeypatch, "darwin", sysctlbyname=sysctlbyname)


def test_macos_names_the_dot_products(monkeypatch):
    macos(monkeypatch, {"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_I8MM": 0})
    assert processor.dot_products() == {"dotprod"}
    macos(monkeypatch, {"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_I8MM": 1})
    assert processor.dot_products() == {"dotprod", "i8mm"}
    macos(monkeypatch, {})
    assert processor.dot_products() == set()


def test_efficiency_cores_of_macs_do_not_count(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    macos(monkeypatch, {"hw.perflevel0.physicalcpu": 4, "hw.physicalcpu": 8})
    assert cores.physical_cores() == 4
    macos(monkeypatch, {"hw.physicalcpu": 8})  # of Intel
    assert cores.physical_cores() == 8
    macos(monkeypatch, {})
    assert cores.physical_cores() == 16


@pytest.mark.parametrize(
    "features, name, expected",
    [(None, None, "+neon,-sve,+dotprod"), ("+neon", None, "+neon"), (None, "cortex-a72", None)],
)
def test_numba_compiles_for_the_features_that_llvm_does_not_find(monkeypatch, features, name, expected):
    auxiliary_vector(monkeypatch, 1 << 20, 0)
    monkeypatch.setattr(processor, "get_host_cpu_features", lambda: "+neon,-sve")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    monkeypatch.setattr(numba.config, "CPU_NAME", name)
    processor.add_missing_features()
    assert numba.config.CPU_FEATURES == expected


@pytest.mark.parametrize(
    "asked_for, paths",
    [
        ("+neon,-sve,+dotprod,+i8mm", ["neoni8mm", "neondot", "neon", "portable"]),
        ("+dotprod", ["neondot", "neon", "portable"]),
        ("-sve", ["neon", "portable"]),  # numba compiled something before our modules were imported
    ],
)
def test_a_path_needs_what_the_code_generator_was_asked_for(monkeypatch, asked_for, paths):
    """Not what the processor has: at an instruction that it was not asked for, LLVM ends the process."""
    auxiliary_vector(monkeypatch, -1, -1)
    generator = SimpleNamespace(magic_tuple=lambda: ("aarch64", "generic", asked_for))
    target = SimpleNamespace(target_context=SimpleNamespace(codegen=lambda: generator))
    monkeypatch.setattr(processor, "cpu_target", target)
    monkeypatch.setattr(processor, "_arm_features", processor._arm_features.__wrapped__)
    assert simd.available_paths() == paths
