"""What a model tells while it learns: the beginning of a story at each evaluation, by the runtime."""

import shutil
import sys
import textwrap
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import torch

from llamalet.config import ModelConfig
from llamalet.tokenizer import load
from training.run.interrupts import Interrupts
from training.run.progress import say
from training.weights import to_arrays

MAX_TOKENS = 80
INDENT = " " * 9
WIDTH = 100


class Storyteller:
    """Tells stories with the weights of the moment, always from the same seed, so that they can be compared.

    Args:
        config: the model's shape.
        tokenizer_path: its vocabulary.
        seed: of the choice of tokens; torch's generators are not touched.
        threads: how many threads compute.
    """

    def __init__(self, config: ModelConfig, tokenizer_path: Path, seed: int, threads: int) -> None:
        self.config, self.seed, self.threads = config, seed, threads
        self.tokenizer = load(tokenizer_path, config.vocab_size)
        self._broken = False

    def tell(self, state: Mapping[str, torch.Tensor], interrupts: Interrupts) -> str | None:
        """Print the beginning of a story and return it; None, and one line on stderr, if that fails.

        Args:
            state: the model's state dict.
            interrupts: a signal ends the story; what there is of it is printed and returned.
        """
        if self._broken or interrupts.requested:
            return None
        try:
            # The runtime and its compiler are imported by the first story.
            from llamalet.kernels.transformer import Transformer
            from llamalet.model_file import Header, ModelFile
            from llamalet.runtime import Model

            file = ModelFile(Path("memory"), Header(1, self.config), to_arrays(state))
            model = Model(file.path, Transformer(file, threads=self.threads), self.tokenizer)
            pieces = model.generate(max_new_tokens=MAX_TOKENS, temperature=1.0, top_p=0.9, seed=self.seed)
            text = "".join(takewhile(lambda _: not interrupts.requested, pieces))
        except Exception as error:  # no story is worth a run
            print(f"warning: no stories: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            self._broken = True
            return None
        say(indented(text))
        return text


def indented(text: str) -> str:
    """Return a text set off from the lines of progress around it."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    lines = [textwrap.wrap(line, max(width - len(INDENT), 20)) for line in text.splitlines()]
    return "\n".join(INDENT + line for wrapped in lines for line in wrapped)
