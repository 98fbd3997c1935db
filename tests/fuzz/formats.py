"""The formats that are read: small files of each to start from, how to mend their checksums, and how to use a mutant.

A mutant is used as a person would: loaded, and if it loads, made to compute. Whatever `use` raises that is not a
LlamaletError is a fault.
"""

import hashlib
import io
import json
import re
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from toy import MERGES, random_tensors

from configurator import parse
from corpus.record import Record
from fuzz import mutants
from fuzz.mutants import Mutator
from llamalet import Model, chat_template, model_file, scoring, shards, tokenizer
from llamalet.config import Llama3Scaling, ModelConfig
from llamalet.convert import gguf_file, huggingface, safetensors_file, tokenizer_json
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import TokenizerError
from llamalet.files import sha256_of
from llamalet.hf_names import MODEL_INDEX_JSON, MODEL_SAFETENSORS
from llamalet.model_file import checkpoint as layout
from llamalet.model_file import header
from llamalet.tokenizer import BOS_ID, BinTokenizer, Llama3Tokenizer, StreamDecoder, pack
from training.batches import Windows
from training.config import TrainConfig, with_defaults
from training.run import checkpoint, metrics
from training.run.run_state import RunState

Files = dict[str, bytes]

VOCAB = 264
TEXTS = ("", " ", "an and the <s>", "a\tb\n\n\u00e9\u4e2d\U0001f600", "</s>\0x 12 <|eot_id|> <0x41>")


@dataclass(frozen=True)
class Seed:
    """A folder of valid files, of which one is changed.

    mend recomputes the checksums behind a change, in place; more than half of the mutants get it. cut: whether the file
    is truncated at every length, or only at some, because another seed begins with the same bytes.
    """

    name: str
    files: Mapping[str, bytes]
    target: str
    mutate: Mutator = mutants.binary
    mend: Callable[[Files], None] | None = None
    cut: bool = True


@dataclass(frozen=True)
class Format:
    """A format to attack.

    behind: functions, as module:name, that are called only once the header, or what stands for it, has been accepted.
    """

    seeds: Callable[[], list[Seed]]
    use: Callable[[Path], None]
    behind: tuple[str, ...]
    cases: int = 20_000
    may_load: bool = True


# ---- what is done with a mutant ----


def use_model(path: Path, verify: bool | None = None) -> None:
    """Load a model, then make it compute logits, losses if they are not finite, and two tokens."""
    model = Model.load(path, backend="numpy", verify=verify)
    try:
        ids = model.tokenizer.encode("a an", bos=True)[: model.config.max_seq_len]
    except TokenizerError:  # without a tokenizer there are still logits
        ids = [id for id in (0, 1, 2) if id < model.config.vocab_size][: model.config.max_seq_len]
        assert model.logits(ids).shape == (len(ids), model.config.vocab_size)
        return
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.vocab_size) and logits.dtype == np.float32
    if not np.isfinite(logits).all():
        scoring.losses(model.transformer, logits, np.array(ids))
        raise AssertionError("logits that are not finite gave a loss")
    text = "".join(model.generate("a", max_new_tokens=2, seed=1, overflow="roll", keep=0))
    text.encode()


def use_tokenizer(path: Path) -> None:
    """Load a tokenizer, and encode and decode texts, whole and token by token."""
    found = tokenizer.load(path)
    for text in TEXTS:
        ids = found.encode(text, bos=True, special=True) + found.encode(text)
        assert all(0 <= id < found.vocab_size for id in ids), "an id outside of the vocabulary"
        decoder = StreamDecoder(found)
        streamed = "".join([*map(decoder.push, ids), decoder.finish()])
        assert streamed == found.decode(ids), "streaming gives another text"
    assert found.special and found.stop_ids and len(found.sha256) == 64


def use_shards(folder: Path) -> None:
    """Open prepared data and make batches of both splits."""
    data = shards.Shards.open(folder, verify=True)
    found = tokenizer.load(data.tokenizer_path, data.vocab_size)
    for name in shards.SPLITS:
        windows = Windows(data.split(name), 4, data.document_starts(name))
        for batch in (windows.training_batch(1, 0, 3), *windows.evaluation_batches(2, 2)):
            assert batch[0].min() >= 0 and batch[0].max() < data.vocab_size, "an id outside of the vocabulary"
        found.decode(batch[0][0].tolist())


def use_checkpoint(folder: Path) -> None:
    """Read a checkpoint as training does, and compute with it."""
    loaded = checkpoint.load(folder)
    with_defaults(loaded.state.train_config | {"data": loaded.state.data})()
    use_model(folder, verify=True)


MESSAGES = [
    chat_template.Message("system", "be <s> kind"),
    chat_template.Message("user", "an and </s> <|im_start|>"),
    chat_template.Message("assistant", "the"),
    chat_template.Message("user", "a\n\u00e9"),
]


def use_template(folder: Path) -> None:
    """Fill in a chat template."""
    found = toy_bpe()
    path = next(folder.glob("*"))
    ids = chat_template.find_template(folder / "model.bin", found, named=path)(MESSAGES)
    assert all(0 <= id < found.vocab_size for id in ids)


def use_toml(path: Path) -> None:
    """Read a config and derive from it what a run does."""
    config = parse(TrainConfig, [str(path)], program="train.py", description="", toml=True)
    config.model_config(VOCAB)
    for step in (0, 1, 1000):
        config.rate(step)
    config.accumulation(1)


def use_records(folder: Path) -> None:
    """Read the one record in a folder."""
    name = next(folder.glob("*")).name
    if name == "state.json":
        with_defaults(RunState.read(folder).train_config)()
    elif name == "source.json":
        record = Record.read(folder)
        assert record is not None and record.files["train"]
    else:
        rows = metrics.read(folder / name)
        metrics.Metrics(folder, resumed_at=(2, True)).log({"step": 3, "loss": 1.0})
        assert all(isinstance(row["step"], int) for row in rows)


# ---- .bin ----


def tiny(
    dim: int = 4, *, n_heads: int = 2, n_kv_heads: int | None = 1, vocab_size: int = VOCAB, **rest: Any
) -> ModelConfig:
    values = {"n_layers": 1, "hidden_dim": dim, "max_seq_len": 8} | rest
    return ModelConfig.create(dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads, vocab_size=vocab_size, **values)


def toy_bpe(vocab_size: int = VOCAB) -> BinTokenizer:
    controls = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    byte_rows = [(b"<0x%02X>" % byte, 0.0) for byte in range(256)]
    texts = [" ", "a", "n", " a", "an", "d", "e", "t", *("d" * (i + 2) for i in range(vocab_size))][: vocab_size - 259]
    return BinTokenizer(controls + byte_rows + [(text.encode(), -float(i)) for i, text in enumerate(texts)], "toy")


def toy_ranks() -> Llama3Tokenizer:
    """Return a rank table of bytes, six merges and three special tokens."""
    texts = [chr(255 - i) for i in range(256)] + ["".join(pair) for pair in MERGES[:6]]
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    rows = [text.encode("latin-1") for text in texts] + [name.encode() for name in names]
    return Llama3Tokenizer([(row, float(id)) for id, row in enumerate(rows)], "toy", suffix="bin")


def mend_bin(files: Files) -> None:
    """Recompute the checksums of a model file, version 1 to 3, at the places where valid files have them."""
    data = bytearray(files["m.bin"])
    if len(data) < header.HEADER_BYTES:
        return
    version = data[4]
    fixed = header.PREFIX.size + header.EXTRAS.size
    end, section_end = len(data), None
    if version == 3:
        at = fixed + header.V3_FIELDS.size + header.CHECKSUM.size
        offset, n_bytes, _, kind = header.TOKENIZER.unpack_from(data, at)
        if kind:
            section_end = at + header.TOKENIZER.size
            struct.pack_into("<I", data, at + 12, zlib.crc32(data[offset : offset + n_bytes]))
            end = max(header.HEADER_BYTES, len(data) - n_bytes)
        fixed += header.V3_FIELDS.size
    payload = memoryview(data)[header.HEADER_BYTES : end]
    struct.pack_into("<I", data, header.PREFIX.size + header.EXTRAS.size - 4, zlib.crc32(payload))
    payload.release()
    struct.pack_into("<I", data, fixed, zlib.crc32(data[:fixed]))
    if section_end is not None:
        struct.pack_into("<I", data, section_end, zlib.crc32(data[:section_end]))
    files["m.bin"] = bytes(data)


def bin_file(version: int, dtype: str | None, config: ModelConfig, inside: bool = False, **changes: Any) -> Files:
    """Return a model file and the tokenizer beside it."""
    vocabulary = toy_bpe(config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.bin"
        model_file.write(
            path, version, config, random_tensors(config), dtype=dtype,
            tokenizer_sha256=None if version == 0 else vocabulary.sha256,
            tokenizer=("bin", pack(vocabulary.pieces())) if inside else None, **changes,
        )  # fmt: skip
        files = {"m.bin": path.read_bytes()}
    if not inside:
        files["m.tokenizer.bin"] = pack(vocabulary.pieces())
    return files


SCALED = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)


def bin_seeds(versions: tuple[int, ...]) -> list[Seed]:
    shapes = [
        (0, None, tiny(), False), (0, None, tiny(2, n_heads=1, tied=False), False),
        (1, None, tiny(), False), (1, None, tiny(rope_scaling=SCALED), False),
        (2, None, tiny(16, n_kv_heads=2), False), (2, None, tiny(16, tied=False), False),
        (3, "f32", tiny(), True), (3, "bf16", tiny(tied=False), False), (3, "q8", tiny(head_dim=4), True),
        (3, "q4", tiny(32, n_heads=4), False), (3, "q8", tiny(32, n_heads=4, rope_scaling=SCALED), False),
    ]  # fmt: skip
    found = []
    for version, dtype, config, inside in shapes:
        if version in versions:
            files = bin_file(version, dtype, config, inside)
            mend = mend_bin if version else None
            mutate = mutants.either(mutants.within(0, 176), mutants.binary, mutants.binary)
            found.append(Seed(f"v{version} {dtype}", files, "m.bin", mutate, mend))
    llama2c = bytearray(found[0].files["m.bin"])
    if 1 in versions:  # as llama2.c writes it: nothing after the group size
        llama2c[header.PREFIX.size : header.HEADER_BYTES] = bytes(header.HEADER_BYTES - header.PREFIX.size)
        found.append(Seed("v1 of llama2.c", {**found[0].files, "m.bin": bytes(llama2c)}, "m.bin"))
    return found


def flipped_seeds() -> list[Seed]:
    """Return version 3 in four dtypes, of which one bit is flipped and nothing is mended."""

    def flip(data: bytes, rng: Any) -> bytes:
        changed = bytearray(data)
        mutants.flip_bit(changed, rng)
        return bytes(changed)

    return [Seed(seed.name, seed.files, seed.target, flip) for seed in bin_seeds((3,))]


# ---- tokenizers ----


def sentencepiece(**options: Any) -> bytes:
    import sentencepiece as library

    model = io.BytesIO()
    lines = ["the an band and a the and banana the bandana 12 12 tan", "an and the ant then a band the an", "a an the"]
    values = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 275,
        "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    library.SentencePieceTrainer.train(sentence_iterator=iter(lines * 3), model_writer=model, **(values | options))
    return model.getvalue()


def model_seeds() -> list[Seed]:
    kinds = {
        "bpe": {},
        "unigram": {"model_type": "unigram"},
        "no bytes": {"byte_fallback": False, "vocab_size": 40},
        "symbols": {
            "user_defined_symbols": ["<|im_start|>", "<|im_end|>"],
            "control_symbols": ["<ctl>"],
            "vocab_size": 280,
        },
        "word": {"model_type": "word", "byte_fallback": False, "vocab_size": 20},
        "char": {"model_type": "char", "byte_fallback": False, "vocab_size": 20},
    }
    mutate = mutants.either(mutants.gentle, mutants.binary)
    return [Seed(name, {"t.model": sentencepiece(**options)}, "t.model", mutate) for name, options in kinds.items()]


def bytes_alphabet(count: int) -> list[str]:
    from llamalet.tokenizer.byte_alphabet import byte_level_bytes

    return list(byte_level_bytes())[:count]


def added(id: int, content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    values = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **(values | flags), "special": special}


def tokenizer_json_seeds() -> list[Seed]:
    from llamalet.tokenizer.llama3 import WORDS as LLAMA3_WORDS

    ranks = json.loads(tokenizer_json.build(toy_ranks(), b""))
    spm = json.loads(tokenizer_json.build(toy_bpe(), b""))
    letters = [" ", "a", "n", "d", "t", "h", "e", "\u2581"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(0x20, 0x2F)]
    names = ["<unk>", "<s>", "</s>", *byte_pieces, *letters, "an", "\u2581an"]
    vocab = {name: id for id, name in enumerate(names)}
    specials = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(len(vocab), "<|im_start|>", lstrip=True)]
    specials.append(added(len(vocab) + 1, "cat", special=False, single_word=True, normalized=True))
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    small = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": specials, "normalizer": None,
        "pre_tokenizer": metaspace, "post_processor": template,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": [["a", "n"], ["\u2581", "an"]],
        },
    }  # fmt: skip
    unigram = small | {
        "decoder": metaspace,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[name, -float(i)] for i, name in enumerate(names)]},
    }
    alphabet = bytes_alphabet(95)
    digits = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    gpt2 = small | {
        "added_tokens": [added(96, "<|endoftext|>"), added(97, "<|im_end|>", rstrip=True)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "ignore_merges": False, "merges": ["a n"],
            "vocab": {name: id for id, name in enumerate([*alphabet, "an"])},
        },
    }  # fmt: skip
    kinds = {"llama3": ranks, "llama2": spm, "bpe": small, "unigram": unigram, "gpt2": gpt2}
    return [
        Seed(name, {"t.json": json.dumps(fields, separators=(",", ":")).encode()}, "t.json", mutants.json_text)
        for name, fields in kinds.items()
    ]


def tiktoken_file() -> bytes:
    import base64

    rows = [piece for piece, _ in toy_ranks().pieces()][:262]
    return b"".join(base64.b64encode(row) + b" %d\n" % id for id, row in enumerate(rows))


def mend_rows(files: Files) -> None:
    """Set the length of the longest entry."""
    data = files["t.bin"]
    at = longest = 4
    longest = 0
    while at + 8 <= len(data):
        length = struct.unpack_from("<I", data, at + 4)[0]
        longest, at = max(longest, length), at + 8 + length
    files["t.bin"] = struct.pack("<I", longest % 2**32) + data[4:]


def rows_seeds() -> list[Seed]:
    return [Seed("llama2.c", {"t.bin": pack(toy_bpe().pieces())}, "t.bin", mend=mend_rows)]


def ranks_seeds() -> list[Seed]:
    lines = mutants.either(
        mutants.gentle,
        mutants.binary,
        mutants.text_of(("\n", " ", "=", "AAAA 3\n", "-1", "2147483648", "9" * 5000, "\u0660")),
    )
    return [
        Seed("rank table", {"t.bin": pack(toy_ranks().pieces())}, "t.bin", mend=mend_rows),
        Seed("tiktoken", {"t.tiktoken": tiktoken_file()}, "t.tiktoken", lines),
    ]


# ---- other formats of models ----


def imported(config: ModelConfig, vocabulary: Any, **more: Any) -> ImportedModel:
    return ImportedModel(
        name="toy", config=config, tensors=random_tensors(config), tokenizer=vocabulary,
        tokenizer_data=pack(vocabulary.pieces()), **more,
    )  # fmt: skip


def gguf_seeds() -> list[Seed]:
    found = []
    llama3 = toy_ranks()
    for name, config, vocabulary, dtype in (
        ("f32", tiny(), toy_bpe(), "f32"),
        ("f16", tiny(n_kv_heads=2, tied=False), toy_bpe(), "f16"),
        ("q8_0", tiny(32, n_heads=4), toy_bpe(), "q8_0"),
        ("q4_0", tiny(32, n_heads=4), toy_bpe(), "q4_0"),
        ("llama3", tiny(vocab_size=llama3.vocab_size, rope_scaling=SCALING_OF_META), llama3, "f32"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            gguf_file.write(path, imported(config, vocabulary, chat_template="{{ bos_token }}"), dtype)
            data = path.read_bytes()
        values = data.index(b"general.architecture")
        mutate = mutants.either(
            mutants.within(0, values + 900), mutants.within(max(0, len(data) - 6000), None), mutants.binary
        )
        found.append(Seed(name, {"m.gguf": data}, "m.gguf", mutate, cut=name in ("f32", "llama3")))
    return [*found, *other_gguf_types()]


SCALING_OF_META = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def other_gguf_types() -> list[Seed]:
    """Return files without a tokenizer, with matrices of types that only llama.cpp writes, in random blocks."""
    import gguf

    found = []
    config = tiny(256, n_heads=4, hidden_dim=256, vocab_size=VOCAB)
    rng = np.random.default_rng(5)
    for kind in (gguf.GGMLQuantizationType.Q2_K, gguf.GGMLQuantizationType.IQ4_NL):
        writer = gguf.GGUFWriter(None, "llama")
        gguf_file.add_shape(writer, config)
        names = gguf_file.imported_model.expand(gguf_file.NAMES, 1)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        for name, tensor in random_tensors(config).items():
            if tensor.ndim == 2:
                row_bytes = tensor.shape[1] // block * block_bytes
                row = rng.integers(0, 40, row_bytes, dtype=np.uint8)
                writer.add_tensor(names[name], np.tile(row, (tensor.shape[0], 1)), raw_dtype=kind)
            else:
                writer.add_tensor(names[name], tensor)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            data = path.read_bytes()
        found.append(Seed(kind.name, {"m.gguf": data}, "m.gguf", mutants.within(0, 1500), cut=False))
    return found


def folder_of(build: Callable[[Path], object]) -> Files:
    """Return the files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        build(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def safetensors_header(data: bytes, rng: Any) -> bytes:
    """Change the header of a safetensors file as a JSON document, with its length set right."""
    length = int.from_bytes(data[:8], "little")
    changed = mutants.json_text(data[8 : 8 + length], rng)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


weights = mutants.either(safetensors_header, mutants.binary)


def hf_seeds() -> list[Seed]:
    def compact(files: Files) -> Files:
        return {
            name: json.dumps(json.loads(data), separators=(",", ":")).encode() if name.endswith(".json") else data
            for name, data in files.items()
        }

    vocabulary = sentencepiece()
    rows = tokenizer.parse(vocabulary, "x").vocab_size
    config = tiny(rope_scaling=SCALING_OF_META, vocab_size=rows)
    plain = compact(folder_of(lambda folder: huggingface.write(folder, imported(config, toy_bpe(rows)))))
    plain.pop("tokenizer.json")
    plain["tokenizer.model"] = vocabulary
    llama3 = toy_ranks()
    untied = tiny(vocab_size=llama3.vocab_size, tied=False)
    other = compact(
        folder_of(lambda folder: huggingface.write(folder, imported(untied, llama3, chat_template="{{ bos_token }}")))
    )
    split = dict(plain)
    whole = split.pop(MODEL_SAFETENSORS)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x"
        path.write_bytes(whole)
        arrays = safetensors_file.read_arrays(path)
    table = {}
    for number, keys in enumerate((sorted(arrays)[:4], sorted(arrays)[4:])):
        shape = {key: ("F32", arrays[key].shape) for key in keys}
        split[f"m{number}.safetensors"] = b"".join(safetensors_file.encode(shape, lambda key: [arrays[key]]))
        table |= dict.fromkeys(keys, f"m{number}.safetensors")
    split[MODEL_INDEX_JSON] = json.dumps({"metadata": {"total_size": 1}, "weight_map": table}).encode()
    json_text = mutants.json_text
    return [
        Seed("config.json", plain, "config.json", json_text),
        Seed("config.json, untied", other, "config.json", json_text),
        Seed("safetensors", plain, MODEL_SAFETENSORS, weights),
        Seed("safetensors, untied", other, MODEL_SAFETENSORS, weights),
        Seed("index", split, MODEL_INDEX_JSON, json_text),
        Seed("one of two", split, "m1.safetensors", weights),
        Seed("generation_config.json", plain, "generation_config.json", json_text),
        Seed("tokenizer_config.json", other, "tokenizer_config.json", json_text),
        Seed("tokenizer.json", other, "tokenizer.json", json_text),
    ]


def torch_bytes(value: Any, **options: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, buffer, **options)
    return buffer.getvalue()


def pickle_inside(data: bytes, rng: Any) -> bytes:
    """Change the pickle inside a file of torch.save's, and make the zip file anew, checksums included."""
    if not data.startswith(b"PK"):
        return mutants.within(0, 1500)(data, rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("/data.pkl") or rng.random() < 0.02:
                content = mutants.binary(content, rng)
            if rng.random() < 0.99:
                new.writestr(entry.filename, content)
    return packed.getvalue()


pytorch = mutants.either(pickle_inside, pickle_inside, mutants.binary)


def state_dict(config: ModelConfig, prefix: str = "") -> dict[str, Any]:
    import torch

    return {f"{prefix}{name}.weight": torch.tensor(array) for name, array in random_tensors(config).items()}


def llama2c_seeds() -> list[Seed]:
    vocabulary = {"tokenizer.model": sentencepiece()}
    rows = tokenizer.parse(vocabulary["tokenizer.model"], "x").vocab_size
    config = tiny(2, n_heads=1, n_kv_heads=1, vocab_size=rows)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    arguments = {name: getattr(config, name) for name in names} | {"multiple_of": 32, "dropout": 0.0}
    whole = {"model": state_dict(config, "_orig_mod."), "model_args": arguments, "iter_num": 3}
    old = {"model": state_dict(config), "model_args": arguments}
    return [
        Seed("zip", {"ckpt.pt": torch_bytes(whole), **vocabulary}, "ckpt.pt", pytorch),
        Seed(
            "old", {"ckpt.pt": torch_bytes(old, _use_new_zipfile_serialization=False), **vocabulary}, "ckpt.pt", pytorch
        ),
    ]


def meta_seeds() -> list[Seed]:
    llama3 = toy_ranks()
    config = tiny(2, n_heads=1, n_kv_heads=1, vocab_size=llama3.vocab_size - 3 + 256)
    params = {"dim": 2, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"multiple_of": 32, "rope_theta": 500000.0, "use_scaled_rope": True}
    state = state_dict(config)
    state["output.weight"] = state["tok_embeddings.weight"]
    files = {
        "consolidated.00.pth": torch_bytes(state),
        "params.json": json.dumps(params).encode(),
        "tokenizer.model": tiktoken_file(),
    }
    halves = [{}, {}]
    axes = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1, "tok_embeddings": 0, "output": 0}
    for name, tensor in state.items():
        axis = axes.get(name.removesuffix(".weight").rpartition(".")[2])
        for number, half in enumerate(halves):
            half[name] = tensor if axis is None else tensor.chunk(2, axis)[number].clone()
    two = {
        **files,
        "consolidated.00.pth": torch_bytes(halves[0]),
        "consolidated.01.pth": torch_bytes(halves[1]),
    }
    return [
        Seed("pth", files, "consolidated.00.pth", pytorch),
        Seed("second of two", two, "consolidated.01.pth", pytorch),
        Seed("params.json", files, "params.json", mutants.json_text),
    ]


# ---- our own folders ----


def mend_meta(files: Files) -> None:
    """Set the digests of the shards, and their lengths if they are whole tokens, in meta.json."""
    try:
        table = json.loads(files["meta.json"])
        for split in table["splits"].values():
            for shard in split["shards"]:
                if (data := files.get(shard["file"])) is not None:
                    shard["sha256"] = hashlib.sha256(data).hexdigest()
                    shard["tokens"] = len(data) // 2
            for key in ("tokens", "documents", "text_bytes"):
                split[key] = sum(shard[key] for shard in split["shards"])
        files["meta.json"] = json.dumps(table).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass


def shards_seeds() -> list[Seed]:
    def build(folder: Path) -> None:
        rng = np.random.default_rng(3)
        folder.mkdir()
        splits = {}
        for name in shards.SPLITS:
            ids = rng.integers(259, VOCAB, 60)
            ids[::12] = BOS_ID
            block = shards.TokenBlock(ids=ids, documents=5, text_bytes=200)
            splits[name] = shards.Split((shards.write_shard(folder / f"{name}_00000.bin", [block], VOCAB),))
        vocabulary = toy_bpe()
        (folder / "tokenizer.bin").write_bytes(pack(vocabulary.pieces()))
        entropy = shards.Entropy(stories=5, nats_per_token=1.5, bits_per_byte=0.5, bits_per_story=40.0)
        meta = shards.Meta(
            source="toy", recipe={"document": "line"}, bos_id=1, eos_id=2, vocab_size=VOCAB, tokenizer="tokenizer.bin",
            tokenizer_sha256=vocabulary.sha256, splits=splits, entropy=entropy,
        )  # fmt: skip
        shards.write_meta(folder / "meta.json", meta)

    files = folder_of(build)
    return [
        Seed("meta.json", files, "meta.json", mutants.json_text, mend_meta),
        Seed("train", files, "train_00000.bin", mutants.binary, mend_meta),
        Seed("val", files, "val_00000.bin", mutants.binary, mend_meta),
        Seed("tokenizer", files, "tokenizer.bin"),
    ]


def mend_manifest(files: Files) -> None:
    """Set the sizes, digests and the step of manifest.json."""
    table = json.loads(MANIFEST[0])
    for name, entry in table["files"].items():
        entry.update(bytes=len(files[name]), sha256=hashlib.sha256(files[name]).hexdigest())
    if step := re.search(rb'"step": ?(\d{1,9})\b', files[layout.STATE]):
        table["step"] = int(step[1])
    files[layout.MANIFEST] = json.dumps(table).encode()


MANIFEST: list[bytes] = []


def checkpoint_files() -> Files:
    import dataclasses

    config = tiny()
    weights = {f"{name}.weight": array for name, array in random_tensors(config).items()}
    moments = {"norm.weight:exp_avg": np.ones(config.dim, np.float32), "norm.weight:step": np.array(2, np.float32)}
    vocabulary = toy_bpe()
    state = RunState(
        step=2, val_loss=1.5, guard=[1.0, 2.0, 0.0, 0.0], tokenizer_sha256=vocabulary.sha256, data="data/toy",
        train_config=dataclasses.asdict(TrainConfig(data="data/toy")), machine={"threads": 1}, launch=None,
        model_config=config, tokenizer="tokenizer.bin",
    )  # fmt: skip

    def build(folder: Path) -> None:
        saved = checkpoint.save(
            folder.parent, state, model_state=weights, optimizer_state=moments, tokenizer_data=pack(vocabulary.pieces())
        )
        saved.rename(folder)

    return folder_of(build)


def checkpoint_seeds() -> list[Seed]:
    files = checkpoint_files()
    MANIFEST[:] = [files[layout.MANIFEST]]
    return [
        Seed("state.json", files, layout.STATE, mutants.json_text, mend_manifest),
        Seed("weights", files, MODEL_SAFETENSORS, weights, mend_manifest),
        Seed("moments", files, layout.OPTIMIZER, weights, mend_manifest),
        Seed("tokenizer", files, "tokenizer.bin", mutants.binary, mend_manifest),
        Seed("manifest.json", files, layout.MANIFEST, mutants.json_text),
    ]


def record_seeds() -> list[Seed]:
    import dataclasses

    state = {layout.STATE: checkpoint_files()[layout.STATE]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.txt").write_text("an and the")
        entries = {"train": (("a.txt", 10, sha256_of(folder / "a.txt")),), "val": ()}
    fields = {
        "format": "llamalet source", "version": 1, "source": "x", "revision": None,
        "entropy": {"stories": 1, "nats": 2.5},
        "files": {
            split: [{"file": file, "bytes": size, "sha256": digest} for file, size, digest in listed]
            for split, listed in entries.items()
        },
    }  # fmt: skip
    rows = [{"step": step, "loss": 5.0 / (1 + step), "elapsed_s": 0.1 * step, "val_loss": 2.5} for step in range(4)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    settings = dataclasses.asdict(TrainConfig(data="x"))
    one_line = mutants.within(0, lines.index(b"\n"), mutants.json_text)
    return [
        Seed("state.json", state, layout.STATE, mutants.json_text),
        Seed("train_config", state, layout.STATE, changed_settings(settings)),
        Seed("source.json", {"source.json": json.dumps(fields).encode()}, "source.json", mutants.json_text),
        Seed("metrics.jsonl", {"metrics.jsonl": lines}, "metrics.jsonl", mutants.either(mutants.binary, one_line)),
    ]


def changed_settings(settings: dict[str, Any]) -> Mutator:
    """Return a mutator of state.json that changes the run's settings alone."""

    def mutate(data: bytes, rng: Any) -> bytes:
        changed = mutants.json_value(json.dumps(settings).encode(), rng).decode("utf-8", "surrogatepass")
        state = json.dumps({**json.loads(data), "train_config": "HERE"})
        return state.replace('"HERE"', changed).encode("utf-8", "surrogatepass")

    return mutate


# ---- texts that are programs or settings ----

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama2": (
        "{%- set ns = namespace(s='', n=0) %}{%- for m in messages %}{%- if m.role == 'system' %}"
        "{%- set ns.s = m.content %}{%- elif m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.s + m['content'].strip() + ' [/INST]' }}"
        "{%- else %}{{ ' ' ~ m['content'] | trim ~ ' ' ~ eos_token }}{%- endif %}{%- endfor %}"
    ),
    "think": (
        "{%- macro say(m, n=1) -%}{{ m.role }}: {{ m.content.split('</think>')[-1] | replace('<', '(') }}"
        "{%- endmacro %}{% for m in messages if m.role != 'system' %}{{ say(m) }}\n"
        "{% if loop.last %}{{ loop.index }}{% endif %}"
        "{% else %}{{ raise_exception('nothing') }}{% endfor %}{{ messages | length }}{{ tools | tojson }}"
    ),
}
JINJA = (
    "{% for a in range(99999) %}", "{% endfor %}", "{{ 10**5000 }}", "{% break %}", "{% continue %}",
    "{{ f(a=1,a=2) }}", "{% if %}", "{% endif %}", "{% else %}", "{{", "}}", "{%", "%}", "{#", "#}",
    "{% macro r() %}{{ r() }}{% endmacro %}", "{{ r() }}", "{{ '%1500000000d'|format(1) }}", "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**9 }}", "{{ range(10**12)|list }}", "{{ ''.__class__ }}", "{{ messages[99] }}", "{{ x.y.z }}",
    "{{ messages|map(attribute='content')|join }}", "|tojson", "{{ strftime_now('%Y') }}",
    "{{ raise_exception('no') }}", "{% set x = 1 %}", "{% generation %}", "{% endgeneration %}", "{% include 'x' %}",
    "{% import 'x' as y %}", "{% extends 'x' %}", "{% block b %}{% endblock %}", "{% raw %}", "{{ self }}",
    "{{ 1 / 0 }}", "{{ -1 }}", "'", '"', "(", ")", "[", "]", "|", "~", ".", ",", "none", "true", "loop",
    "loop.previtem", "namespace", "{{ lipsum(9999) }}", "{{ cycler(1).next() }}", "{{ joiner() }}", "{{ dict(a=1) }}",
    "|batch(0)", "|slice(0)", "|indent(10**9)", "|center(10**9)", "|sort", "|groupby('role')", "|random", "|pprint",
    "|int", "|round(-5)", "|truncate(-1)", "|wordwrap(0)", "|urlize", "|xmlattr", "|reverse", "|sum",
    "|attr('__init__')", "{{ messages.append(1) }}", "{{ m.update(a=1) }}", "<s>", "</s>", "<unk>", "\ud800", "\0",
    "\u2581", "{{ 1.0e400 }}", "{{ 0x" + "f" * 5000 + " }}", "{% filter upper %}", "{% endfilter %}",
    "{% call say(1) %}", "{% endcall %}", "{% with a=1 %}", "{% endwith %}", "{% autoescape true %}",
    "{{ ((((((((((((((((((((1)))))))))))))))))))) }}", "{% if a %}" * 30, "{% for a in b %}" * 25, "(" * 300,
    "[" * 2000, "{% if true %}" * 150 + "{% endif %}" * 150,
)  # fmt: skip


def template_seeds() -> list[Seed]:
    text = mutants.text_of(JINJA)
    found = [Seed(name, {"t.jinja": source.encode()}, "t.jinja", text) for name, source in TEMPLATES.items()]
    fields = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATES["llama2"]}
    several = fields | {"chat_template": [{"name": "default", "template": "{{ eos_token }}"}]}
    for name, table in (("one", fields), ("several", several)):
        data = json.dumps(table).encode()
        found.append(Seed(name, {"tokenizer_config.json": data}, "tokenizer_config.json", mutants.json_text))
    return found


TOML = (
    "[a]\n", "[[a]]\n", "x = 1\n", "dim = 5\n", "= ", "[", "]", "{", "}", '"', "'", '"""', "inf", "nan", "-1", "0",
    "true", "9" * 5000, "0x" + "f" * 5000, "1e999", "2**31", "2147483648", "9223372036854775808",
    "1979-05-27T07:32:00Z", "[1, 2]", "{a = 1}", "\ufeff", "\ud800", "\0", "\x7f", "1_000", "0b11", "0o17", ".5", "5.",
    '"\\u0000"', "a.b.c = 1\n", "[" * mutants.DEEP, "{a=" * 500, "a." * 2000 + "b = 1\n",
    "#", "\r", "\n", "1024", "16.0",
)  # fmt: skip


def toml_seeds() -> list[Seed]:
    root = Path(__file__).parents[2] / "configs"
    texts = {path.stem: path.read_bytes() for path in sorted(root.glob("*.toml"))}
    lines = []
    for field in (
        "dim = 32",
        "n_layers = 2",
        "n_heads = 4",
        "tied = false",
        'save_every = "90s"',
        "learning_rate = 1e-3",
    ):
        lines.append(field)
    texts["small"] = "\n".join(
        [*lines, 'optimizer = "adamw"', 'schedule = "wsd"', "total_batch_tokens = 8192", ""]
    ).encode()
    return [Seed(name, {"c.toml": data}, "c.toml", mutants.text_of(TOML)) for name, data in texts.items()]


# ---- all ----

MODEL_FILE = ("llamalet.model_file.tensors:tensor_specs",)
SENTENCEPIECE = "sentencepiece:SentencePieceProcessor.get_piece_size"
RANKS = ("llamalet.tokenizer.llama3:is_rank_table", "llamalet.tokenizer.llama3:parse_tiktoken")
IMPORTED = ("llamalet.convert.imported_model:build_config", "llamalet.convert.imported_model:check_shapes")


def at(name: str, use: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: use(folder / name)


def only_file(use: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: use(next(folder.glob("*")))


FORMATS: dict[str, Format] = {
    "bin-v0": Format(lambda: bin_seeds((0,)), at("m.bin", use_model), MODEL_FILE),
    "bin-v1": Format(lambda: bin_seeds((1,)), at("m.bin", use_model), MODEL_FILE),
    "bin-v2": Format(lambda: bin_seeds((2,)), at("m.bin", use_model), MODEL_FILE),
    "bin-v3": Format(lambda: bin_seeds((3,)), at("m.bin", use_model), MODEL_FILE),
    "v3-flipped-bits": Format(flipped_seeds, at("m.bin", use_model), (), cases=10_000, may_load=False),
    "tokenizer-bin": Format(rows_seeds, only_file(use_tokenizer), ("llamalet.tokenizer.llama2:check_pieces",)),
    "sentencepiece": Format(model_seeds, only_file(use_tokenizer), (SENTENCEPIECE,)),
    "tokenizer-json": Format(
        tokenizer_json_seeds, only_file(use_tokenizer), ("llamalet.tokenizer.huggingface:JsonTokenizer.__init__",)
    ),
    "ranks": Format(ranks_seeds, only_file(use_tokenizer), RANKS),
    "gguf": Format(gguf_seeds, at("m.gguf", use_model), IMPORTED),
    "hf": Format(hf_seeds, use_model, IMPORTED),
    "llama2c-pt": Format(llama2c_seeds, at("ckpt.pt", use_model), IMPORTED),
    "meta-pth": Format(meta_seeds, use_model, IMPORTED),
    "shards": Format(shards_seeds, use_shards, ("llamalet.shards:check_shard",)),
    "checkpoint": Format(checkpoint_seeds, use_checkpoint, ("llamalet.model_file.checkpoint:read_state",)),
    "records": Format(record_seeds, use_records, ("llamalet.strict:build", "training.run.metrics:_row")),
    "template": Format(template_seeds, use_template, ("llamalet.chat_template:JinjaTemplate.__call__",), cases=5_000),
    "toml": Format(toml_seeds, only_file(use_toml), ("llamalet.strict:_check_values",)),
}  # fmt: skip
