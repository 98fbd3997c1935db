"""Stories with and without drafts, from trained models: random ones agree on nothing, so they show no drafts' speed.

Plain generation and every draft take turns, text by text, and each text must be the same with and without.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product

from benchmarks.report import ANY_DTYPE, DRAFT_MODEL, DRAFTS, LOOKUP, PLAIN, Key, Results, kept_of
from llamalet import Model
from llamalet.drafting import Draft, Lookup
from llamalet.errors import ConfigError, DataError, note
from llamalet.generate import generate_batch
from llamalet.sampler import SamplingConfig
from llamalet.shards import Shards

N_PROMPTS = 50
NEW_TOKENS = 250
TEMPERATURES = (0.0, 1.0)
TOP_P = 0.9
SETTINGS = {"prompts": N_PROMPTS, "new_tokens": NEW_TOKENS, "temperatures": TEMPERATURES, "top_p": TOP_P}

# A prompt has this many tokens of a story. One that repeats has a passage of a story three times and begins it again.
PROMPT_TOKENS = 24
PASSAGE_TOKENS, PASSAGES, BEGUN_TOKENS = 32, 3, 8

NAMES = ("Lily", "Tom", "Mia", "Ben", "Anna", "Max", "Sara", "Sam", "Lucy", "Tim")
OPENINGS = (
    "Once upon a time, there was a little child named {}. {} loved to play outside in the sun with a big red ball.",
    "One day, {} went to the park with Mom and Dad. It was a sunny day, and {} wanted to see the ducks in the pond.",
    "{} had a small dog. Every morning, {} and the dog ran to the old tree in the garden and looked for birds.",
    "It was a cold day, and {} was sad. The snow was high, so {} could not go out and play with the other children.",
    "{} found a shiny stone near the river. {} did not know where it came from, so the next day they asked a wise owl.",
)


def measure(target: str | None, draft: str | None, data: str | None, threads: int, results: Results) -> None:
    """Generate all texts with and without drafts; record the tokens/s, and the shares of proposals that were kept.

    Args:
        target: path of the model that writes; without it nothing is measured, and that is recorded.
        draft: path of the smaller model; without it only lookup drafts.
        data: folder of prepared data, whose stories begin the texts; None takes OPENINGS.
        threads: number of threads.
        results: what it is recorded in.

    Raises:
        AssertionError: if a text with a draft is another than without.
        LlamaletError: if a model or the data cannot be read, or do not fit each other.
    """
    if target is None:
        results.missing[Key(DRAFTS, ANY_DTYPE, PLAIN)] = "drafts need trained models: --draft-target=PATH --draft=PATH"
        return
    model = Model.load(target, threads=threads)
    drafts: dict[str, Draft] = {LOOKUP: Lookup()}
    if draft is None:
        results.missing[Key(DRAFTS, ANY_DTYPE, DRAFT_MODEL)] = "no draft model: --draft=PATH"
    elif (small := model.new_draft(draft)) is not None:
        drafts[DRAFT_MODEL] = small
    stories = [story for story, _ in zip(story_tokens(model, data), range(N_PROMPTS), strict=False)]
    texts = {
        "stories": ([story[:PROMPT_TOKENS] for story in stories], drafts),
        "repeats": ([repeating(story) for story in stories], {LOOKUP: drafts[LOOKUP]}),
    }
    for (kind, (prompts, used)), temperature in product(texts.items(), TEMPERATURES):
        note(f"{DRAFTS}: {len(prompts)} texts of {kind}, temperature {temperature:g}")
        figure = f"{kind}, T={temperature:g}"
        for contender, rate, kept in measure_texts(model, prompts, used, temperature):
            results.add(Key(DRAFTS, ANY_DTYPE, figure, contender), rate)
            if contender != PLAIN:
                results.add(Key(DRAFTS, ANY_DTYPE, kept_of(figure), contender), kept)


def measure_texts(
    model: Model, prompts: Sequence[list[int]], drafts: Mapping[str, Draft], temperature: float
) -> Iterator[tuple[str, float, float]]:
    """Yield (contender, tokens/s, share of proposals kept) over all prompts, plain generation first."""
    contenders: dict[str, Draft | None] = {PLAIN: None, **drafts}
    proposed, kept = Counter[str](), Counter[str]()
    seconds, n_tokens = dict.fromkeys(contenders, 0.0), 0
    for draft in contenders.values():  # what is compiled or allocated at first use
        generate(model, prompts[0], draft, temperature, 1)
    for number, prompt in enumerate(prompts):
        plain: list[int] = []
        for contender, draft in contenders.items():
            start = time.perf_counter()
            text = generate(model, prompt, draft, temperature, seed=number + 1)
            seconds[contender] += time.perf_counter() - start
            if draft is None:
                plain = text
                n_tokens += len(text)
            else:
                proposed[contender] += draft.proposed
                kept[contender] += draft.kept
            if text != plain:
                raise AssertionError(f"text {number} at temperature {temperature:g} is another with {contender}")
    for contender in contenders:
        yield contender, n_tokens / seconds[contender], kept[contender] / max(1, proposed[contender])


def generate(model: Model, prompt: list[int], draft: Draft | None, temperature: float, seed: int) -> list[int]:
    """Return the tokens after a prompt: NEW_TOKENS, past the ends of stories, or fewer if the context is full."""
    config = SamplingConfig(temperature=temperature, top_p=TOP_P, seed=seed, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    events = generate_batch(model.transformer, [prompt], [config], undrawn=model.undrawn, draft=draft)
    return [token for _, token in events if token is not None]


# -- prompts ----------------------------------------------------------------------------------------------------------


def story_tokens(model: Model, folder: str | None) -> Iterator[list[int]]:
    """Yield the tokens of stories of the data, each of at least a passage, or of OPENINGS; the first token is BOS.

    Raises:
        ConfigError: if the data in the folder have another vocabulary than the model.
        DataError: if there are no data, or too few long stories for N_PROMPTS.
    """
    if folder is None:
        for name, opening in product(NAMES, OPENINGS):
            yield model.tokenizer.encode(opening.format(name, name), bos=True)
        return
    data = Shards.open(folder)
    if data.tokenizer_sha256 != model.tokenizer.sha256:
        raise ConfigError(f"draft_data={folder}: has another vocabulary than {model.path}")
    tokens, starts = data.split("val"), data.document_starts("val")
    n_found = 0
    for begin, end in pairwise([*starts.tolist(), len(tokens)]):
        if end - begin > PASSAGE_TOKENS:
            yield tokens[begin:end].tolist()
            n_found += 1
    if n_found < N_PROMPTS:
        raise DataError(f"draft_data={folder}: {n_found} stories of over {PASSAGE_TOKENS} tokens, need {N_PROMPTS}")


def repeating(story: list[int]) -> list[int]:
    """Return BOS and a passage that comes PASSAGES times and then begins again."""
    bos, passage = story[:1], story[1 : PASSAGE_TOKENS + 1]
    return bos + PASSAGES * passage + passage[:BEGUN_TOKENS]
