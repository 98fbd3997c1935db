"""Prompts and conversations as clients write them -> checked token ids."""

from typing import Any, NamedTuple

from llamalet.chat_template import Message
from llamalet.errors import LlamaletError, one_line
from llamalet.serve.api_error import CONTEXT_LENGTH_EXCEEDED, ApiError
from llamalet.serve.json_body import refuse
from llamalet.serve.served_model import ServedModel
from llamalet.tokenizer import StreamDecoder

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""What OpenAI's roles are called in templates."""

ABOUT_TOOLS = ("tool_calls", "function_call", "audio")
"""Fields of a message whose content a template would have to show."""


class Prompt(NamedTuple):
    """What one or more texts continue."""

    ids: list[int]
    text: str
    """what echo gives back"""
    decoder: StreamDecoder
    """decodes what follows"""


def read_prompts(value: Any, served: ServedModel, *, bos: bool = True) -> list[Prompt]:
    """Return the prompts in the field of that name: a text, a list of texts, of ids, or of lists of ids.

    Args:
        value: the field.
        served: the model.
        bos: whether texts begin with BOS, if the model's do; ids stay as they are. Names of special tokens in a text
            are text.

    Raises:
        ApiError: 400, if there is no prompt, or one is empty, too long, or has an id that the vocabulary lacks.
    """
    if isinstance(value, str):
        return [_from_text("prompt", value, served, bos)]
    if not isinstance(value, list) or not value:
        refuse("prompt", value, "a text, a list of texts, a list of token ids, or a list of such lists")
    if not isinstance(value[0], str | list):
        return [_from_ids("prompt", value, served)]
    if len(value) > served.limits.texts:
        raise ApiError(400, f"prompt: has {len(value)} prompts; at most {served.limits.texts}", param="prompt")
    kind = type(value[0])
    for number, item in enumerate(value):
        if type(item) is not kind:
            refuse(f"prompt[{number}]", item, "a text like the others" if kind is str else "a list like the others")
    if kind is str:
        return [_from_text(f"prompt[{number}]", item, served, bos) for number, item in enumerate(value)]
    return [_from_ids(f"prompt[{number}]", item, served) for number, item in enumerate(value)]


def _from_text(name: str, text: str, served: ServedModel, bos: bool) -> Prompt:
    """Return a prompt given as text."""
    served.check_bytes(name, len(text.encode()))
    try:
        ids = served.tokenizer.encode(text, bos=bos)
    except LlamaletError as error:
        raise ApiError(400, f"{name}: {one_line(error)}", param="prompt") from None
    served.check_length(name, ids)
    decoder = StreamDecoder(served.tokenizer)
    for token in ids:
        decoder.push(token)
    return Prompt(ids, text, decoder)


def _from_ids(name: str, ids: list[Any], served: ServedModel) -> Prompt:
    """Return a prompt given as token ids. Bytes of an unfinished character at its end come with the new text."""
    served.check_length(name, ids)
    found = served.check_ids(name, ids)
    decoder = StreamDecoder(served.tokenizer)
    return Prompt(found, "".join(map(decoder.push, found)), decoder)


def read_messages(value: Any, served: ServedModel) -> Prompt:
    """Return the conversation in the field messages, up to where the model answers.

    Content is a text, or a list of parts that are texts, which are joined by line breaks.

    Raises:
        ApiError: 400, if it is no conversation, is too long, has what the model cannot read, like pictures, or is
            refused by the model's template.
    """
    if not isinstance(value, list) or not value:
        refuse("messages", value, "a list of messages, at least one")
    if len(value) > served.context:  # each takes at least a token
        raise ApiError(
            400, f"messages: has {len(value)} messages; the model's context holds {served.context} tokens",
            param="messages", code=CONTEXT_LENGTH_EXCEEDED,
        )  # fmt: skip
    messages = [_read_message(f"messages[{number}]", item) for number, item in enumerate(value)]
    served.check_bytes("messages", sum(len(message.content.encode()) for message in messages))
    ids = served.render(messages)
    served.check_length("messages", ids)
    return Prompt(ids, "", StreamDecoder(served.tokenizer))


def _read_message(name: str, value: Any) -> Message:
    """Return one message of a conversation."""
    if not isinstance(value, dict):
        refuse(name, value, "an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        refuse(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    for field in ABOUT_TOOLS:
        if value.get(field):
            raise ApiError(400, f"{name}.{field}: is not supported", param="messages", code="unsupported_parameter")
    content = value.get("content")
    if content is None and role == "assistant":  # as clients send back an answer without text
        content = ""
    if isinstance(content, list):
        content = "\n".join(_read_part(f"{name}.content[{number}]", part) for number, part in enumerate(content))
    if not isinstance(content, str):
        refuse(f"{name}.content", content, "a text, or a list of parts of type text")
    return Message(ROLES[role], content)


def _read_part(name: str, value: Any) -> str:
    """Return the text of a part of a message."""
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        refuse(name, value, '{"type": "text", "text": a text}: this model reads nothing else')
    text: str = value["text"]
    return text
