"""A model in memory that can say how its loss changes with every weight: the fast version of backward/reference.py.

`forward` and `backward` here are those of reference.py, line by line, but for the head: see head.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.backward import attention, head, ops
from llamalet.backward.dropout import NO_DROPOUT, Dropout
from llamalet.backward.memory import Array
from llamalet.backward.ops import BLOCK_COLUMNS, Drop
from llamalet.backward.reference import Sites
from llamalet.backward.runner import Runner
from llamalet.backward.workspace import new_workspace
from llamalet.config import IGNORED, ModelConfig, rope_tables
from llamalet.errors import FormatError, UsageError
from llamalet.model_file.quantize import from_bfloat16
from llamalet.reference import LAYER_TENSORS

Ids = NDArray[np.integer[Any]]


class TrainingModel:
    """A model's weights and gradients, and the memory and threads to compute them for batches of one shape.

    Attributes:
        config: the model's shape.
        weights: the checkpoint's tensors by name, without ".weight": float32. They may be changed in place.
        gradients: the gradient of each after `loss_and_gradients`.
        runner: the threads that compute.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        *,
        batch_size: int,
        n_positions: int,
        n_threads: int,
        rounded: bool = False,
    ) -> None:
        """Take the memory, and copy the weights into it.

        Args:
            config: the model's shape.
            weights: the checkpoint's tensors by name, without ".weight".
            batch_size: sequences in a batch (B).
            n_positions: positions of each (T).
            n_threads: threads that share the work.
            rounded: whether products multiply bfloat16; the processor must have it, see bfloat16.instructions.

        Raises:
            ConfigError: if the batch is too large.
            MemoryError: if there is not as much memory as workspace.n_bytes says.
            FormatError: if a weight is missing, too many, or of another shape.
        """
        self.config = config
        self._space = space = new_workspace(config, batch_size, n_positions, n_threads, rounded=rounded)
        self.weights: dict[str, Array] = space.weights
        self.gradients: dict[str, Array] = space.gradients
        shapes, wanted = ({name: w.shape for name, w in given.items()} for given in (weights, self.weights))
        if wrong := sorted(shapes.items() ^ wanted.items()):
            raise FormatError(
                f"the weights are not those of the shape: {wrong[0][0]} is missing, extra or of another shape"
            )
        for name, weight in self.weights.items():
            weight[:] = weights[name]
        self._shape = batch_size, n_positions
        self._cos, self._sin = rope_tables(config, n_positions)
        self._eps = np.float32(config.norm_eps)
        self.runner = Runner(n_threads, space.attention.edges)

    def loss_and_gradients(
        self, tokens: Ids, targets: Ids, dropout: Dropout = NO_DROPOUT, *, share: float = 1.0, add: bool = False
    ) -> float:
        """Compute the loss of a batch and its gradients.

        Args:
            tokens: ids (B, T).
            targets: the ids that follow (B, T); IGNORED ones do not count.
            dropout: which activations are dropped.
            share: what the gradients are multiplied with, for a step of several batches.
            add: whether to add to the gradients that are there.

        Returns:
            The mean cross-entropy in nats; NaN if no target counts.
        """
        tokens, targets = self._flat(tokens), self._flat(targets, lowest=IGNORED)
        self._forward(tokens, dropout)
        loss = self._head(targets, gradients=True, share=share, add=add)
        self._backward(tokens, dropout, add)
        return loss

    def loss(self, tokens: Ids, targets: Ids) -> float:
        """Return the loss of a batch alone, without dropout; arguments as above."""
        tokens, targets = self._flat(tokens), self._flat(targets, lowest=IGNORED)
        self._forward(tokens, NO_DROPOUT)
        return self._head(targets, gradients=False)

    def activations(self, tokens: Ids) -> dict[str, Array]:
        """Return copies of what the forward pass computes from tokens (B, T), without dropout, by name.

        layers.N.x is what goes into a layer; the other names are those of reference.LayerActivations; then normed and
        logits. All are (B, T, ...).
        """
        self._forward(self._flat(tokens), NO_DROPOUT)
        s, c = self._space, self.config
        widths = dict.fromkeys(("x", "attention_normed", "middle", "ffn_normed"), c.dim) | {
            "mixed": c.n_heads * c.head_dim, "gate": c.hidden_dim, "up": c.hidden_dim, "hidden": c.hidden_dim
        }  # fmt: skip
        found = {
            f"layers.{n}.{name}": numbers(getattr(layer, name), width)
            for n, layer in enumerate(s.layers)
            for name, width in widths.items()
        }
        normed = numbers(s.normed, c.dim)
        logits = normed @ self.weights["tok_embeddings" if c.tied else "output"].T
        found |= {"normed": normed, "logits": logits}
        return {name: array.reshape(*tokens.shape, -1) for name, array in found.items()}

    def _forward(self, tokens: NDArray[np.int64], dropout: Dropout) -> None:
        """Compute and keep the activations of all layers."""
        s, weights = self._space, self.weights
        x = s.layers[0].x
        self._run_by_positions(ops.embed, weights["tok_embeddings"], tokens, _drop(dropout, Sites.EMBEDDINGS), x)
        for layer, a in enumerate(s.layers):
            w = {name: weights[f"layers.{layer}.{name}"] for name in LAYER_TENSORS}
            at_weights, at_attention, at_ffn = (_drop(dropout, site) for site in Sites.of_layer(layer))

            self._run_by_positions(ops.rmsnorm, a.x, w["attention_norm"], self._eps, a.attention_normed)
            self._multiply(a.attention_normed, w["attention.wq"], s.q)
            self._multiply(a.attention_normed, w["attention.wk"], s.k)
            self._multiply(a.attention_normed, w["attention.wv"], s.v)
            self._run_by_positions(ops.rope, s.q, self._cos, self._sin, a.q)
            self._run_by_positions(ops.rope, s.k, self._cos, self._sin, a.k)
            self._run_by_positions(ops.split_heads, s.v, a.v)
            n_heads = len(a.q) * a.q.shape[1]
            self.runner.run(attention.attention, n_heads, a.q, a.k, a.v, at_weights, a.mixed, s.attention)
            self._multiply(a.mixed, w["attention.wo"], s.projected)
            self._run_by_positions(ops.add_dropped, a.x, s.projected, at_attention, a.middle)

            self._run_by_positions(ops.rmsnorm, a.middle, w["ffn_norm"], self._eps, a.ffn_normed)
            self._multiply(a.ffn_normed, w["feed_forward.w1"], a.gate)
            self._multiply(a.ffn_normed, w["feed_forward.w3"], a.up)
            self._run_by_positions(ops.swiglu, a.gate, a.up, a.hidden)
            self._multiply(a.hidden, w["feed_forward.w2"], s.projected)
            x = s.layers[layer + 1].x if layer + 1 < len(s.layers) else s.x
            self._run_by_positions(ops.add_dropped, a.middle, s.projected, at_ffn, x)
        self._run_by_positions(ops.rmsnorm, s.x, weights["norm"], self._eps, s.normed)

    def _head(self, targets: NDArray[np.int64], *, gradients: bool, share: float = 1.0, add: bool = False) -> float:
        """Return the loss; also compute the gradients of `normed` and of the output matrix, if they are wanted."""
        s = self._space
        name = "tok_embeddings" if self.config.tied else "output"
        output, d_output = self.weights[name], self.gradients[name]
        n_counted = np.count_nonzero(targets != IGNORED)
        divisor, vocab_size, n_rows = np.float32(n_counted / share), len(output), len(s.head.d_logits)
        by_rows, n_blocks = self.runner.pack_rows(output, s.output_by_rows), head.n_blocks(vocab_size)
        for first in range(0, len(targets), n_rows):
            rows = slice(first, first + n_rows)
            sides = s.normed[rows], by_rows, vocab_size, targets[rows]
            self.runner.run(head.forward, n_blocks, *sides, s.head)
            self.runner.by_rows(head.losses, len(targets[rows]), targets[rows], divisor, s.losses[rows], s.head)
            if not gradients:
                continue
            by_columns = self.runner.pack_columns(s.normed[rows], s.normed_by_columns)
            for block in range(0, n_blocks, head.GROUP):
                group = output[block * head.COLUMNS : (block + head.GROUP) * head.COLUMNS]
                more = by_columns, block, d_output, add or first > 0
                self.runner.run(head.backward, head.n_blocks(len(group)), *sides, *more, s.head)
                right = self.runner.pack_columns(group, s.packed_right)
                self.runner.product(s.head.d_logits[: len(targets[rows])], right, s.d_normed[rows], add=block > 0)
        return float(np.sum(s.losses, dtype=np.float64) / n_counted) if n_counted else float("nan")

    def _backward(self, tokens: NDArray[np.int64], dropout: Dropout, add: bool) -> None:
        """Compute the gradients of everything before the head, from d_normed."""
        s, weights = self._space, self.weights
        s.d_x[:] = 0
        self._norm_back(s.d_normed, s.x, "norm", add)
        for layer in reversed(range(self.config.n_layers)):
            a, prefix = s.layers[layer], f"layers.{layer}."
            w, d_w = ({name: x[prefix + name] for name in LAYER_TENSORS} for x in (weights, self.gradients))
            at_weights, at_attention, at_ffn = (_drop(dropout, site) for site in Sites.of_layer(layer))

            self._run_by_positions(ops.apply_dropout, s.d_x, at_ffn, s.d_projected)
            self._input_gradient(s.d_projected, w["feed_forward.w2"], s.d_hidden)
            self._weight_gradients(a.hidden, add, (s.d_projected, d_w["feed_forward.w2"]))
            self._run_by_positions(ops.swiglu_backward, s.d_hidden, a.gate, a.up, s.d_gate, s.d_up)
            self._input_gradient(s.d_gate, w["feed_forward.w1"], s.d_normed)
            self._input_gradient(s.d_up, w["feed_forward.w3"], s.d_normed, add=True)
            self._weight_gradients(
                a.ffn_normed, add, (s.d_gate, d_w["feed_forward.w1"]), (s.d_up, d_w["feed_forward.w3"])
            )
            self._norm_back(s.d_normed, a.middle, prefix + "ffn_norm", add)

            self._run_by_positions(ops.apply_dropout, s.d_x, at_attention, s.d_projected)
            self._input_gradient(s.d_projected, w["attention.wo"], s.d_mixed)
            self._weight_gradients(a.mixed, add, (s.d_projected, d_w["attention.wo"]))
            n_kv_heads = len(a.k) * a.k.shape[1]
            self.runner.run(
                attention.attention_backward, n_kv_heads, s.d_mixed, a.q, a.k, a.v, at_weights,
                s.d_q_heads, s.d_k_heads, s.d_v_heads, s.attention,
            )  # fmt: skip
            self._run_by_positions(ops.rope_backward, s.d_q_heads, self._cos, self._sin, s.d_q)
            self._run_by_positions(ops.rope_backward, s.d_k_heads, self._cos, self._sin, s.d_k)
            self._run_by_positions(ops.join_heads, s.d_v_heads, s.d_v)
            d_heads = {"attention.wq": s.d_q, "attention.wk": s.d_k, "attention.wv": s.d_v}
            for at, (name, d_y) in enumerate(d_heads.items()):
                self._input_gradient(d_y, w[name], s.d_normed, add=at > 0)
            self._weight_gradients(a.attention_normed, add, *((d_y, d_w[name]) for name, d_y in d_heads.items()))
            self._norm_back(s.d_normed, a.x, prefix + "attention_norm", add)

        self._run_by_positions(ops.apply_dropout, s.d_x, _drop(dropout, Sites.EMBEDDINGS), s.projected)
        d_embeddings = self.gradients["tok_embeddings"]
        if not (add or self.config.tied):  # in a tied model the head's gradient is there already
            d_embeddings[:] = 0
        self.runner.run(ops.embed_backward, -(-self.config.dim // BLOCK_COLUMNS), s.projected, tokens, d_embeddings)

    def _flat(self, ids: Ids, lowest: int = 0) -> NDArray[np.int64]:
        """Return ids (B, T) as int64 (N,): the kernels do not check what they are given.

        Raises:
            UsageError: if they are of another shape, or one is not in lowest..V - 1.
        """
        if ids.shape != self._shape:
            raise UsageError(f"a batch of shape {ids.shape}: must be {self._shape}, for which memory was taken")
        if ids.min() < lowest or ids.max() >= self.config.vocab_size:
            wrong = int(ids.max() if ids.max() >= self.config.vocab_size else ids.min())
            raise UsageError(f"token {wrong}: must be from {lowest} to {self.config.vocab_size - 1}")
        return np.ascontiguousarray(ids.reshape(-1), np.int64)

    # -- parts of both passes ------------------------------------------------------------------------------------------

    def _norm_back(self, d_normed: Array, x: Array, name: str, add: bool) -> None:
        """Add the gradient of the norm's input x to d_x; compute that of its weight."""
        s = self._space
        self._run_by_positions(ops.rmsnorm_backward, d_normed, x, self.weights[name], self._eps, s.d_x, s.d_norms)
        self.runner.run(ops.add_parts, 1, s.d_norms, add, self.gradients[name])

    def _multiply(self, x: Array, weight: Array, y: Array) -> None:
        """Compute y = x @ weight.T."""
        self.runner.product(x, self.runner.pack_rows(weight, self._space.packed_right), y)

    def _input_gradient(self, d_y: Array, weight: Array, d_x: Array, *, add: bool = False) -> None:
        """Compute d_x = d_y @ weight, or add it to d_x."""
        self.runner.product(d_y, self.runner.pack_columns(weight, self._space.packed_right), d_x, add=add)

    def _weight_gradients(self, x: NDArray[Any], add: bool, *gradients: tuple[NDArray[Any], Array]) -> None:
        """Compute d_weight = d_y.T @ x, or add it to d_weight, for pairs of d_y and d_weight."""
        right = self.runner.pack_columns(x, self._space.packed_right)
        for d_y, d_weight in gradients:
            self.runner.product(self.runner.transposed(d_y, self._space.packed_left), right, d_weight, add=add)

    def _run_by_positions(self, op: Any, *arguments: Any) -> None:
        """Run an op whose blocks are BLOCK_ROWS positions."""
        self.runner.by_rows(op, len(self._space.x), *arguments)


def _drop(dropout: Dropout, site: int) -> Drop:
    """Return dropout at one place, as the ops take it."""
    return Drop(np.uint64(dropout.state(site)), np.float32(dropout.rate))


def numbers(x: NDArray[Any], width: int) -> Array:
    """Return a float32 copy of an array (..., width), of an operand without what fills it up."""
    return np.array(x if x.dtype == np.float32 else from_bfloat16(x[..., :width]))
