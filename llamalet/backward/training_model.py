"""A model in memory that can say how its loss changes with every weight: the fast version of backward/reference.py.

`forward` and `backward` here are those of reference.py, line by line, but for the head: its logits would be the largest
array of all, so `head` makes them some positions at a time, and their gradients with them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.backward import ops
from llamalet.backward.dropout import NO_DROPOUT, Dropout
from llamalet.backward.memory import Array
from llamalet.backward.ops import BLOCK_COLUMNS, Drop
from llamalet.backward.reference import Sites
from llamalet.backward.runner import Runner
from llamalet.backward.workspace import new_workspace
from llamalet.config import IGNORED, ModelConfig, rope_tables
from llamalet.errors import FormatError, UsageError
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
        self, config: ModelConfig, weights: Mapping[str, Array], *, batch_size: int, n_positions: int, n_threads: int
    ) -> None:
        """Take the memory, and copy the weights into it.

        Raises:
            ConfigError: if the batch is too large.
            MemoryError: if there is not as much memory as workspace.n_bytes says.
            FormatError: if a weight is missing, too many, or of another shape.
        """
        self.config = config
        self._space = space = new_workspace(config, batch_size, n_positions, n_threads)
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
        s, names = self._space, ("x", "attention_normed", "mixed", "middle", "ffn_normed", "gate", "up", "hidden")
        found = {f"layers.{n}.{name}": getattr(layer, name) for n, layer in enumerate(s.layers) for name in names}
        logits = s.normed @ self.weights["tok_embeddings" if self.config.tied else "output"].T
        found |= {"normed": s.normed, "logits": logits}
        return {name: array.reshape(*tokens.shape, -1).copy() for name, array in found.items()}

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
            self.runner.run(ops.attention, len(a.q) * a.q.shape[1], a.q, a.k, a.v, at_weights, a.mixed, s.attention)
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
        by_rows = self.runner.pack_rows(output, s.output_by_rows)
        if gradients:
            by_columns = self.runner.pack_columns(output, s.packed_right)
        for first in range(0, len(targets), len(s.logits)):
            rows = slice(first, first + len(s.logits))
            normed, losses = s.normed[rows], s.losses[rows]
            logits = s.logits[: len(normed)]
            self.runner.product(normed, by_rows, logits)
            divisor = np.float32(n_counted / share)
            self.runner.run(ops.cross_entropy, len(logits), logits, targets[rows], divisor, losses)
            if gradients:
                self.runner.product(logits, by_columns, s.d_normed[rows])
                left = self.runner.pack_columns(logits, s.packed_left)
                right = self.runner.pack_columns(normed, s.normed_by_columns)
                self.runner.product(left, right, d_output, add=add or first > 0)
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

            self._run_by_positions(ops.apply_dropout, s.d_x, at_ffn, s.projected)
            self._input_gradient(s.projected, w["feed_forward.w2"], s.d_hidden)
            self._weight_gradient(s.projected, a.hidden, d_w["feed_forward.w2"], add)
            self._run_by_positions(ops.swiglu_backward, s.d_hidden, a.gate, a.up)
            d_gate, d_up = a.gate, a.up  # overwritten: the activations serve one backward pass
            self._input_gradient(d_gate, w["feed_forward.w1"], s.d_normed)
            self._input_gradient(d_up, w["feed_forward.w3"], s.d_normed, add=True)
            self._weight_gradient(d_gate, a.ffn_normed, d_w["feed_forward.w1"], add)
            self._weight_gradient(d_up, a.ffn_normed, d_w["feed_forward.w3"], add)
            self._norm_back(s.d_normed, a.middle, prefix + "ffn_norm", add)

            self._run_by_positions(ops.apply_dropout, s.d_x, at_attention, s.projected)
            self._input_gradient(s.projected, w["attention.wo"], s.d_mixed)
            self._weight_gradient(s.projected, a.mixed, d_w["attention.wo"], add)
            n_kv_heads = len(a.k) * a.k.shape[1]
            self.runner.run(
                ops.attention_backward, n_kv_heads, s.d_mixed, a.q, a.k, a.v, at_weights, s.d_q, s.d_k, s.d_v,
                s.attention,
            )  # fmt: skip
            self._run_by_positions(ops.rope_backward, s.d_q, self._cos, self._sin, s.q)
            self._run_by_positions(ops.rope_backward, s.d_k, self._cos, self._sin, s.k)
            self._run_by_positions(ops.join_heads, s.d_v, s.v)
            for at, (name, d_heads) in enumerate((("wq", s.q), ("wk", s.k), ("wv", s.v))):
                self._input_gradient(d_heads, w[f"attention.{name}"], s.d_normed, add=at > 0)
                self._weight_gradient(d_heads, a.attention_normed, d_w[f"attention.{name}"], add)
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

    def _weight_gradient(self, d_y: Array, x: Array, d_weight: Array, add: bool) -> None:
        """Compute d_weight = d_y.T @ x, or add it to d_weight."""
        left = self.runner.pack_columns(d_y, self._space.packed_left)
        right = self.runner.pack_columns(x, self._space.packed_right)
        self.runner.product(left, right, d_weight, add=add)

    def _run_by_positions(self, op: Any, *arguments: Any) -> None:
        """Run an op whose blocks are BLOCK_ROWS positions."""
        self.runner.by_rows(op, len(self._space.x), *arguments)


def _drop(dropout: Dropout, site: int) -> Drop:
    """Return dropout at one place, as the ops take it."""
    return Drop(np.uint64(dropout.state(site)), np.float32(dropout.rate))
