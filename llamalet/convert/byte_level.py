"""Byte-level vocabularies as Hugging Face and llama.cpp store them: a visible character per byte, and pairs to merge.

A tokenizer.json says with regular expressions how texts are split into words; llama.cpp has a name for each way that it
knows. In our rank tables (Llama 3's kind) a token's id is its rank, and the ranks decide what is merged. In both of
the others a list of pairs does, so each token of a rank table gives one pair for every way to split it into two tokens,
in the order of the ids.

Source: llama.cpp, src/llama-vocab.cpp (llm_tokenizer_bpe, load); transformers, convert_llama_weights_to_hf.py and
convert_slow_tokenizer.py (TikTokenConverter).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llamalet.errors import TokenizerError
from llamalet.tokenizer import Llama3Tokenizer
from llamalet.tokenizer.byte_alphabet import byte_level_bytes, pairs_in
from llamalet.tokenizer.llama3 import WORDS

# How GPT-2 splits texts, which is what ByteLevel does by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
QWEN2 = WORDS.replace(r"\p{N}{1,3}", DIGIT)
LINE_END, IDEOGRAPHS = "[\r\n]", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


class Words(NamedTuple):
    """A way to split texts into words, and to merge within them.

    patterns: regular expressions, applied one after another; what one matches becomes a word of its own.
    ignore_merges: whether a word that is a token becomes that token, whatever merging would give.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False


# llama.cpp's names.
NAMES: Mapping[str, Words] = {
    "llama-bpe": Words((WORDS,), ignore_merges=True),
    "smaug-bpe": Words((WORDS,)),
    "gpt-2": Words((GPT2,)),
    "smollm": Words((DIGIT, GPT2)),
    "qwen2": Words((QWEN2,)),
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-coder": Words((LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, DIGIT)),
}
# Its other names for the same.
ALIASES: Mapping[str, str] = {
    alias: name
    for name, aliases in {
        "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4"),
        "smaug-bpe": ("dbrx", "chatglm-bpe"),
        "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "mellum"),
        "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        "qwen2": ("stablelm2", "deepseek-r1-qwen", "hunyuan", "solar-open", "megrez", "grok-2"),
    }.items()
    for alias in aliases
}
# Those under which BOS begins texts, unless the file says otherwise.
BEGIN_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")


class MergeTable(NamedTuple):
    """A vocabulary of this kind.

    tokens: the token of each id, one character per byte; special tokens by name.
    merges: the pairs, in the order in which they are merged.
    """

    tokens: list[str]
    merges: list[tuple[str, str]]


def table(vocabulary: Llama3Tokenizer) -> MergeTable:
    """Return a rank table's tokens and pairs."""
    characters = {byte: character for character, byte in byte_level_bytes().items()}
    n_ranks = vocabulary.vocab_size - len(vocabulary.special)
    rows = [piece for piece, _ in vocabulary.pieces()]
    tokens = ["".join(map(characters.__getitem__, row)) for row in rows[:n_ranks]]
    ids = {token: id for id, token in enumerate(tokens)}
    merges = sorted(pairs_in(ids), key=lambda pair: (ids[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    return MergeTable(tokens + [row.decode() for row in rows[n_ranks:]], merges)


def pre_tokenizer(words: Words) -> dict[str, Any]:
    """Return the steps of a tokenizer.json that split texts into these words."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in words.patterns
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}


def name_of(steps: Sequence[Mapping[str, Any]], *, ignore_merges: bool) -> str:
    """Return llama.cpp's name of the way in which a tokenizer.json splits texts.

    Args:
        steps: its pre-tokenizers.
        ignore_merges: see Words. If llama.cpp has only the other way, that is returned: most vocabularies reach all
            of their tokens by merging, and texts tell whether this is one.

    Raises:
        TokenizerError: naming the steps, if llama.cpp has no name for them.
    """
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    names = [name for name, words in NAMES.items() if words.patterns == patterns]
    if not names or not steps or steps[-1]["type"] != "ByteLevel":
        shown = ", ".join(map(_shown, steps)) or "nothing"
        raise TokenizerError(f"its texts are split into words by {shown}, for which llama.cpp has no name")
    return next((name for name in names if NAMES[name].ignore_merges == ignore_merges), names[0])


def _patterns(step: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the regular expressions of a step, whose matches become words; one that matches nothing if it differs."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space", True):
        return (GPT2,) if step.get("use_regex", True) else ()
    if step["type"] == "Digits" and step.get("individual_digits"):
        return (DIGIT,)
    # Removing what does not match is the same where an expression matches everything; texts tell.
    how = step.get("behavior"), step.get("invert", False)
    if step["type"] == "Split" and how in (("Isolated", False), ("Removed", True)) and "Regex" in step["pattern"]:
        return (step["pattern"]["Regex"],)
    return ("(?!)",)


def _shown(step: Mapping[str, Any]) -> str:
    """Return a step for a message: its type, and what it says beside."""
    told = {
        key: value for key, value in step.items() if key not in ("type", "trim_offsets") and value not in (None, "")
    }
    text = ", ".join(f"{key}={value}" for key, value in told.items())
    return f"{step['type']}({text[:80]}{'...' if len(text) > 80 else ''})"
