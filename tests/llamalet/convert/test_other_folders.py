"""Hugging Face folders with tensors under other names, and with keys that would change the arithmetic."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from other_programs import logits, transformers_logits
from safetensors.numpy import load_file, save_file
from toy import SMALL_MODELS, random_tensors, toy_model

from llamalet import model_file
from llamalet.config import ModelConfig, rope_frequencies
from llamalet.convert import formats, huggingface, meta_llama, safetensors_file
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import FormatError, TokenizerError
from llamalet.reference import NumpyTransformer

IDS = np.arange(5, 35)
TOLERANCE = 2e-4  # of logits up to 20, in float32
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return random_tensors(config, seed=3, scale=0.3)


def folder_of(folder: Path, kind: str, **changes: object) -> dict[str, np.ndarray]:
    """Write a folder with other fields in config.json; None takes one away. Return its tensors."""
    config = SMALL_MODELS[kind]
    huggingface.write(folder, ImportedModel(name="toy", config=config, tensors=tensors_of(config)))
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return load_file(folder / "model.safetensors")


def save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def our_logits(source: ImportedModel) -> np.ndarray:
    return NumpyTransformer(model_file.in_memory(Path("toy"), source.config, source.tensors, "f32")).logits(IDS)


def check_against(source: ImportedModel, kind: str, **other: np.ndarray) -> None:
    config = SMALL_MODELS[kind]
    expected = logits(config, tensors_of(config) | other, rope_frequencies(config), IDS)
    np.testing.assert_allclose(our_logits(source), expected, atol=TOLERANCE)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gqa-tied", "gqa-untied"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "_orig_mod."),
        ("", "module."),
        ("", "module._orig_mod."),
        ("", "_orig_mod.module."),
        ("", "_fsdp_wrapped_module."),
        ("model.", "model._orig_mod."),
        ("model.layers.0.", "model.layers.0._orig_mod."),
        ("model.layers.1.", "model.layers.1._checkpoint_wrapped_module."),
    ],
)
def test_what_wrappers_put_into_names_is_taken_out(tmp_path, kind, before, after):
    """transformers would draw new weights, with a warning."""
    arrays = folder_of(tmp_path, kind)
    save(
        tmp_path,
        {
            after + name.removeprefix(before) if name.startswith(before) else name: tensor
            for name, tensor in arrays.items()
        },
    )
    check_against(huggingface.read(str(tmp_path)), kind)


def test_wrapped_names_in_shards(tmp_path):
    arrays = {f"_orig_mod.{name}": tensor for name, tensor in folder_of(tmp_path, "gqa-tied").items()}
    (tmp_path / "model.safetensors").unlink()
    table = {}
    for at, name in enumerate(arrays):
        table[name] = f"model-0000{at % 2 + 1}-of-00002.safetensors"
    for file in set(table.values()):
        save_file({name: arrays[name] for name in arrays if table[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    check_against(huggingface.read(str(tmp_path)), "gqa-tied")


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    arrays = folder_of(tmp_path, "gqa-tied")
    save(tmp_path, arrays | {f"module.{EMBEDDINGS}": arrays[EMBEDDINGS] * 2})
    with pytest.raises(
        FormatError, match=f"module.{EMBEDDINGS} occurs twice, as {EMBEDDINGS}|{EMBEDDINGS} occurs twice"
    ):
        huggingface.read(str(tmp_path))


@pytest.mark.parametrize("kind", ["gqa-tied", "gqa-untied"])
def test_a_model_saved_without_its_head_lacks_a_prefix(tmp_path, kind):
    arrays = folder_of(tmp_path, kind)
    save(tmp_path, {name.removeprefix("model."): tensor for name, tensor in arrays.items()})
    found = huggingface.read(str(tmp_path))
    check_against(found, kind)
    np.testing.assert_allclose(our_logits(found), transformers_logits(tmp_path, IDS), atol=TOLERANCE)


def test_meta_s_names_lose_their_wrappers_too(tmp_path):
    config = SMALL_MODELS["gqa-untied"]
    tensors = tensors_of(config)
    torch.save(
        {f"_orig_mod.{name}.weight": torch.tensor(one) for name, one in tensors.items()},
        tmp_path / "consolidated.00.pth",
    )
    fields = {name: getattr(config, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps")}
    (tmp_path / "params.json").write_text(json.dumps(fields))
    check_against(meta_llama.read(str(tmp_path)), "gqa-untied")


# -- tied and untied --------------------------------------------------------------------------------------------------


def test_a_tied_model_may_store_the_output_alone(tmp_path):
    arrays = folder_of(tmp_path, "gqa-tied")
    arrays[HEAD] = arrays.pop(EMBEDDINGS)
    save(tmp_path, arrays)
    found = huggingface.read(str(tmp_path))
    assert found.config.tied and not found.notes
    check_against(found, "gqa-tied")
    np.testing.assert_allclose(our_logits(found), transformers_logits(tmp_path, IDS), atol=TOLERANCE)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_tied_model_with_two_copies_is_tied_if_they_are_equal(tmp_path, factor):
    arrays = folder_of(tmp_path, "gqa-tied")
    arrays[HEAD] = factor * arrays[EMBEDDINGS]
    save(tmp_path, arrays)
    found = huggingface.read(str(tmp_path))
    assert found.config.tied == (factor == 1)
    assert [HEAD in note and "not tied" in note for note in found.notes] == [True] * (factor - 1)
    np.testing.assert_allclose(our_logits(found), transformers_logits(tmp_path, IDS), atol=factor * TOLERANCE)


def test_an_untied_model_needs_its_embeddings(tmp_path):
    arrays = folder_of(tmp_path, "gqa-untied")
    save(tmp_path, {name: tensor for name, tensor in arrays.items() if name != HEAD})
    found = huggingface.read(str(tmp_path))
    assert found.config.tied and "lm_head.weight is missing" in found.notes[0]
    save(tmp_path, {name: tensor for name, tensor in arrays.items() if name != EMBEDDINGS})
    with pytest.raises(FormatError, match=f"{EMBEDDINGS} is missing"):
        huggingface.read(str(tmp_path))


def test_a_tied_model_with_neither_is_refused(tmp_path):
    arrays = folder_of(tmp_path, "gqa-tied")
    save(tmp_path, {name: tensor for name, tensor in arrays.items() if name != EMBEDDINGS})
    with pytest.raises(FormatError, match=f"{EMBEDDINGS} is missing"):
        huggingface.read(str(tmp_path))


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 2},
        {"hidden_act": "swish"},
        {"sliding_window": 32},
        {"sliding_window": 4096.0, "layer_types": ["sliding_attention", "full_attention"]},
        {"sliding_window": 8, "use_sliding_window": False},
        {"attention_chunk_size": 32},
        {"layer_types": ["full_attention"] * 2},
        {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0},
        {"attention_dropout": 0.5, "initializer_range": 0.5, "use_cache": False, "unheard_of": [1]},
        {"head_dim": 16, "num_key_value_heads": 2},
        {"head_dim": None},
        {"sliding_window": 32, "layer_types": ["sliding_attention"] * 2},
    ],
)
def test_harmless_keys_are_read(tmp_path, changes):
    folder_of(tmp_path, "gqa-tied", **changes)
    check_against(huggingface.read(str(tmp_path)), "gqa-tied")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 31}, "sliding_window is 31: only windows of at least max_position_embeddings, 32, can be"),
        ({"sliding_window": 8, "use_sliding_window": True}, "sliding_window is 8: only windows"),
        ({"sliding_window": 0}, "sliding_window is 0: only windows"),
        ({"sliding_window": "64"}, "sliding_window is '64': only windows"),
        ({"attention_chunk_size": 16}, "attention_chunk_size is 16: only windows"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types\[1\] is 'sliding_attention': only 'full_",
        ),
        (
            {"layer_types": ["full_attention", "linear_attention"], "sliding_window": 64},
            r"layer_types\[1\] is 'linear_attention': only 'full_attention' or 'sliding_attention' can be read",
        ),
        (
            {"layer_types": "full_attention"},
            "layer_types is 'full_attention': must be a list with a kind for each of the 2",
        ),
        (
            {"layer_types": ["full_attention"] * 3},
            r"layer_types is \[.*\]: must be a list with a kind for each of the 2",
        ),
        ({"layer_types": [["full_attention"]] * 2}, r"layer_types\[0\] is \['full_attention'\]: only"),
        ({"sliding_window": True}, "sliding_window is True: only windows"),
        ({"attention_bias": 0}, "attention_bias is 0: only Llama models with False can be read"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor is True: only"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only Llama models with 'silu' can be read"),
        ({"attention_bias": True}, "attention_bias is True: only Llama models with False can be read"),
        ({"mlp_bias": True}, "mlp_bias is True: only Llama models with False can be read"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only Llama models without it can be read"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is .*'awq'"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22: only Llama models without it"),
        ({"attention_multiplier": 0.0078125}, "attention_multiplier is 0.0078125"),
        ({"logits_scaling": 8}, "logits_scaling is 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: must be true or false"),
        ({"model_type": "granite"}, "model_type is 'granite': only Llama models with 'llama' can be read"),
        ({"head_dim": 15}, "head_dim=15: must be even, because RoPE rotates pairs"),
        ({"head_dim": 8}, "q_proj.weight has shape"),
        ({"num_attention_heads": 5}, "hidden_size=64: must be a multiple of num_attention_heads=5"),
    ],
)
def test_keys_that_change_the_arithmetic_are_refused_by_name(tmp_path, changes, words):
    if "num_attention_heads" in changes:
        changes = changes | {"head_dim": None}
    folder_of(tmp_path, "gqa-tied", **changes)
    with pytest.raises(FormatError, match=words) as error:
        huggingface.read(str(tmp_path))
    assert "\n" not in str(error.value)


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("field", [*SIZES, "rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [2.0, "2", True, [2], {}])
def test_a_number_of_another_type_is_refused_with_the_name_of_its_field(tmp_path, field, value):
    if field in SIZES or not isinstance(value, float):
        folder_of(tmp_path, "gqa-tied", **{field: value, "rope_parameters": {"rope_type": "default"}})
        with pytest.raises(FormatError, match=rf"config.json: {field}={re.escape(repr(value))}: must be a "):
            huggingface.read(str(tmp_path))


# -- what is no file --------------------------------------------------------------------------------------------------


def in_place_of(path: Path, kind: str) -> None:
    """Put something that is no file where one may be."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.parent / "nowhere")


KINDS_OF_ODD = {"pipe": "a pipe or a device", "folder": "a folder", "link": "a link to nothing"}


@pytest.mark.skipif(os.name != "posix", reason="makes pipes")
@pytest.mark.parametrize("kind", KINDS_OF_ODD)
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.model", "chat_template.jinja"]
)
def test_what_is_no_file_is_not_passed_over(tmp_path, kind, file):
    folder_of(tmp_path, "gqa-tied")
    in_place_of(tmp_path / file, kind)
    for read in (huggingface.read, formats.kind_of)[: 1 + (file == "config.json")]:
        with pytest.raises(FormatError, match=f"{file}: is {KINDS_OF_ODD[kind]}, not a file; move it away"):
            read(str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="makes pipes")
@pytest.mark.parametrize("kind", KINDS_OF_ODD)
@pytest.mark.parametrize("file", ["model.tokenizer.bin", "model.tokenizer.json", "model.generation_config.json"])
def test_what_is_no_file_beside_a_bin_is_not_passed_over(tmp_path, kind, file):
    path = toy_model(tmp_path, SMALL_MODELS["gqa-tied"])
    in_place_of(tmp_path / file, kind)
    with pytest.raises(TokenizerError, match=f"{file}: is {KINDS_OF_ODD[kind]}, not a file; move it away"):
        formats.open_model(path)


@pytest.mark.skipif(os.name != "posix", reason="makes pipes")
def test_a_pipe_for_the_weights_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="model.safetensors: cannot be read: not a regular file"):
        safetensors_file.read(tmp_path / "model.safetensors")
