"""What a server answers without making a text: tokens of texts, and what the model and its tokenizer are.

Two dialects ask for tokens: vLLM's, which lm-evaluation-harness speaks (prompt, add_special_tokens), and llama.cpp's
(content, add_special). Both are answered alike. No answer names a path of this machine.
"""

from typing import Any

from llamalet.errors import LlamaletError, one_line
from llamalet.serve.api_error import ApiError
from llamalet.serve.json_body import Fields, refuse
from llamalet.serve.served_model import ServedModel


def models(served: ServedModel) -> dict[str, Any]:
    """Return the answer of /v1/models: the model, once for each of its names."""
    return {"object": "list", "data": [model(served, name) for name in served.names]}


def model(served: ServedModel, name: str) -> dict[str, Any]:
    """Return the answer of /v1/models/NAME.

    Raises:
        ApiError: 404, if the model has other names.
    """
    return {
        "id": served.check_name(name),
        "object": "model",
        "created": served.created,
        "owned_by": "llamalet",
        "root": served.names[0],
        "max_model_len": served.context,
    }


def tokenize(body: bytes, served: ServedModel) -> dict[str, Any]:
    """Return the answer of /tokenize: the ids of a text, which may be longer than the context.

    Names of special tokens become these tokens, as with both dialects' servers, unless parse_special is false. BOS is
    put before a prompt, unless add_special_tokens is false, and before content, if add_special is true.

    Raises:
        ApiError: 400, naming the field that is wrong; 404 for another model.
    """
    fields = Fields.read(body)
    served.check_name(fields.text("model"))
    prompt, content = fields.text("prompt"), fields.text("content")
    if (prompt is None) == (content is None):
        raise ApiError(400, "prompt: must be a text (or content, but not both)", param="prompt")
    add_special = fields.flag("add_special", prompt is not None)
    bos = fields.flag("add_special_tokens", add_special)
    text = prompt if content is None else content
    try:
        ids = served.tokenizer.encode(text or "", bos=bos, special=fields.flag("parse_special", True))
    except LlamaletError as error:
        raise ApiError(400, f"the text cannot be tokenized: {one_line(error)}") from None
    return {"tokens": ids, "count": len(ids), "max_model_len": served.context}


def detokenize(body: bytes, served: ServedModel) -> dict[str, Any]:
    """Return the answer of /detokenize: the text of ids, under both dialects' names.

    Special tokens have no text; with skip_special_tokens=false they are written by name.

    Raises:
        ApiError: 400, naming the field that is wrong; 404 for another model.
    """
    fields = Fields.read(body)
    served.check_name(fields.text("model"))
    tokens = fields.take("tokens")
    if not isinstance(tokens, list):
        refuse("tokens", tokens, "a list of token ids")
    ids = served.check_ids("tokens", tokens)
    if fields.flag("skip_special_tokens", True):
        text = served.tokenizer.decode(ids)
    else:
        names = served.special_names
        pieces = [names[id].encode() if id in names else served.token_bytes(id) for id in ids]
        text = b"".join(pieces).decode(errors="replace")
    return {"prompt": text, "content": text}


def tokenizer_info(served: ServedModel) -> dict[str, Any]:
    """Return the answer of /tokenizer_info: what a tokenizer_config.json says, as far as it is known here."""
    tokenizer = served.tokenizer
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return {
        "bos_token": None if bos is None else tokenizer.name_of(bos),
        "bos_token_id": bos,
        "eos_token": None if eos is None else tokenizer.name_of(eos),
        "eos_token_id": eos,
        "add_bos_token": bos is not None and tokenizer.ids.prefix == (bos,),
        "chat_template": getattr(served.template, "source", None),
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": served.context,
    }


def props(served: ServedModel) -> dict[str, Any]:
    """Return the answer of /props: the model's shape and the server's limits, some under llama-server's names."""
    config, limits = served.model.config, served.limits
    return {
        "model": served.names[0],
        "aliases": list(served.names[1:]),
        "build_info": served.fingerprint,
        "dtype": served.model.dtype,
        "kv": served.model.transformer.kv,
        "n_ctx": served.context,
        "n_vocab": config.vocab_size,
        "n_params": config.n_params,
        "config": config.to_dict(),
        "chat": served.template is not None,
        "chat_template": getattr(served.template, "source", None),
        "modalities": {"vision": False, "audio": False},
        "default_generation_settings": {
            "n_ctx": served.context,
            "params": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 16, "seed": -1},
        },
        "limits": {
            "texts": limits.texts,
            "stop_strings": limits.stops,
            "logprobs": limits.logprobs,
            "logit_bias": limits.biases,
        },
    }
