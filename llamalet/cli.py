"""The command line: `llamalet generate | chat | serve | evaluate | convert`, and the options of sample.py.

Every option can be written --key=value or --key value, with - or _ in its name; a switch --x, --no-x or --x=false. The
short flags are those of llama2.c's run. A mistake ends in one line that names the nearest option, and exit code 2.
"""

import dataclasses
import difflib
import io
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from llamalet import __version__, console
from llamalet.chat import Chat
from llamalet.chat_template import BUILT_IN, Template, find_template, read_named
from llamalet.checks import not_positive
from llamalet.command import nothing_to_lose
from llamalet.config import ModelConfig
from llamalet.convert.formats import Check
from llamalet.drafting import LOOKUP, Draft
from llamalet.engine import check_prompt
from llamalet.errors import ConfigError, DataError, FormatError, UsageError, note
from llamalet.generate import generate_batch
from llamalet.model_options import ModelOptions, choose_model
from llamalet.options import read_options
from llamalet.runtime import Model
from llamalet.sampler import KEEP, SamplingConfig
from llamalet.shards import Shards, find_newest
from llamalet.tokenizer import Tokenizer

OVERVIEW = f"""llamalet {__version__}: small Llama models in Python, without PyTorch

  llamalet generate [MODEL]          tell a story
  llamalet chat [MODEL]              talk to a model that was trained to answer
  llamalet serve [MODEL]             answer over HTTP, with OpenAI's endpoints and a page
  llamalet evaluate MODEL [DATA]     compute the loss and bits per byte of a text
  llamalet convert MODEL OUT         write a .bin, a .gguf or a Hugging Face folder

Examples:
  llamalet generate -i "Once upon a time" -t 0.8 -s 7       the newest .bin under out/, else the demo model
  llamalet generate stories15M.bin -z tokenizer.bin
  llamalet chat Llama-3.2-1B-Instruct.bin -y "You are a pirate."
  llamalet serve out/model.bin --port=8080
  llamalet evaluate out/model.bin story.txt
  llamalet convert out/model.bin small.bin --dtype=q8

Each command explains its options with --help."""

DEFAULT_STEPS = 256
MAX_STORIES = 100_000

# Other spellings of options, most of them llama2.c's.
ALIASES = {
    "model": "--checkpoint", "prompt": "-i", "tokenizer": "-z", "temperature": "-t", "top_p": "-p", "seed": "-s",
    "steps": "-n", "mode": "-m", "system_prompt": "-y", "source_format": "--from",
}  # fmt: skip
STORY_OPTIONS: dict[str, Any] = {"steps": None, "draft": None, "num_samples": 1, "ignore_eos": False}  # and defaults
CHAT_OPTIONS: dict[str, Any] = {"system_prompt": None, "chat_template": None}


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingConfig, ModelOptions):
    """What to tell."""

    model: str | None = None
    """the model's file or folder, also as the first word; if not given, the newest .bin under out/, else the demo
    model"""
    prompt: str = ""
    """the beginning of the story or the first message; - reads it from stdin"""
    steps: int | None = None
    """end at this many positions, prompt included (256, unless there is --max-new-tokens); 0 ends where the context
    does, or never if that rolls"""
    draft: str | None = None
    """propose tokens for more speed, the same text: a smaller model of the same vocabulary, or lookup, which proposes
    what followed when the text had its newest tokens before"""
    num_samples: int = 1
    """number of stories, up to 64 at once; each has its own seed, one more than the last"""
    mode: Literal["generate", "chat"] = "generate"
    """generate continues the prompt; chat is for models that were trained to answer, one message a line"""
    system_prompt: str | None = field(default=None, metadata={"may_be_empty": True})
    """instructions for a chat model"""
    chat_template: str | None = None
    """llama2, llama3, or a file with a Jinja template; the model's own if not given"""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = []
        try:
            super().__post_init__()
        except ConfigError as error:
            problems.append(str(error))
        if self.steps is not None and self.max_new_tokens is not None:
            problems.append("-n counts the prompt and --max-new-tokens does not: give one of them")
        if self.steps is not None and self.steps < 0:
            problems.append(f"steps={self.steps}: must not be negative (0 continues to the end of the context)")
        if self.keep != KEEP and self.overflow != "roll":
            problems.append(f"keep={self.keep}: says what a rolling context keeps; give --overflow=roll too")
        if self.mode == "chat":
            others, why = STORY_OPTIONS, "is for stories; in a chat --max-new-tokens ends each answer"
        else:
            others, why = CHAT_OPTIONS, "is for chats; use llamalet chat, or add -m chat to sample.py"
        problems += [f"{name}: {why}" for name, default in others.items() if getattr(self, name) != default]
        if self.draft is not None and self.num_samples > 1:
            problems.append(f"num_samples={self.num_samples}: a draft is for a single story")
        if self.num_samples > MAX_STORIES:
            problems.append(f"num_samples={self.num_samples}: must be at most {MAX_STORIES}")
        if self.num_samples > 1 and self.steps == 0 and self.overflow == "roll" and self.ignore_eos:
            problems.append(f"num_samples={self.num_samples}: the first story would never end; give -n a number")
        problems += not_positive(self, "max_new_tokens", "num_samples", "threads")
        ConfigError.raise_for(problems)

    @property
    def sampling(self) -> SamplingConfig:
        """The sampler's part of the options."""
        return SamplingConfig(**{field.name: getattr(self, field.name) for field in fields(SamplingConfig)})


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """What to score."""

    model: str | None = None
    """the model's file or folder, also as the first word"""
    data: str | None = None
    """a text file, or a folder of prepared data, also as the second word; the newest below data/ if not given"""
    split: Literal["train", "val"] | None = None
    """the stories of prepared data to score; val if not given"""
    max_tokens: int | None = None
    """score about this many tokens instead of all"""
    windows: bool = False
    """cut the text into windows of the context, not into stories"""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to write."""

    model: str | None = None
    """the model's file or folder, also as the first word"""
    out: str | None = None
    """the file or folder to write, also as the second word"""
    format: str | None = None
    """bin, gguf, or hf (a Hugging Face folder); what the ending of OUT says if not given"""
    version: int | None = None
    """version of the .bin, 0 to 3; by default 1 for float32, else 3"""
    dtype: str | None = None
    """type of the weights; in a .bin f32, bf16, q8 or q4, by default as wide as they are; in an hf f32 or bf16; in a
    gguf f32, f16, q8_0 or q4_0"""
    source_format: Literal["checkpoint", "hf", "meta_llama", "llama2c", "gguf", "bin"] | None = None
    """of MODEL; what its files say if not given. hf also takes the ID
    of a repository on the Hub, and fetches it"""
    tokenizer: str | None = None
    """the tokenizer's file; the model's own if not given"""
    no_tokenizer: bool = False
    """write no tokenizer, where the model's own cannot be read or cannot be written in the format"""
    rope_theta: float | None = None
    """for llama2.c's files, which do not say; Llama 3's is 500000"""
    rope_scaling: float | None = None
    """the factor of the RoPE scaling, for the same files: 8 for Llama 3.1 and 3.3, 32 for the 1B and 3B of 3.2"""
    force: bool = False
    """write version 0 even if it loses the norm_eps"""
    check: bool = True
    """read a .gguf or a folder back and compare; --no-check skips this"""


def main(argv: Sequence[str]) -> int:
    """Run one of llamalet's commands; without any, print what there is."""
    commands = {"generate": generate, "chat": chat, "serve": serve, "evaluate": evaluate, "convert": convert}
    if not argv or argv[0] in ("-h", "--help"):
        print(OVERVIEW)
        return 0
    if argv[0] == "--version":
        print(f"llamalet {__version__}")
        return 0
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1, cutoff=0.5)
        hint = f"did you mean llamalet {near[0]}?" if near else f"must be one of {', '.join(commands)}"
        raise UsageError(f"unknown command '{argv[0]}'; {hint}")
    return commands[argv[0]](argv[1:])


# --- generate and chat ---


def _is_number(word: str) -> bool:
    """Return whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_sample_options(argv: Sequence[str], program: str, description: str, **fixed: Any) -> SampleOptions:
    """Return the options of sample.py, or with a fixed mode those of llamalet generate and llamalet chat.

    Raises:
        UsageError: see options.read_options; or if the prompt comes from stdin and is not text.
        ConfigError: listing every value out of range and every option that the mode does not have.
    """
    for word, value in zip(argv, argv[1:], strict=False):
        if word == "-p" and not _is_number(value):  # llama.cpp's -p
            raise UsageError(f"-p '{value}': -p is top-p, a number, as in llama2.c; the prompt is -i")
    hidden = {None: {}, "generate": CHAT_OPTIONS, "chat": STORY_OPTIONS}[fixed.get("mode")]
    options = read_options(
        SampleOptions, argv, program=program, description=description, positional=("model",), aliases=ALIASES,
        hidden=hidden, **fixed,
    )  # fmt: skip
    for standard in (sys.stdin, sys.stdout):
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(encoding="utf-8")
    return dataclasses.replace(options, prompt=console.read_stdin()) if options.prompt == "-" else options


def load(options: SampleOptions, check: Check | None = None) -> Model:
    """Open the model that the options name, else the newest .bin under out/, else the demo model; say which."""
    path = Path(options.model) if options.model is not None else choose_model()
    start = time.perf_counter()
    model = options.load(path, check)
    load_s = time.perf_counter() - start
    size = f"{model.config.n_params / 1e6:.2f}M parameters"
    note(f"model {model.path}: {size}, {model.dtype}, loaded in {load_s:.2f} s")
    return model


def load_draft(options: SampleOptions, model: Model) -> Draft | None:
    """Return what proposes tokens to the model, as the options say; say which model that is."""
    if options.draft in (None, LOOKUP):
        return model.new_draft(options.draft)
    with nothing_to_lose():
        small = model.open_draft(options.draft)
    note(f"draft {small.path}: {small.config.n_params / 1e6:.2f}M parameters, {small.dtype}")
    return model.new_draft(small)


def story_configs(options: SampleOptions, prompt: Sequence[int], context: int) -> list[SamplingConfig]:
    """Return the settings of each story: its own seed, and -n as a number of new tokens.

    Args:
        options: those of the command line.
        prompt: its ids, BOS included.
        context: number of positions of the model's context.

    Raises:
        UsageError: if the prompt is too long for -n or for the context.
    """
    sampling, n_prompt = options.sampling, len(prompt)
    steps = DEFAULT_STEPS if options.steps is None else options.steps
    if sampling.max_new_tokens is None and steps:
        # llama2.c counts passes through the model, and the pass over the last prompt token already gives a new one.
        if steps < n_prompt:
            raise UsageError(
                f"the prompt has {n_prompt} tokens, more than the {steps} positions of -n; give a larger -n, or "
                "--max-new-tokens"
            )
        sampling = dataclasses.replace(sampling, max_new_tokens=steps - n_prompt + 1)
    check_prompt(prompt, sampling, context)
    room = context - n_prompt + 1
    if sampling.overflow == "stop" and sampling.max_new_tokens is not None and sampling.max_new_tokens > room:
        note(f"the context has room for {room} new tokens; to continue after them, give --overflow=roll")
    return sampling.for_texts(options.num_samples)


def talk(options: SampleOptions) -> int:
    """Hold a conversation with the model that the options name, at the terminal; return the exit code."""
    templates: list[Template] = []

    def find(path: Path, config: ModelConfig, tokenizer: Tokenizer, inside: str | None) -> None:
        context = config.max_seq_len
        templates.append(find_template(path, tokenizer, options.chat_template, inside, context=context))

    if options.chat_template is not None and options.chat_template not in BUILT_IN:
        read_named(Path(options.chat_template))  # before the model
    model = load(options, find)
    (sampling,) = options.sampling.for_texts(1)
    chat = Chat(model, sampling, system=options.system_prompt, template=templates[0])
    return console.converse(chat, options.prompt, sampling.seed)


def generate(argv: Sequence[str]) -> int:
    """Tell stories as the command line says."""
    options = read_sample_options(argv, "llamalet generate", "Tell a story, or many at once.", mode="generate")
    model = load(options)
    ids = model.tokenizer.encode(options.prompt, bos=True)
    configs, draft = story_configs(options, ids, model.config.max_seq_len), load_draft(options, model)
    events = generate_batch(
        model.transformer, [ids] * len(configs), configs, stop_tokens=model.stop_tokens, undrawn=model.undrawn,
        draft=draft,
    )  # fmt: skip
    console.print_stories(model.tokenizer, ids, [config.seed for config in configs], events, draft)
    return 0


def chat(argv: Sequence[str]) -> int:
    """Talk to a model as the command line says."""
    description = "Talk to a model that was trained to answer: each line is a message, until Ctrl-D."
    options = read_sample_options(argv, "llamalet chat", description, mode="chat")
    return talk(options)


def serve(argv: Sequence[str]) -> int:
    """Serve a model over HTTP as the command line says."""
    from llamalet.serve import command

    return command.main(argv)


# --- evaluate and convert ---


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a model as the command line says."""
    from llamalet.evaluate import evaluate_shards, evaluate_text

    description = "Loss and bits per byte of a model on a text file or on prepared data."
    options = read_options(
        EvaluateOptions, argv, program="llamalet evaluate", description=description, positional=("model", "data"),
        aliases=ALIASES,
    )  # fmt: skip
    if not options.model:
        raise UsageError("name a model; see --help")
    for problem in not_positive(options, "max_tokens", "threads"):
        raise UsageError(f"{problem}; see --help")
    data = Path(options.data) if options.data is not None else find_newest()
    if data is None:
        raise DataError("no prepared data below data/; name a text file, or a folder made by tinystories.py")
    if not options.data and options.data is not None or not data.exists():
        raise DataError(f"{options.data!r}: no such text file or folder of prepared data")
    if not data.is_dir():
        if options.split is not None:
            raise ConfigError(f"split={options.split}: only prepared data has splits, and {data} is a text")
        model = options.load(options.model)
        print(f"{model.path} on {data}", flush=True)
        print(evaluate_text(model, data, windows=options.windows, max_tokens=options.max_tokens))
        return 0
    if options.tokenizer is not None:
        raise ConfigError(f"tokenizer={options.tokenizer}: is for a text; prepared data brings its own")
    shards, split = Shards.open(data), options.split or "val"
    model = dataclasses.replace(options, tokenizer=str(shards.tokenizer_path)).load(options.model)
    print(f"{model.path} on the {split} split of {shards.folder}", flush=True)
    print(evaluate_shards(model, shards, split, windows=options.windows, max_tokens=options.max_tokens))
    return 0


def convert(argv: Sequence[str]) -> int:
    """Write a model in another format; return FormatError's code if the file read back differs."""
    with nothing_to_lose():
        from llamalet.convert import formats
        from llamalet.convert.target import Target, read_back, with_tokenizer, write

    description = (
        "Write any model as a .bin, a .gguf or a Hugging Face folder, with its tokenizer. OUT ends in .bin or .gguf, "
        "or is a folder.\nThe result is read back and compared."
    )
    options = read_options(
        ConvertOptions, argv, program="llamalet convert", description=description, positional=("model", "out"),
        aliases=ALIASES,
    )  # fmt: skip
    if not options.model or options.out is None:
        raise UsageError("name the model and the file or folder to write; see --help")
    target = Target(
        out=options.out, named_format=options.format, named_version=options.version, dtype=options.dtype,
        without_tokenizer=options.no_tokenizer,
    )  # fmt: skip
    target.check_writable()
    kind = options.source_format or formats.kind_of(Path(options.model))
    source = formats.read(kind, options.model, rope_theta=options.rope_theta, rope_scaling=options.rope_scaling)
    path, keep = Path(options.out), None if options.tokenizer is None else Path(options.tokenizer)
    source = with_tokenizer(source, target, keep)
    is_free = options.version == 3 or options.version is None and source.dtype != "f32"
    if target.format == "bin" and options.dtype is None and is_free:
        target = dataclasses.replace(target, dtype=source.dtype)  # the weights keep their width
    write(source, target, path, keep=keep, force=options.force)
    if target.format != "bin" and options.check and not read_back(source, target, path):
        return FormatError.exit_code
    print(f"run it: llamalet generate {shlex.quote(str(path))}{'' if source.tokenizer else ' -z TOKENIZER'}")
    return 0
