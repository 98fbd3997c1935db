"""Conversations with models that were trained for them.

from llamalet import Chat, Model
chat = Chat(Model.load("Llama-3.2-1B-Instruct.bin"), system="You are a pirate.")
print("".join(chat.say("Where is the treasure?")))

The KV cache holds what the model has read and said, so that only new tokens are read.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from llamalet.chat_template import Message, Template, find_template
from llamalet.checks import checked, file_path, shown
from llamalet.engine import Begun, Ended, Engine, NewToken, Request, check_keep
from llamalet.errors import ConfigError, UsageError
from llamalet.marked_text import Marked, concat, own
from llamalet.runtime import Model
from llamalet.sampler import Sampler, SamplingConfig
from llamalet.tokenizer import StreamDecoder, Tokenizer


class Chat:
    """A conversation.

    Attributes:
        messages: the conversation so far. Added tokens that the model's answers hold are marked (marked_text.py).
        n_read: number of tokens that the model had to read before its last answer.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig | None = None,
        *,
        system: str | None = None,
        template: str | os.PathLike[str] | Template | None = None,
        **options: Any,
    ) -> None:
        """Begin a conversation.

        Args:
            model: a chat model.
            sampling: how the tokens of each answer are chosen and when it ends. With overflow="stop" the conversation
                ends when the context is full; with "roll" the model forgets the older half of it.
            system: instructions for the model.
            template: "llama2", "llama3" or a file with a Jinja template, or what find_template returned; None: the
                model's own.
            options: fields of SamplingConfig, which replace those of `sampling`.

        Raises:
            UsageError: if the model is not a chat model, the template cannot be used, or `keep` leaves nothing to
                forget.
            ConfigError: on an unknown option, or listing every value out of range.
        """
        if not isinstance(model, Model):
            raise UsageError(f"model={shown(model)}: must be a Model, as Model.load returns it")
        system = None if system is None else checked("system", system, str)
        if template is not None and not callable(template):
            template = str(file_path("template", template))
        config = SamplingConfig.create(sampling, options)
        if config.ignore_eos:
            raise ConfigError("ignore_eos: is for stories; in a chat max_new_tokens ends each answer")
        check_keep(config, model.config.max_seq_len)
        self.messages: list[Message] = [] if system is None else [Message("system", system)]
        self.n_read = 0
        self._model = model
        context = model.config.max_seq_len
        self._template = (
            template
            if callable(template)
            else find_template(model.path, model.tokenizer, template, model.chat_template, context=context)
        )
        self._sampling = config
        self._sampler = Sampler(model.config.vocab_size, config, model.undrawn, model.transformer.choose)
        self._cache = model.transformer.new_cache()
        self._seen: list[int] = []  # all tokens that the cache was given, even those it forgot when it rolled

    def say(self, text: str) -> Iterator[str]:
        """Return the model's answer to a message, piece by piece as it is generated.

        Raises:
            UsageError: if there is no room for the message, or the template refuses it; `messages` stay as they were.
        """
        messages = [*self.messages, Message("user", checked("text", text, str))]
        ids, context = self._template(messages), self._model.config.max_seq_len
        if not ids:
            raise UsageError("the chat template makes nothing of the conversation, so there is nothing to answer")
        if self._sampling.overflow == "stop" and len(ids) > context:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, the model's context {context}: overflow=roll forgets the "
                "oldest ones"
            )
        return self._answer(messages, ids)

    def _answer(self, messages: list[Message], ids: list[int]) -> Iterator[str]:
        """Yield the answer to messages with these ids."""
        self.messages = messages
        known = self._forget_all_but(ids)
        self.n_read = len(ids) - known
        engine = Engine(self._model.transformer)
        engine.add(
            Request(
                prompt=ids, sampling=self._sampling, stop_tokens=self._model.stop_tokens, sampler=self._sampler,
                decoder=StreamDecoder(self._model.tokenizer), cache=self._cache, n_known=known,
            )
        )  # fmt: skip
        answer: list[int] = []
        try:
            while engine.busy:
                for event in engine.step():
                    if isinstance(event, NewToken):
                        answer.append(event.token)
                        self._seen = [*ids, *answer[:-1]]  # the newest is given to the model with the next step
                    if isinstance(event, Ended):
                        if event.error is not None:
                            raise event.error
                        if event.reason == "stop":
                            self._seen = [*ids, *answer]
                    if not isinstance(event, Begun) and event.text:
                        yield event.text
        except GeneratorExit:
            raise
        except BaseException:  # the contents of the cache are unknown now
            self._cache, self._seen = self._model.transformer.new_cache(), []
            raise
        finally:  # an answer that breaks off stays in the conversation as far as it went
            self.messages = [*messages, Message("assistant", _with_names(self._model.tokenizer, answer))]

    def _forget_all_but(self, ids: list[int]) -> int:
        """Let the cache hold nothing but the first of these ids; return how many. The last must still be read."""
        known = 0
        for ours, theirs in zip(self._seen, ids[:-1], strict=False):
            if ours != theirs:
                break
            known += 1
        if known < len(self._seen):
            if self._cache.length == len(self._seen):
                self._cache.truncate(known)
            else:  # it has rolled: positions that are needed now are gone
                self._cache, known = self._model.transformer.new_cache(), 0
            self._seen = ids[:known]
        return known


def _with_names(tokenizer: Tokenizer, answer: Sequence[int]) -> Marked:
    """Return the text of an answer, in which the names of added tokens are these tokens when it is read again.

    The model may begin its answer with <think>, one token. The same characters in other tokens remain text.
    """
    text, added = tokenizer.decode(answer), frozenset(tokenizer.added.values())
    decoder, pieces = StreamDecoder(tokenizer), []
    for token in answer:
        piece = decoder.push(token)
        pieces.append(own(piece) if token in added else piece)
    marked: Marked = concat([Marked(), *pieces, decoder.finish()])
    return marked if marked == text else Marked(text)
