"""The weights as the kernels take them: the layers of each matrix as one LayerStack, where the file is mapped."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from llamalet.aligned import address_of
from llamalet.kernels.llvm import F32, I8, I64, Table, i64
from llamalet.model_file.quantize import ROW_BLOCK, Packed, Quantized, pack
from llamalet.model_file.reader import ModelFile
from llamalet.reference import output_weight

FLOAT_BYTES = 4


class LayerStack(NamedTuple):
    """The layers of a matrix, at equal distances in memory.

    first: the first layer, a contiguous array.
    distance: bytes from one layer to the next.
    """

    first: Any
    distance: int


class PackedMatrix(NamedTuple):
    """A quantize.Packed matrix whose innermost axis is a record with the field `values`, so that numba knows its size.

    values: records of a chunk's 128 bytes at 8 bits a weight, of 64 at 4 bits: (blocks, chunks), or a LayerStack of it.
    scales: records of 16 scales, float32 or the bits of bfloat16: (blocks, groups), or a LayerStack of it.
    """

    values: Any
    scales: Any


class Weights(NamedTuple):
    """A model. Matrices are LayerStacks of float32 or bfloat16 (rows, cols), or PackedMatrix of LayerStacks.

    wq, wk, wv, wo, w1, w3, w2: the matrices of the layers.
    output, tok_embeddings: matrices of one layer, the same one in a tied model.
    attention_norm: float32 (L, C).
    ffn_norm: float32 (L, C).
    norm: float32 (C,).
    norm_eps: float32.
    vocab_size: V.
    group_size: columns that share a scale of a PackedMatrix; 0 for floats.
    """

    wq: Any
    wk: Any
    wv: Any
    wo: Any
    w1: Any
    w3: Any
    w2: Any
    output: Any
    tok_embeddings: Any
    attention_norm: Any
    ffn_norm: Any
    norm: Any
    norm_eps: Any
    vocab_size: int
    group_size: int


def stack_weights(file: ModelFile) -> Weights:
    """Return a model's weights, without a copy where its layers are at equal distances, as in our files."""
    tensors = file.tensors

    def layers(name: str) -> list[Any]:
        return [tensors[f"layers.{layer}.{name}"] for layer in range(file.config.n_layers)]

    return Weights(
        **{name: as_matrix(layers(f"attention.{name}")) for name in ("wq", "wk", "wv", "wo")},
        **{name: as_matrix(layers(f"feed_forward.{name}")) for name in ("w1", "w3", "w2")},
        output=as_matrix([output_weight(tensors)]),
        tok_embeddings=as_matrix([tensors["tok_embeddings"]]),
        attention_norm=np.stack(layers("attention_norm")),
        ffn_norm=np.stack(layers("ffn_norm")),
        norm=np.array(tensors["norm"]),
        norm_eps=np.float32(file.config.norm_eps),
        vocab_size=file.config.vocab_size,
        group_size=getattr(tensors["tok_embeddings"], "group_size", 0),
    )


def as_matrix(layers: Sequence[Any]) -> Any:
    """Return the layers of a matrix as a LayerStack, or as a PackedMatrix of two; int8 of llama2.c is packed first."""
    if isinstance(layers[0], Quantized):
        packed = [pack(layer) for layer in layers]
        # In one array, whose parts keep it alive.
        values, scales = (list(np.stack([matrix[part] for matrix in packed])) for part in range(2))
    elif isinstance(layers[0], Packed):
        values, scales = [layer.values for layer in layers], [layer.scales for layer in layers]
    else:
        return stack(layers)
    chunk = np.dtype([("values", np.uint8, values[0].shape[2:])])
    row_scales = np.dtype([("values", scales[0].dtype, (ROW_BLOCK,))])
    return PackedMatrix(
        stack([array.view(chunk)[..., 0] for array in values]),
        stack([array.view(row_scales)[..., 0] for array in scales]),
    )


def stack(arrays: Sequence[NDArray[Any]]) -> LayerStack:
    """Return arrays of one shape as a LayerStack: in place if they are at equal distances, else copied.

    The LayerStack keeps the first array alive; the caller keeps the others.
    """
    distances = set(np.diff([address_of(array) for array in arrays]).tolist())
    if len(distances) > 1 or not all(array.flags.c_contiguous for array in arrays):
        copy = np.ascontiguousarray(np.stack(arrays))
        first, distance = copy[0], copy.strides[0]
    else:
        first, distance = arrays[0].view(), distances.pop() if distances else 0
    # One numba type wherever the weights come from, so that the kernels are compiled once.
    first.flags.writeable = False
    return LayerStack(first, distance)


@intrinsic
def layer_of(typing_context: Any, layers: Any, index: Any) -> Any:
    """Return one layer of a LayerStack, or of each LayerStack of a named tuple; the index is not checked."""
    result = _layer_type(layers)

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _layer_of(context, builder, layers, *args)

    return result(layers, types.intp), build


def _layer_type(layers: Any) -> Any:
    """Return numba's type of one layer."""
    if layers.instance_class is LayerStack:
        return layers[0]
    return types.NamedTuple([_layer_type(part) for part in layers], layers.instance_class)


def _layer_of(context: Any, builder: ir.IRBuilder, layers: Any, value: Any, index: Any) -> Any:
    """Return one layer of a value of numba's type `layers`."""
    result = _layer_type(layers)
    if layers.instance_class is not LayerStack:
        parts = zip(layers, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, result, [_layer_of(context, builder, *part, index) for part in parts])
    first, distance = cgutils.unpack_tuple(builder, value)
    array = context.make_array(result)(context, builder, first)
    data = builder.gep(builder.bitcast(array.data, I8.as_pointer()), [builder.mul(index, distance)])
    data = builder.bitcast(data, array.data.type)
    return array_at(context, builder, result, data, array.shape, array.strides, array.itemsize)


@intrinsic
def floats_at(typing_context: Any, address: Any, rows: Any, cols: Any) -> Any:
    """Return the float32 array (rows, cols) at an address; the caller keeps that memory alive."""
    result = types.Array(types.float32, 2, "C")

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, rows, cols = args
        data = builder.inttoptr(address, F32.as_pointer())
        return contiguous_at(context, builder, result, data, (rows, cols), FLOAT_BYTES)

    return result(types.intp, types.intp, types.intp), build


@intrinsic
def address_of_row(typing_context: Any, matrix: Any, row: Any) -> Any:
    """Return the address of a row of a matrix (rows, cols), contiguous."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(Table(context, builder, matrix, args[0]).row(args[1]), I64)

    return types.intp(matrix, types.intp), build


def contiguous_at(context: Any, builder: ir.IRBuilder, result: Any, data: Any, shape: Any, itemsize: int) -> Any:
    """Return a contiguous array of type `result` without an owner; its items take `itemsize` bytes."""
    strides = [i64(itemsize)]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(length, strides[0]))
    return array_at(context, builder, result, data, shape, strides, i64(itemsize))


def array_at(
    context: Any, builder: ir.IRBuilder, result: Any, data: Any, shape: Any, strides: Any, itemsize: Any
) -> Any:
    """Return an array of type `result` without an owner, so that numba does not count references to it."""
    array = context.make_array(result)(context, builder)
    context.populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()
