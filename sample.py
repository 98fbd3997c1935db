"""Tell stories with a model, without PyTorch.

Usage:
    python sample.py                                    the newest model under out/, else the demo model
    python sample.py out/model.bin -i "Once upon a time" -t 0.8 -s 7
    python sample.py stories15M.bin -z tokenizer.bin -n 256
    python sample.py out/model.bin --num-samples=64     many stories at once: several times as fast as one by one
    python sample.py out/model.bin --draft=lookup       the same story, faster if it repeats itself
    python sample.py out/model.bin -n 0 --overflow=roll --ignore-eos       without end, until Ctrl-C
    python sample.py Llama-3.2-1B-Instruct.bin -m chat -y "You are a pirate."       a conversation, until Ctrl-D

The text goes to stdout, everything else to stderr. For tamer or wilder texts change the temperature or top-p, not both;
-t 0 always takes the most likely token. With the same -t, -p and -s the tokens are those of llama2.c's run.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

from collections.abc import Iterator, Sequence

from llamalet import cli, console
from llamalet.command import run
from llamalet.engine import make_room
from llamalet.generate import generate_batch, read_tokens
from llamalet.runtime import Model
from llamalet.sampler import Sampler, SamplingConfig


def main(argv: Sequence[str]) -> int:
    """Tell stories, or hold a conversation, as the command line says."""
    options = cli.read_sample_options(argv, "sample.py", __doc__ or "")
    if options.mode == "chat":
        return cli.talk(options)
    model = cli.load(options)  # the weights, the functions that compute with them, and the vocabulary
    ids = model.tokenizer.encode(options.prompt, bos=True)  # text -> token ids
    configs = cli.story_configs(options, ids, model.config.max_seq_len)
    draft = cli.load_draft(options, model)
    if len(configs) == 1 and draft is None:
        events = tell(model, ids, configs[0])
    else:  # the same loop for many stories at once, each of them as it would be alone, or for one with a draft
        events = generate_batch(
            model.transformer, [ids] * len(configs), configs, stop_tokens=model.stop_tokens, undrawn=model.undrawn,
            draft=draft,
        )  # fmt: skip
    console.print_stories(model.tokenizer, ids, [config.seed for config in configs], events, draft)  # ids -> text
    return 0


def tell(model: Model, ids: list[int], config: SamplingConfig) -> Iterator[tuple[int, int | None]]:
    """Yield the tokens that continue a prompt, each as soon as it is known, as generate_batch does for story 0.

    Args:
        model: the model.
        ids: the prompt's tokens, BOS first.
        config: how tokens are chosen and when the story ends.
    """
    sampler = Sampler(model.config.vocab_size, config, model.undrawn)
    stop_tokens = () if config.ignore_eos else model.stop_tokens
    # The cache holds the keys and values of every position so far: each token goes through the model once.
    cache = model.transformer.new_cache()
    logits = read_tokens(model.transformer, cache, ids, config.keep)  # (V,): a score for each possible next token
    n_new = 0
    while (token := sampler.sample(logits)) not in stop_tokens:
        yield 0, token
        n_new += 1
        full = cache.length == cache.context and config.overflow == "stop"
        if full or n_new == config.max_new_tokens:
            break
        make_room(cache, config.keep)
        logits = model.transformer.decode(cache, token)  # (V,)
    yield 0, None


if __name__ == "__main__":
    run(main)
