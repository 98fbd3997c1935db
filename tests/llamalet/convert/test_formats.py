import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SMALL_MODELS, random_tensors, toy_llama3, toy_model, toy_tokenizer

import export
from llamalet import model_file, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import (
    bin_file,
    formats,
    gguf_file,
    huggingface,
    llama2c,
    meta_llama,
    safetensors_file,
    tokenizer_json,
)
from llamalet.convert.imported_model import ImportedModel, difference, llama3_scaling
from llamalet.errors import ConfigError, FormatError, NonFiniteError, TokenizerError, UsageError
from llamalet.kernels.transformer import Transformer
from llamalet.model_file import companions, tensors
from llamalet.reference import NumpyTransformer
from parity import in_torch, proof

transformers = pytest.importorskip("transformers")

T = 200  # positions that are compared
TOLERANCE = 1e-4

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
# The structure of the real ones, narrow: transformers' names of what makes each.
LIKE = {
    "llama-2": {
        "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama-3.2-1b": {
        "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama-3.2-3b": {
        "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "rope_parameters": LLAMA3_ROPE,
    },
    "linear": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "longrope with one list": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.25, 3.0, 9.5],
            "long_factor": [1.0, 1.25, 3.0, 9.5], "attention_factor": 1.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip
VOCAB = 300
NASTY = (
    "a band", " a  b\tn\r\nde", "\u00e9t\u00e9 \u4e2d\u6587", "\U0001f468\u200d\U0001f469\u200d\U0001f467 zw\u200bj",
    "1234567890", " " * 40 + "x", "aaaaaaaaaaaaaaaaaaa", "\x00\x7f\ufffd", "e\u0301 <0x41>", "",
)  # fmt: skip


def run_main(*argv: object) -> int:
    return export.main([str(word) for word in argv])


def transformer_of(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.15, **LIKE[kind], attn_implementation="eager"
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


@torch.inference_mode()
def their_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids)[None]).logits[0].float().numpy()


def ids(n: int = T) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, n)


def saved(folder: Path, kind: str, **options) -> torch.nn.Module:
    """Save a model as transformers does, and a tokenizer beside it."""
    model = transformer_of(kind)
    model.save_pretrained(folder, **options)
    tokenizer.write_bin(folder / "tokenizer.model", toy_tokenizer(VOCAB))  # content tells the kind, not the name
    return model


def our_source(config: ModelConfig, seed: int = 0, **rest) -> ImportedModel:
    return ImportedModel(name="toy", config=config, tensors=random_tensors(config, seed), **rest)


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; None takes one away."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIKE)
def test_a_model_of_transformers_gives_its_logits_here_and_goes_back(tmp_path, kind, capsys):
    theirs = saved(tmp_path / "hf", kind)
    expected = their_logits(theirs, ids())
    assert run_main(tmp_path / "m.bin", "--version=3", "--dtype=f32", "--hf", tmp_path / "hf") == 0
    assert "is proved" in capsys.readouterr().out
    file = model_file.read(tmp_path / "m.bin")
    assert file.config.max_seq_len == LIKE[kind]["max_position_embeddings"]
    np.testing.assert_allclose(Transformer(file, kv="f32").logits(ids()), expected, atol=TOLERANCE)
    np.testing.assert_allclose(
        in_torch.TorchLogits(bin_file.tensors_of(file), file.config).logits(ids()), expected, atol=TOLERANCE
    )

    assert run_main(tmp_path / "back", "--bin", tmp_path / "m.bin") == 0
    assert "every weight is equal" in capsys.readouterr().out
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    np.testing.assert_array_equal(their_logits(loaded.eval(), ids()), their_logits(theirs, ids()))
    assert (tmp_path / "back" / "config.json").exists() and not (tmp_path / "back" / "tokenizer.model").exists()
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == file.config.rope_theta


def test_shards_and_bfloat16_read_as_one_file(tmp_path):
    saved(tmp_path / "one", "llama-3.2-1b")
    model = transformer_of("llama-3.2-1b").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = huggingface.read(str(tmp_path / "one")), huggingface.read(str(tmp_path / "many"))
    assert one.config == many.config and one.config.rope_scaling == llama3_scaling(32)
    for name, tensor in many.tensors.items():
        expected = torch.from_numpy(np.array(one.tensors[name][0 : tensor.shape[0]])).to(torch.bfloat16).float()
        np.testing.assert_array_equal(tensor[0 : tensor.shape[0]], expected.numpy())
    model.to(torch.float16).save_pretrained(tmp_path / "half")
    assert difference(one.tensors, huggingface.read(str(tmp_path / "half")).tensors) < 0.01


def test_the_old_spelling_of_the_rope_parameters_is_read(tmp_path):
    saved(tmp_path, "llama-3.2-1b")
    new = huggingface.read(str(tmp_path)).config
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit(tmp_path / "config.json", rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling, head_dim=None)
    assert huggingface.read(str(tmp_path)).config == new
    edit(tmp_path / "config.json", rope_theta=None, rope_scaling=None)
    plain = huggingface.read(str(tmp_path)).config
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, None)


def test_rows_come_in_blocks_of_any_size(tmp_path, monkeypatch):
    saved(tmp_path / "hf", "llama-3.2-3b")
    whole = dataclasses.replace(huggingface.read(str(tmp_path / "hf")), tokenizer=None)
    for dtype in ("f32", "bf16", "q8", "q4"):
        bin_file.write(tmp_path / "a.bin", whole, 3, dtype=dtype)
        with monkeypatch.context() as small:
            small.setattr(tensors, "BLOCK_WEIGHTS", 1000)
            bin_file.write(tmp_path / "b.bin", whole, 3, dtype=dtype)
        assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral': only Llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "is of type 'yarn', factor 2.0: only 'linear'",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling.factor=None: must be a number"),
        ({"hidden_size": None}, "has no hidden_size"),
        (
            {"hidden_size": 60},
            "input_layernorm.weight has shape .128,. where the config asks for .60,.; .* and 17 more",
        ),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing; .* and 6 more"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is not part of a Llama model"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8: must be a multiple of num_key_value_heads=3"),
        ({"rms_norm_eps": "small"}, "norm_eps='small': must be a number"),
        ({"num_attention_heads": 2.5}, "2.5"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers=1000.*: must be a whole number from 1 to 1024"),
        ({"num_hidden_layers": math.nan}, "num_hidden_layers=nan: must be a finite number"),
        ({"max_position_embeddings": math.inf}, "max_position_embeddings=inf: must be a finite number"),
        ({"rms_norm_eps": 10**400}, "norm_eps=1000.*: must be a number"),
        (
            {"rope_parameters": LLAMA3_ROPE | {"factor": 10**400}},
            "rope_scaling.factor=1000.*: must be a number, at least 1",
        ),
        ({"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": math.inf}}, "must be a finite number"),
    ],
)
def test_what_is_no_llama_is_refused_by_name(tmp_path, changes, words):
    saved(tmp_path, "llama-3.2-1b")
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(FormatError, match=words) as error:
        huggingface.read(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_whole_number_will_do_where_any_number_does(tmp_path):
    saved(tmp_path, "llama-2")
    edit(tmp_path / "config.json", rope_theta=10000, rope_parameters=None)
    assert huggingface.read(str(tmp_path)).config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": ["F32"]}, "header is damaged"),
        ({"data_offsets": [0]}, "header is damaged"),
        ({"data_offsets": [0, 4, 8]}, "header is damaged"),
        ({"shape": [math.inf]}, "header is damaged"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, fields, words):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}).encode()
    for content in (header, b"[" * 100_000):
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
        with pytest.raises(FormatError, match=words if content == header else "header is damaged"):
            safetensors_file.read(tmp_path / "m.safetensors")
        (tmp_path / "config.json").write_bytes(b"[" * 100_000)
        with pytest.raises(FormatError, match="not valid JSON"):
            huggingface.read(str(tmp_path))


def test_damaged_folders_are_refused(tmp_path):
    saved(tmp_path, "llama-2", max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    for damage, words in (
        (data[:-10], "does not fit"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (struct.pack("<Q", 20) + b"{" * 40, "header is damaged"),
        (data.replace(b'"F32"', b'"I32"'), "is I32: only F32, F16, BF16"),
    ):
        shard.write_bytes(damage)
        with pytest.raises(FormatError, match=words):
            huggingface.read(str(tmp_path))
    shard.unlink()
    with pytest.raises(FormatError, match="is missing; model.safetensors.index.json names it"):
        huggingface.read(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(FormatError, match="must be a file beside it"):
        huggingface.read(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="has neither model.safetensors nor"):
        huggingface.read(str(tmp_path))


def test_the_hubs_refusals_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(error: Exception):
        def download(*_, **__):
            raise error

        return download

    made = [kind.__new__(kind) for kind in (errors.GatedRepoError, errors.RepositoryNotFoundError)]
    for error, words in (
        (made[0], "gated: accept its licence at https://huggingface.co/meta-llama/Llama-3.2-1B, then log in: hf auth"),
        (made[1], "no such repository .* hf auth login .*huggingface-cli login"),
        (errors.LocalEntryNotFoundError("offline\nand more"), "cannot be reached: offline; .* hf auth login"),
        (ConnectionError("Name or service not known"), "cannot be reached: Name or service not known"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(error))
        with pytest.raises(UsageError, match=words) as caught:
            run_main(tmp_path / "m.bin", "--version=2", "--hf", "meta-llama/Llama-3.2-1B")
        assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match="neither a folder nor the ID"):
        run_main(tmp_path / "m.bin", "--hf=not/a/hub/id")


def test_a_repository_of_the_hub_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    saved(tmp_path / "hf", "llama-2")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda id, **options: asked.append((id, options)) or str(tmp_path / "hf")
    )
    assert run_main(tmp_path / "m.bin", "--version=0", "--no-check", "--hf", "some/llama") == 0
    assert asked[0][0] == "some/llama" and "*.safetensors" in asked[0][1]["allow_patterns"]


def test_a_folder_with_something_else_is_not_written_into(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds checkpoints"):
        huggingface.write(tmp_path, our_source(SMALL_MODELS["gqa-tied"]))


def test_what_transformers_refuses_is_refused_here(tmp_path):
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], n_heads=6, n_kv_heads=2)  # 64 is no multiple of 6
    with pytest.raises(ConfigError, match="dim=64: transformers wants a multiple of n_heads=6"):
        huggingface.write(tmp_path, our_source(config))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_transformers_cuts_texts_as_we_do(tmp_path):
    vocabulary = toy_tokenizer(VOCAB)
    huggingface.write(tmp_path, our_source(SMALL_MODELS["gqa-tied"], tokenizer=vocabulary))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in NASTY:
        assert found(text)["input_ids"] == vocabulary.encode(text, bos=True), text
        assert found.decode(vocabulary.encode(text, bos=True), skip_special_tokens=True) == text


def test_transformers_cuts_texts_as_llama_2_does(tmp_path, shared_data):
    path = shared_data / "llama2-tokenizer.model"
    vocabulary = tokenizer.load(path)
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=vocabulary.vocab_size)
    source = our_source(
        config, tokenizer=vocabulary, tokenizer_data=path.read_bytes(), chat_template="{{ messages[0].content }}"
    )
    huggingface.write(tmp_path, source)
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*NASTY, *(shared_data / "tinyshakespeare.txt").read_text()[:20000].split("\n\n")]
    for text in texts:
        assert found(text)["input_ids"] == vocabulary.encode(text, bos=True), text
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert huggingface.read(str(tmp_path)).tokenizer.sha256 == vocabulary.sha256
    assert huggingface.read(str(tmp_path)).chat_template == source.chat_template


def test_a_chat_template_goes_with_the_model(tmp_path):
    vocabulary = toy_tokenizer(VOCAB)
    source = our_source(SMALL_MODELS["gqa-tied"], tokenizer=vocabulary, chat_template="{{ messages }}\u00e9")
    huggingface.write(tmp_path / "hf", source)
    run_main(
        tmp_path / "m.bin",
        "--version=3",
        "--no-check",
        "--tokenizer",
        tmp_path / "hf" / "tokenizer.json",
        "--hf",
        tmp_path / "hf",
    )
    assert (tmp_path / "m.chat_template.jinja").read_text(encoding="utf-8") == source.chat_template
    assert formats.read("bin", str(tmp_path / "m.bin")).chat_template == source.chat_template


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_no_template_of_a_replaced_model_remains(tmp_path, template):
    folder, more = tmp_path / "hf", tmp_path / "hf" / "additional_chat_templates"
    source = our_source(SMALL_MODELS["gqa-tied"], tokenizer=toy_tokenizer(VOCAB), chat_template=template)
    huggingface.write(folder, source)
    more.mkdir()
    for path in (folder / "chat_template.jinja", more / "default.jinja", more / "tool.jinja"):
        path.write_text("another model's")
    huggingface.write(folder, source)
    assert not list(folder.rglob("*.jinja"))
    assert huggingface.read(str(folder)).chat_template == template


def llama3_source(**rest) -> ImportedModel:
    vocabulary = toy_llama3()
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=vocabulary.vocab_size)
    return our_source(config, tokenizer=vocabulary, tokenizer_data=tokenizer.pack(vocabulary.pieces()), **rest)


def test_transformers_cuts_texts_as_llama_3_does(tmp_path):
    source = llama3_source()
    vocabulary = source.tokenizer
    huggingface.write(tmp_path / "hf", source)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*NASTY, "the ban an and 12345 's\n\n aaaaaaaaaaaaaaa"):
        assert found(text)["input_ids"] == vocabulary.encode(text, bos=True), text
        assert found.decode(vocabulary.encode(text, bos=True), skip_special_tokens=True) == text
    assert found("<|eot_id|>", add_special_tokens=False)["input_ids"] == [vocabulary.special["<|eot_id|>"]]
    assert not (tmp_path / "hf" / "tokenizer.model").exists()
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == vocabulary.stop_ids and stops[0] == vocabulary.eos_id
    # Its tokenizer.json goes into a .bin and a GGUF file as a rank table, which llama2.c's descendants read too.
    json_bytes = (tmp_path / "hf" / "tokenizer.json").read_bytes()
    run_main(tmp_path / "m.bin", "--version=3", "--no-check", "--hf", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.glob("m.*")) == ["m.bin"]
    run_main(tmp_path / "m2.bin", "--version=2", "--no-check", "--hf", tmp_path / "hf")
    assert (tmp_path / "m2.tokenizer.bin").read_bytes() == source.tokenizer_data
    run_main(tmp_path / "again", "--bin", tmp_path / "m.bin")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == json_bytes
    gguf_file.write(tmp_path / "a.gguf", source)
    gguf_file.write(tmp_path / "b.gguf", huggingface.read(str(tmp_path / "hf")))
    for name in "ab":
        found = gguf_file.read(str(tmp_path / f"{name}.gguf"))
        assert found.tokenizer.sha256 == vocabulary.sha256 and found.tokenizer_data == source.tokenizer_data
        assert found.stop_tokens == tuple(sorted(vocabulary.stop_ids))


def test_the_tokenizer_goes_where_its_readers_look(tmp_path):
    source = llama3_source()
    for version in (2, 3):
        path = tmp_path / f"v{version}.bin"
        bin_file.write(path, source, version)
        found = formats.read("bin", str(path))
        assert found.tokenizer.sha256 == source.tokenizer.sha256 and found.tokenizer_data == source.tokenizer_data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v2.bin", "v2.tokenizer.bin", "v3.bin"]


@pytest.mark.parametrize("words", [["--dtype=q8"], ["--version=2"]])
def test_an_export_leaves_the_users_files(tmp_path, words, shared_data):
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=32000)
    model_file.write(tmp_path / "src.bin", 1, config, random_tensors(config))
    named = tmp_path / "m.tokenizer.tiktoken"  # content tells the kind, not the name
    named.write_bytes((shared_data / "llama2-tokenizer.bin").read_bytes())
    (tmp_path / "m.chat_template.jinja").write_text("mine")
    run_main(tmp_path / "m.bin", "--bin", tmp_path / "src.bin", "--tokenizer", named, "--no-check", *words)
    assert named.is_file() and (tmp_path / "m.chat_template.jinja").read_text() == "mine"
    assert formats.read("bin", str(tmp_path / "m.bin")).tokenizer.sha256 == tokenizer.load(named).sha256


@pytest.mark.parametrize(("version", "known", "is_read"), [(3, True, False), (1, False, False), (1, True, True)])
def test_a_tokenizer_that_would_be_read_instead_is_removed_and_named(tmp_path, capsys, version, known, is_read):
    source, path, stale = llama3_source(), tmp_path / "m.bin", tmp_path / "m.tokenizer.json"
    stale.write_bytes(tokenizer_json.build(toy_tokenizer(VOCAB), b""))
    bin_file.write(path, source if known else dataclasses.replace(source, tokenizer=None), version)
    assert stale.exists() != is_read and (f"note: removed {stale}" in capsys.readouterr().out) == is_read
    if known:
        assert formats.read("bin", str(path)).tokenizer.sha256 == source.tokenizer.sha256


def test_a_vocabulary_that_the_library_would_cut_differently_is_refused():
    vocabulary = toy_tokenizer(VOCAB)
    vocabulary.encode = lambda text, **_: [3]  # type: ignore[method-assign]
    with pytest.raises(TokenizerError, match="would cut"):
        tokenizer_json.build(vocabulary, b"")


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", gguf_file.DTYPES)
@pytest.mark.parametrize("kind", ["llama-3.2-1b", "llama-3.2-3b"])
def test_gguf_goes_out_and_comes_back(tmp_path, kind, dtype, capsys):
    import gguf

    saved(tmp_path / "hf", kind)
    assert run_main(tmp_path / "m.gguf", "--dtype", dtype, "--hf", tmp_path / "hf") == 0
    assert "read back: " in capsys.readouterr().out
    source, found = huggingface.read(str(tmp_path / "hf")), gguf_file.read(str(tmp_path / "m.gguf"))
    assert found.config == source.config and found.tokenizer.sha256 == source.tokenizer.sha256
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == gguf_file.DTYPES[dtype][0]
    rows = source.tensors["layers.1.attention.wk"]
    ours = gguf.quants.quantize(rows[0 : rows.shape[0]], tensors["blk.1.attn_k.weight"].tensor_type)
    assert tensors["blk.1.attn_k.weight"].data.tobytes() == ours.tobytes()
    assert reader.get_field("tokenizer.ggml.tokens").contents()[1] == "<s>"
    if dtype == "f32":
        run_main(tmp_path / "m.bin", "--version=3", "--dtype=f32", "--no-check", "--gguf", tmp_path / "m.gguf")
        expected = their_logits(transformer_of(kind), ids(50))
        logits = NumpyTransformer(model_file.read(tmp_path / "m.bin")).logits(ids(50))
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def test_rows_of_no_whole_blocks_become_float16_in_gguf(tmp_path, capsys):
    config = SMALL_MODELS["mha-untied"]  # rows of 48 and 112
    toy_model(tmp_path, config)
    assert run_main(tmp_path / "m.gguf", "--dtype=q4_0", "--bin", tmp_path / "model.bin") == 0
    assert f"{7 * config.n_layers + 2} matrices are f16" in capsys.readouterr().out
    assert not gguf_file.read(str(tmp_path / "m.gguf")).config.tied


def test_gguf_says_what_it_cannot_carry_or_read(tmp_path):
    source = our_source(SMALL_MODELS["gqa-tied"], tokenizer=toy_tokenizer(VOCAB))
    gguf_file.write(tmp_path / "m.gguf", source)
    data = (tmp_path / "m.gguf").read_bytes()
    for damage, words in (
        (data[: len(data) // 2], "damaged or truncated"),
        (data[:100], "damaged"),
        (b"GGML" + data[4:], "not a GGUF file"),
        (data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight"), "blk.1.attn_q.weight is missing"),
        (
            data.replace(b"\x2c\1\0\0\0\0\0\0\5\0\0\0\0\0\0\0<unk>", b"\x2c\1\0\0\0\1\0\0\5\0\0\0\0\0\0\0<unk>"),
            "more than 2097152 values",
        ),
        (
            data.replace(*(b"block_count" + struct.pack("<2I", 4, n) for n in (source.config.n_layers, 1 << 31))),
            "llama.block_count=2147483648: must be a whole number from 1 to 1024",
        ),
        (data.replace(b"<0x41>", b"<0x4\xff>"), "tokenizer.ggml.tokens is damaged: 'utf-8'"),
        (data.replace(b"\x05\0\0\0\0\0\0\0llama\x0c", b"\x05\0\0\0\0\0\0\0qwen2\x0c"), "'qwen2' model"),
    ):
        assert damage != data
        (tmp_path / "m.gguf").write_bytes(damage)
        with pytest.raises(FormatError, match=words):
            gguf_file.read(str(tmp_path / "m.gguf"))
    source.tensors["norm"][3] = np.nan
    with pytest.raises(NonFiniteError, match="norm"):
        gguf_file.write(tmp_path / "n.gguf", source)
    assert not (tmp_path / "n.gguf").exists()


# -- Meta and llama2.c ------------------------------------------------------------------------------------------------


# Source: llama-models, llama3/reference_impl/model.py: ColumnParallelLinear cuts rows, RowParallelLinear columns.
META_AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def meta_folder(folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], n: int, **params: object) -> None:
    """Write a model as Meta does, over n processors; embeddings cut as Llama 2's (columns) or Llama 3's (rows)."""
    folder.mkdir()
    axes = META_AXES | {"tok_embeddings": 0 if config.vocab_size % (2 * n) == 0 else 1}
    everything = tensors | {"output": tensors.get("output", tensors["tok_embeddings"])}
    for i in range(n):
        shard = {}
        for name, tensor in everything.items():
            axis = axes.get(name.rpartition(".")[2])
            part = tensor if axis is None else np.split(tensor, n, axis=axis)[i]
            shard[name + ".weight"] = torch.tensor(part)
        torch.save(shard | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02d}.pth")
    fields = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    (folder / "params.json").write_text(json.dumps(fields | {"multiple_of": 32, "vocab_size": -1} | params))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("vocab_size", [300, 302])
@pytest.mark.parametrize("tied", [True, False])
def test_metas_folders_are_read_whole(tmp_path, n, vocab_size, tied):
    config = dataclasses.replace(
        SMALL_MODELS["gqa-tied"], vocab_size=vocab_size, tied=tied, max_seq_len=131072, rope_theta=500000.0,
        rope_scaling=llama3_scaling(32),
    )  # fmt: skip
    tensors = random_tensors(config)
    meta_folder(tmp_path / "m", config, tensors, n, n_kv_heads=2, rope_theta=500000.0, use_scaled_rope=True)
    found = meta_llama.read(str(tmp_path / "m"))
    assert found.config == config and difference(tensors, found.tensors) == 0


def test_metas_params_say_which_llama_it_is(tmp_path):
    config = SMALL_MODELS["mha-untied"]
    meta_folder(tmp_path / "m", config, random_tensors(config), 1)
    table = {
        (4096, 10000.0, None): {}, (2048, 10000.0, None): {"norm_eps": 1e-6}, (16384, 1e6, None): {"rope_theta": 1e6},
        (131072, 5e5, 8.0): {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8},
    }  # fmt: skip
    for expected, params in table.items():
        edit(tmp_path / "m" / "params.json", norm_eps=1e-5)
        edit(tmp_path / "m" / "params.json", **params)
        c = meta_llama.read(str(tmp_path / "m")).config
        assert (c.max_seq_len, c.rope_theta, c.rope_scaling and c.rope_scaling.factor) == expected


def test_metas_damaged_folders_are_refused(tmp_path):
    config = SMALL_MODELS["mha-untied"]
    meta_folder(tmp_path / "m", config, random_tensors(config), 2)
    edit(tmp_path / "m" / "params.json", n_layers=3)
    with pytest.raises(FormatError, match="layers.2.attention_norm.weight is missing"):
        meta_llama.read(str(tmp_path / "m"))
    (tmp_path / "m" / "consolidated.00.pth").unlink()
    with pytest.raises(
        FormatError, match="needs consolidated.00.pth and all that follow it; found: consolidated.01.pth"
    ):
        meta_llama.read(str(tmp_path / "m"))


def ckpt(path: Path, config: ModelConfig, prefix: str, settings: object = None) -> dict[str, np.ndarray]:
    """Write what llama2.c's train.py saves."""
    tensors = random_tensors(config)
    state = {f"{prefix}{name}.weight": torch.tensor(tensor) for name, tensor in tensors.items()}
    state |= {f"{prefix}output.weight": state[f"{prefix}tok_embeddings.weight"]} if config.tied else {}
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    arguments = {name: getattr(config, name) for name in names} | {"multiple_of": 32, "dropout": 0.0}
    whole = {
        "model": state,
        "model_args": arguments,
        "iter_num": 3,
        "optimizer": {},
        "best_val_loss": torch.tensor(1.0),
    }
    torch.save(whole | {"config": settings}, path)
    return tensors


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["gqa-tied", "mha-untied"])
def test_llama2c_s_checkpoints_are_read(tmp_path, prefix, kind):
    tensors = ckpt(tmp_path / "ckpt.pt", SMALL_MODELS[kind], prefix)
    found = formats.read("llama2c", str(tmp_path / "ckpt.pt"))
    assert found.config == SMALL_MODELS[kind] and difference(tensors, found.tensors) == 0
    assert formats.read("llama2c", str(tmp_path / "ckpt.pt"), rope_theta=5e5).config.rope_theta == 5e5


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "done"),)

    ckpt(tmp_path / "ckpt.pt", SMALL_MODELS["gqa-tied"], "", Evil())
    with pytest.raises(FormatError, match="cannot|without running code"):
        llama2c.read(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "done").exists()
    (tmp_path / "ckpt.pt").write_bytes(b"PK not a zip")
    with pytest.raises(FormatError, match="PyTorch"):
        llama2c.read(str(tmp_path / "ckpt.pt"))
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match="no model and model_args"):
        llama2c.read(str(tmp_path / "ckpt.pt"))


BAD_TENSORS = {
    "scalar": torch.tensor(1.0), "vector": torch.ones(3), "cube": torch.ones(2, 2, 2), "empty": torch.ones(3, 0),
    "sparse": torch.eye(3).to_sparse(), "meta": torch.ones(3, 3, device="meta"), "integers": torch.ones(3, 3).int(),
    "list": [1.0],
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_TENSORS)
@pytest.mark.parametrize("name", ["tok_embeddings", "layers.0.feed_forward.w1", "output"])
def test_what_is_no_matrix_is_refused_by_file_and_name(tmp_path, name, bad):
    config = SMALL_MODELS["mha-untied"]
    state = {f"{key}.weight": torch.tensor(tensor) for key, tensor in random_tensors(config).items()}
    state[f"{name}.weight"] = BAD_TENSORS[bad]
    torch.save({"model": state, "model_args": {"dim": config.dim, "n_heads": config.n_heads}}, tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match=f"ckpt.pt: {name}.weight"):
        llama2c.read(str(tmp_path / "ckpt.pt"))
    meta_folder(tmp_path / "m", config, random_tensors(config), 2)
    torch.save(state, tmp_path / "m" / "consolidated.01.pth")
    torch.save(state, tmp_path / "m" / "consolidated.00.pth")
    with pytest.raises(FormatError, match=f"consolidated.00.pth: {name}.weight"):
        meta_llama.read(str(tmp_path / "m"))


@pytest.mark.parametrize("factor", ["x", [3], 10**400, math.nan, 0.5])
def test_a_factor_that_is_none_is_refused(tmp_path, factor):
    config = SMALL_MODELS["mha-untied"]
    meta_folder(tmp_path / "m", config, random_tensors(config), 1, use_scaled_rope=True, rope_scaling_factor=factor)
    with pytest.raises(FormatError, match="params.json: rope_scaling_factor="):
        meta_llama.read(str(tmp_path / "m"))


@pytest.mark.parametrize("value", [48.0, "48", True, [48], 2.5])
def test_other_types_in_a_pytorch_file_are_refused_by_name(tmp_path, value):
    ckpt(tmp_path / "ckpt.pt", SMALL_MODELS["mha-untied"], "")
    whole = torch.load(tmp_path / "ckpt.pt")
    for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
        torch.save(whole | {"model_args": whole["model_args"] | {field: value}}, tmp_path / "ckpt.pt")
        with pytest.raises(FormatError, match=f"ckpt.pt: {field}=.*: must be a whole number"):
            llama2c.read(str(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("vocab_size", [300.0, "300", True, -2, 299])
def test_another_vocabulary_than_the_embeddings_is_refused(tmp_path, vocab_size):
    config = SMALL_MODELS["mha-untied"]
    meta_folder(tmp_path / "m", config, random_tensors(config), 1, vocab_size=vocab_size)
    with pytest.raises(FormatError, match=f"params.json: vocab_size='?{vocab_size}'?: must be 300, the rows"):
        meta_llama.read(str(tmp_path / "m"))


@pytest.mark.parametrize("n_layers", [10**400, math.inf, 1025, "2", 2.0, True, None])
def test_layers_without_end_are_refused(tmp_path, n_layers):
    config = SMALL_MODELS["mha-untied"]
    meta_folder(tmp_path / "m", config, random_tensors(config), 1, n_layers=n_layers)
    ckpt(tmp_path / "ckpt.pt", config, "")
    whole = torch.load(tmp_path / "ckpt.pt")
    whole["model_args"]["n_layers"] = n_layers
    torch.save(whole, tmp_path / "ckpt.pt")
    for reader, name in ((meta_llama, "m"), (llama2c, "ckpt.pt")):
        with pytest.raises(FormatError, match="n_layers=.*: must be"):
            reader.read(str(tmp_path / name))


def test_pytorch_files_of_every_age_and_length(tmp_path):
    config, path = SMALL_MODELS["gqa-tied"], tmp_path / "ckpt.pt"
    tensors = ckpt(path, config, "")
    whole = path.read_bytes()
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert difference(tensors, llama2c.read(str(path)).tensors) == 0
    old = path.read_bytes()
    for damage in (whole[:5000], whole[:-100], whole[:2], b"", old[:5000], old[:-100], old[:2]):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match="ckpt.pt: not a PyTorch file"):
            llama2c.read(str(path))
    torch.save({3: torch.ones(3)}, path)
    with pytest.raises(FormatError, match="ckpt.pt: holds a dict, not a dict of tensors by their names"):
        llama2c.read(str(path))


# -- llama2.c's binaries, and those of its descendants ----------------------------------------------------------------


def without_marker(path: Path) -> None:
    """Take away what llama2.c does not write: its bytes 41 to 255 are zero."""
    data = bytearray(path.read_bytes())
    data[41:256] = bytes(256 - 41)
    path.write_bytes(data)


def test_the_rope_theta_of_llama3_2_c_s_files_is_never_guessed(tmp_path, capsys):
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], rope_theta=500000.0, vocab_size=128256)
    tensors = random_tensors(config, scale=0.05)
    model_file.write(tmp_path / "v2.bin", 2, config, tensors)
    without_marker(tmp_path / "v2.bin")
    with pytest.raises(FormatError, match="does not say its rope_theta, .* --bin .*v2.bin --rope_theta 500000"):
        model_file.read(tmp_path / "v2.bin")
    with pytest.raises(FormatError, match="--rope_theta 500000"):
        run_main(tmp_path / "new.bin", "--llama2c", tmp_path / "v2.bin")
    words = ("--rope_theta=500000", "--rope_scaling=32", "--no-check")
    run_main(tmp_path / "new.bin", "--version=2", "--llama2c", tmp_path / "v2.bin", *words)
    found = model_file.read(tmp_path / "new.bin").config
    assert found.rope_theta == 500000.0 and found.rope_scaling == llama3_scaling(32)
    with pytest.raises(ConfigError, match="says that it is 500000; leave it out"):
        run_main(tmp_path / "other.bin", "--bin", tmp_path / "new.bin", "--rope_theta=10000")
    model_file.write(tmp_path / "v0.bin", 0, config, tensors, force=True)
    capsys.readouterr()
    run_main(tmp_path / "from0.bin", "--bin", tmp_path / "v0.bin", "--no-check")
    assert "rope_theta 500000" in capsys.readouterr().out
    assert model_file.read(tmp_path / "from0.bin").config.rope_theta == 500000.0


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version_is_an_input(tmp_path, version):
    config = SMALL_MODELS["gqa-untied"]
    toy_model(tmp_path, config, version=version, dtype="q4" if version == 3 else None)
    found = formats.read(formats.kind_of(tmp_path / "model.bin"), str(tmp_path / "model.bin"))
    bin_file.write(tmp_path / "copy.bin", found, 1)
    assert companions.beside(tmp_path / "copy.bin") == tmp_path / "copy.tokenizer.bin"
    copy, file = model_file.read(tmp_path / "copy.bin"), model_file.read(tmp_path / "model.bin")
    for name, tensor in bin_file.tensors_of(file).items():
        np.testing.assert_array_equal(copy.tensors[name], tensor[0 : tensor.shape[0]])


def test_a_large_model_is_proved_a_layer_at_a_time(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "hf", "llama-3.2-1b")
    monkeypatch.setattr(proof, "LARGE_PARAMS", 1000)
    assert run_main(tmp_path / "m.bin", "--version=2", "--hf", tmp_path / "hf") == 0
    shown = capsys.readouterr().out
    assert "is proved" in shown and "not compared (the model is large)" in shown
    source = huggingface.read(str(tmp_path / "hf"))
    layered = in_torch.LayeredLogits(source.tensors, source.config).logits(ids())
    np.testing.assert_allclose(layered, their_logits(transformer_of("llama-3.2-1b"), ids()), atol=TOLERANCE)
    other = dict(source.tensors) | {"layers.1.attention.wv": source.tensors["layers.0.attention.wv"]}
    assert proof.prove(tmp_path / "m.bin", originals=other).problems


def test_the_kinds_are_told_apart(tmp_path):
    saved(tmp_path / "hf", "llama-2")
    meta_folder(tmp_path / "meta", SMALL_MODELS["mha-untied"], random_tensors(SMALL_MODELS["mha-untied"]), 1)
    ckpt(tmp_path / "ckpt.pt", SMALL_MODELS["gqa-tied"], "")
    gguf_file.write(tmp_path / "g", our_source(SMALL_MODELS["gqa-tied"], tokenizer=toy_tokenizer(VOCAB)))
    for path, kind in (("hf", "hf"), ("meta", "meta_llama"), ("ckpt.pt", "llama2c"), ("g", "gguf")):
        assert formats.kind_of(tmp_path / path) == kind
    (tmp_path / "half").mkdir()
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "half" / "model.safetensors")
    for path, words in (
        (tmp_path, "no config.json"), (tmp_path / "gone", "no such model file"),
        (tmp_path / "half", "half: holds model.safetensors but no config.json"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=words):
            formats.kind_of(path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["m.bin", "--hf=a/b", "--gguf=c"], "hf, gguf: only one"),
        (["--hf=a/b"], "hf=a/b: name the file or folder to write"),
        (["m.gguf", "--format=hf"], "format=hf: OUT is m.gguf"),
        (["m", "--format=bin"], "out=m: must end in .bin"),
        (["m", "--format=onnx"], "format=onnx: must be one of bin, hf, gguf"),
        (["m.gguf", "--dtype=q8"], "dtype=q8: must be one of f32, f16, q8_0, q4_0 in a gguf"),
        (["m", "--dtype=q8"], "dtype=q8: must be one of f32, bf16 in a hf"),
        (["m", "--version=2"], "version=2: only a .bin has versions"),
        (["m.bin", "--hf=.", "--rope_theta=1"], "leave them out"),
        (["m.pt", "--hf=a/b"], "out=m.pt: must end in .bin or .gguf; for a folder of this name add --format=hf"),
        (["", "--hf=a/b"], "OUT='': must not be empty"),
        (["--verify=m.bin", "--hf=a/b"], "checks an existing file"),
    ],
)
def test_options_that_do_not_fit(argv, words):
    with pytest.raises((ConfigError, UsageError), match=words):
        export.main(argv)


def test_the_option_that_a_model_is_for_is_named(tmp_path):
    saved(tmp_path / "hf", "llama-2")
    toy_model(tmp_path, SMALL_MODELS["gqa-tied"])
    gguf_file.write(tmp_path / "m.gguf", our_source(SMALL_MODELS["gqa-tied"], tokenizer=toy_tokenizer(VOCAB)))
    (tmp_path / "empty.bin").write_bytes(b"")
    for option, name, right in (
        ("bin", "m.gguf", "gguf"), ("llama2c", "m.gguf", "gguf"), ("hf", "m.gguf", "gguf"),
        ("checkpoint", "m.gguf", "gguf"), ("gguf", "model.bin", "bin"), ("bin", "hf", "hf"), ("meta_llama", "hf", "hf"),
        ("checkpoint", "hf", "hf"),
    ):  # fmt: skip
        with pytest.raises((FormatError, UsageError), match=rf"looks like --from={right} \(export.py: --{right}\)$"):
            run_main(tmp_path / "x.bin", f"--{option}", tmp_path / name)
    for option, name in (("gguf", "empty.bin"), ("bin", "empty.bin"), ("meta_llama", "empty.bin"), ("hf", "gone")):
        with pytest.raises(FormatError) as refused:
            run_main(tmp_path / "x.bin", f"--{option}", tmp_path / name)
        assert "looks as if" not in str(refused.value)
    assert not list(tmp_path.glob("x.*"))


def test_no_model_is_lost_to_its_own_export(tmp_path):
    toy_model(tmp_path, SMALL_MODELS["gqa-tied"])
    before = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "sub").mkdir()
    for out in (tmp_path / "model.bin", tmp_path / "sub" / ".." / "model.bin"):
        with pytest.raises(ConfigError, match="is the model to export"):
            run_main(out, "--dtype=q4", "--bin", tmp_path / "model.bin")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(ConfigError, match="d.gguf: is a folder; a .gguf is a file"):
        run_main(tmp_path / "d.gguf", "--bin", tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == before


@pytest.mark.parametrize("out", ["m.bin", "m.gguf", "hf"])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, out):
    toy_model(tmp_path, SMALL_MODELS["gqa-tied"])

    class Interrupting(bin_file.BinTensor):
        def __getitem__(self, rows):
            raise KeyboardInterrupt

    source = formats.read("bin", str(tmp_path / "model.bin"))
    tensors = source.tensors | {"norm": Interrupting(source.tensors["norm"].weight)}
    monkeypatch.setattr(export, "_open", lambda config: (dataclasses.replace(source, tensors=tensors), None))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        run_main(tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_pytorchs_files_need_torch(tmp_path):
    """In a process without torch, a Hugging Face folder becomes a .bin, and that a GGUF file."""
    saved(tmp_path / "hf", "llama-2")
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError('no torch', name='torch')\n"
        "sys.meta_path.insert(0, Without())\n"
        "import export\n"
        "sys.exit(export.main(sys.argv[1:]))"
    )
    for argv in (["m.bin", "--hf=hf"], ["m.gguf", "--bin=m.bin"]):
        words = [sys.executable, "-c", code, *argv]
        environment = os.environ | {"PYTHONPATH": str(Path(export.__file__).parent)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "every weight is equal" in done.stdout
    assert formats.read("gguf", str(tmp_path / "m.gguf")).config.n_heads == 4
