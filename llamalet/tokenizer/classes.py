"""What transformers' tokenizer classes make of a tokenizer.json.

Most models' class takes the file as it is. A class with a tokenizer of its own takes the vocabulary, the merges and the
added tokens, and puts other steps and special tokens in place of the file's: they decide how its texts are cut.

Source: transformers 5.23, models/auto/tokenization_auto.py and models/*/tokenization_*.py
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from llamalet.tokenizer.huggingface import piece_decoder
from llamalet.tokenizer.llama2 import SPACE_MARK
from llamalet.tokenizer.llama3 import WORDS

Fields = Mapping[str, Any]

NFC = {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}
QWEN2_WORDS = WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN3_5_WORDS = QWEN2_WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """A class with a tokenizer of its own.

    Attributes:
        steps: tokenizer_config.json's fields -> the normalizer, pre_tokenizer and decoder.
        special: the special tokens by their roles, where no file names another.
        pieces: whether tokens are SentencePiece's pieces, with a token for each byte; else they spell bytes.
        has_unknown: whether what the vocabulary lacks becomes the unknown token; else it is left out.
        begins: what begins every text: what the file's post-processor says, BOS, or nothing.
        adds_again: which special tokens become plain special again (their flags dropped): none; those whose role no
            file names; or all.
    """

    steps: Callable[[Fields], dict[str, Any]]
    special: Mapping[str, str]
    pieces: bool = False
    has_unknown: bool = False
    begins: Literal["file", "bos", "nothing"] = "file"
    adds_again: Literal["none", "unnamed", "all"] = "none"


def _byte_level(config: Fields, *split: Fields, normalizer: Fields | None = None) -> dict[str, Any]:
    """Return the steps of a byte-level vocabulary: texts are cut into words by `split`, else as GPT-2 does.

    Digits in `split` does not replace GPT-2's words: it cuts numbers first.
    """
    step = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space")), "trim_offsets": True}
    last = step | {"use_regex": all(part["type"] != "Split" for part in split)}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, last]} if split else last,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _words(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _pieces(scheme: str, *, strips: bool) -> dict[str, Any]:
    """Return the steps of SentencePiece's pieces; `scheme`: which texts between special tokens begin with a space."""
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": scheme, "split": False},
        "decoder": piece_decoder(strips=strips),
    }


def _adds_space(config: Fields) -> bool:
    """Return whether a class that puts a space in front by default does so."""
    said = config.get("add_prefix_space")
    return said is None or bool(said)


def _llama(config: Fields) -> dict[str, Any]:
    first = "always" if config.get("legacy", False) else "first"
    return _pieces(first if _adds_space(config) else "never", strips=_adds_space(config))


def _code_llama(config: Fields) -> dict[str, Any]:
    return _pieces("first" if _adds_space(config) else "never", strips=True)


def _gemma(config: Fields) -> dict[str, Any]:
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "decoder": piece_decoder(strips=False),
    }  # fmt: skip


def _named(bos: str | None, eos: str, unk: str, **others: str) -> dict[str, str]:
    """Return the names of special tokens by their roles."""
    return ({} if bos is None else {"bos_token": bos}) | {"eos_token": eos, "unk_token": unk} | others


END = "<|endoftext|>"
GPT2 = TokenizerClass(_byte_level, _named(END, END, END))
CLASSES: Mapping[str, TokenizerClass] = {
    "LlamaTokenizer": TokenizerClass(_llama, _named("<s>", "</s>", "<unk>"), pieces=True),
    "CodeLlamaTokenizer": TokenizerClass(
        _code_llama,
        _named(
            "<s>", "</s>", "<unk>",
            prefix_token=f"{SPACE_MARK}<PRE>", middle_token=f"{SPACE_MARK}<MID>", suffix_token=f"{SPACE_MARK}<SUF>",
            eot_token=f"{SPACE_MARK}<EOT>", fill_token="<FILL_ME>",
        ),
        pieces=True,
        has_unknown=True,
        begins="bos",
    ),
    "GemmaTokenizer": TokenizerClass(
        _gemma,
        _named("<bos>", "<eos>", "<unk>", pad_token="<pad>", mask_token="<mask>"),
        pieces=True,
        has_unknown=True,
    ),
    "GPT2Tokenizer": GPT2,
    "CodeGenTokenizer": GPT2,
    "GPTNeoXTokenizer": TokenizerClass(
        lambda config: _byte_level(config, normalizer=NFC),
        _named(END, END, END, pad_token="<|padding|>"),
        begins="nothing",
    ),
    "CohereTokenizer": TokenizerClass(
        lambda config: _byte_level(config, DIGITS, normalizer=NFC),
        _named(
            "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>",
            pad_token="<PAD>", cls_token="<CLS>", sep_token="<SEP>", mask_token="<MASK_TOKEN>",
        ),
        adds_again="unnamed",
    ),
    "Qwen2Tokenizer": TokenizerClass(
        lambda config: _byte_level(config, _words(QWEN2_WORDS), normalizer=NFC),
        _named(None, END, END, pad_token=END),
        adds_again="all",
    ),
    "Qwen3_5Tokenizer": TokenizerClass(
        lambda config: _byte_level(config, _words(QWEN3_5_WORDS), normalizer=NFC),
        _named(None, END, END, pad_token=END),
    ),
}  # fmt: skip

# Those that transformers knows too, for vocabularies that Llama models do not have: WordPiece, unigram, characters and
# the like. A name in neither list is read as if there were none, as transformers does.
REFUSED = frozenset(
    f"{name}Tokenizer"
    for name in """
    Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot
    BlenderbotSmall ByT5 CLIP CTRL Camembert Canine Clvp ConvBert Cpm CpmAnt DPRContextEncoder
    DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FNet FSMT FastSpeech2Conformer
    Flaubert Funnel GPTNeoXJapanese GPTSw3 Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert M2M100
    MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MistralCommon MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT
    PLBart Pegasus Perceiver Phobert Pop2Piano ProphetNet Rag Reformer RemBert RoCBert RoFormer Roberta
    SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5 Splinter SqueezeBert T5 Tapas Tipsv2 Udop VideoPrism Vits
    Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet
    """.split()
)
