"""What the campaign has found, as small as it gets; each was a traceback, a wrong answer, or gigabytes."""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fuzz import formats
from fuzz.campaign import place
from fuzz.formats import FORMATS, Files
from llamalet import Model
from llamalet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FormatError,
    LlamaletError,
    NonFiniteError,
    TokenizerError,
)

DEEP = 20_000


@functools.cache
def seeds(name: str) -> tuple[formats.Seed, ...]:
    return tuple(FORMATS[name].seeds())


def seed(form: str, name: str) -> formats.Seed:
    return next(found for found in seeds(form) if found.name == name)


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Return an edit that replaces what must be there."""

    def edit(data: bytes) -> bytes:
        assert old in data, old
        return data.replace(old, new, 1)

    return edit


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + new + data[at + len(new) :]


def fields(**changes: object) -> Callable[[bytes], bytes]:
    """Return an edit of a JSON object; a name with __ goes into the objects inside."""

    def edit(data: bytes) -> bytes:
        table = json.loads(data)
        for name, value in changes.items():
            *outer, last = name.split("__")
            holder = functools.reduce(lambda inner, key: inner[int(key) if key.isdigit() else key], outer, table)
            holder[last] = value
        return json.dumps(table).encode()

    return edit


def long_text(data: bytes) -> bytes:
    """Give the first text of an old PyTorch file a length of 2 GB."""
    at = data.index(b"X", 60)
    return data[: at + 1] + struct.pack("<I", 2**31 - 1) + data[at + 5 :]


def nested_arrays(data: bytes) -> bytes:
    """Make the first value of a GGUF file an array of arrays, thousands deep."""
    key = b"general.architecture"
    at = data.index(key) + len(key)
    return data[:at] + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * DEEP


def long_array(data: bytes) -> bytes:
    """Make the first value of a GGUF file an array of 2**40 bytes, over many of zeros."""
    key = b"general.architecture"
    at = data.index(key) + len(key)
    return data[:at] + struct.pack("<IIQ", 9, 0, 2**40) + bytes(20_000_000)


CORPUS = [
    ("bin-v0", "v0 None", put(28 + 16 * 100, np.float32(-np.inf).tobytes()), NonFiniteError, "NaN or infinite"),
    ("shards", "train", put(10, b"\xff\xff"), DataError, "token 65535 of .* is outside the vocabulary of 264"),
    ("shards", "meta.json", fields(vocab_size=2**31), DataError, "vocab_size=2147483648: must be in 1"),
    ("shards", "meta.json", fields(splits__train__shards=[5]), DataError, r"splits.train.shards\[0\]=5: must be"),
    ("llama2c-pt", "old", long_text, FormatError, "not a PyTorch file"),
    ("gguf", "f32", nested_arrays, FormatError, "not a GGUF file"),
    ("gguf", "f32", long_array, FormatError, "an array of more than"),
    ("hf", "config.json", fields(model_type="x" * 9000), FormatError, "model_type is 'xxx"),
    ("hf", "config.json", fields(tie_word_embeddings="false"), FormatError, "tie_word_embeddings.*'false': must be"),
    ("hf", "config.json", lambda data: b"[" * DEEP, FormatError, "not valid JSON"),
    ("hf", "index", fields(weight_map={"a": "x\0y"}), FormatError, "a is in .*must be a file beside it"),
    ("hf", "index", fields(weight_map={"a": "x" * 5000}), FormatError, "a is in .*must be a file beside it"),
    ("shards", "meta.json", fields(tokenizer="x" * 5000), DataError, "must be the name of a file"),
    ("shards", "meta.json", fields(splits__train__shards__0__file="x" * 5000), DataError, "shard not found"),
    ("checkpoint", "state.json", fields(tokenizer="x" * 5000), CheckpointError, "must be the name of a file"),
    ("records", "source.json", fields(files__train__0__file="x" * 5000), DataError, "must be inside the folder"),
    ("meta-pth", "params.json", fields(dim="2"), FormatError, "dim='2': must be a whole number"),
    ("meta-pth", "params.json", fields(use_scaled_rope=[]), FormatError, r"use_scaled_rope=\[\]: must be"),
    ("checkpoint", "state.json", fields(model_config__n_layers=2**31), CheckpointError, "must be at most 1024"),
    ("checkpoint", "state.json", fields(guard=[1]), CheckpointError, "guard has 1 numbers"),
    ("checkpoint", "state.json", fields(train_config__dim=[]), CheckpointError, r"dim=\[\]: must be a whole number"),
    ("checkpoint", "moments", replaced(b"norm.weight:exp_avg", b"form.weight:exp_avg"), CheckpointError, "no weight"),
    ("records", "source.json", fields(entropy={}), DataError, "entropy.nats is missing"),
    ("toml", "small", replaced(b'"90s"', b'"' + b"9" * 9000 + b'x"'), ConfigError, "save_every=999"),
    ("toml", "small", replaced(b"dim", b"m" * 9000), ConfigError, "unknown option mmm"),
    ("toml", "small", replaced(b"n_layers = 2", b"n_layers = 0x" + b"f" * 5000), ConfigError, "a number of 20000 bits"),
    ("toml", "small", replaced(b"dim = 32", b"dim = " + b"[" * DEEP), ConfigError, "nested more than"),
    ("toml", "small", replaced(b"= 4", b"= " + b"9" * 30), LlamaletError, "must be a whole number"),
    ("tokenizer-json", "bpe", lambda data: b'{"model":' + b"[" * DEEP, TokenizerError, "not valid JSON"),
]


@pytest.mark.parametrize(
    ("form", "name", "edit", "error", "words"), CORPUS, ids=[f"{form} {words[:24]}" for form, _, _, _, words in CORPUS]
)
def test_what_was_found_is_refused_in_one_line(tmp_path, form, name, edit, error, words):
    found = seed(form, name)
    files: Files = dict(found.files)
    files[found.target] = edit(files[found.target])
    if found.mend is not None:
        found.mend(files)
    place(tmp_path, files)
    with pytest.raises(error, match=words) as refusal:
        FORMATS[form].use(tmp_path)
    assert len(str(refusal.value)) < 2100


def test_a_panic_of_the_tokenizers_library_is_a_refusal(tmp_path, monkeypatch):
    import tokenizers

    from llamalet import tokenizer

    class PanicException(BaseException):  # as pyo3's
        pass

    class Panics:
        @staticmethod
        def from_str(text: str) -> None:
            raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
    (tmp_path / "t.json").write_bytes(seed("tokenizer-json", "bpe").files["t.json"])
    with pytest.raises(TokenizerError, match="t.json: not a usable tokenizer.json: called `Option::unwrap"):
        tokenizer.load(tmp_path / "t.json")


def test_a_byte_order_mark_in_front_of_a_tokenizer_json_is_no_reason_to_refuse_it(tmp_path):
    from llamalet import tokenizer

    data = seed("tokenizer-json", "bpe").files["t.json"]
    assert tokenizer.parse(b"\xef\xbb\xbf" + data, "t").sha256 == tokenizer.parse(data, "t").sha256


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_steps_that_double_a_text_without_end_are_refused(tmp_path, part):
    from llamalet import tokenizer

    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    kind = {"pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
    edit = fields(**{part: {"type": "Sequence", kind: [step] * 300}})
    with pytest.raises(TokenizerError, match=f"its {part} has more steps than any tokenizer needs"):
        tokenizer.parse(edit(seed("tokenizer-json", "gpt2").files["t.json"]), "t")


@pytest.mark.parametrize("ids", [["<s>"], [{}], [True, 10**9], [-1]])
def test_a_prefix_that_is_no_id_is_refused(tmp_path, ids):
    from llamalet import tokenizer

    (tmp_path / "tokenizer.json").write_bytes(
        fields(post_processor__special_tokens={"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}})(
            seed("tokenizer-json", "bpe").files["t.json"]
        )
    )
    with pytest.raises(TokenizerError):
        tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [[], None, {}])
def test_an_added_token_without_a_name_is_refused(tmp_path, content):
    from llamalet import tokenizer

    files = dict(seed("hf", "tokenizer.json").files)
    files["tokenizer.json"] = fields(added_tokens__0__content=content)(files["tokenizer.json"])
    place(tmp_path, files)
    with pytest.raises(TokenizerError, match="added_tokens is not a list of tokens"):
        tokenizer.load(tmp_path / "tokenizer.json")
    assert Model.load(tmp_path, backend="numpy").logits([1]).shape[0] == 1


def test_a_byte_order_mark_in_front_of_a_tokenizer_config_json_is_read_over(tmp_path):
    from llamalet.chat_template import read_template

    (tmp_path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"chat_template": "{{ 1 }}"}')
    assert read_template(tmp_path / "tokenizer_config.json") == "{{ 1 }}"


def test_scores_of_minus_infinity_are_no_numbers(tmp_path):
    files = dict(seed("bin-v0", "v0 None").files)
    files["m.bin"] = put(28 + 16 * 100, np.float32(-np.inf).tobytes())(files["m.bin"])
    place(tmp_path, files)
    model = Model.load(Path(tmp_path) / "m.bin", backend="numpy")
    assert not np.isfinite(model.logits([1])).all()
    with pytest.raises(NonFiniteError):
        model.score("a an")
