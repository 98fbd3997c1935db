"""The command line: `llamalet generate | chat | evaluate | convert`, and the options of sample.py.

Every option can be written --key=value or --key value, with - or _ in its name; a switch --x, --no-x or --x=false. The
short flags are those of llama2.c's run. A mistake ends in one line that names the nearest option, and exit code 2.
"""

import argparse
import dataclasses
import difflib
import io
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from llamalet import __version__, console
from llamalet.chat import Chat
from llamalet.errors import ConfigError, DataError, FormatError, Parser, UsageError, run
from llamalet.generate import check_prompt, generate_batch
from llamalet.runtime import BACKENDS, Model
from llamalet.sampler import KEEP, SamplingConfig
from llamalet.shards import SPLITS, Shards, find_newest

OVERVIEW = f"""llamalet {__version__}: small Llama models in Python, without PyTorch

  llamalet generate [MODEL]          tell a story
  llamalet chat [MODEL]              talk to a model that was trained to answer
  llamalet evaluate MODEL [DATA]     compute the loss and bits per byte of a text
  llamalet convert MODEL OUT         write a .bin, a .gguf or a Hugging Face folder

Examples:
  llamalet generate -i "Once upon a time" -t 0.8 -s 7       the newest .bin under out/, else the demo model
  llamalet generate stories15M.bin -z tokenizer.bin
  llamalet chat Llama-3.2-1B-Instruct.bin -y "You are a pirate."
  llamalet evaluate out/model.bin story.txt
  llamalet convert out/model.bin small.bin --dtype=q8

Each command explains its options with --help."""

OUT = Path("out")
DEMO_MODEL = Path(__file__).parent / "assets" / "demo.bin"
DEFAULT_STEPS = 256
MAX_STORIES = 100_000

SHORT_FLAGS = {"temperature": "-t", "top_p": "-p", "seed": "-s"}  # of SamplingConfig's fields
STORY_OPTIONS = ("ignore_eos",)  # of them

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def run_main() -> None:
    """Run the command `llamalet` and exit; pip makes it from this."""
    run(main)


def main(argv: Sequence[str]) -> int:
    """Run one of llamalet's commands; without any, print what there is."""
    commands = {"generate": generate, "chat": chat, "evaluate": evaluate, "convert": convert}
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


class Options(Parser):
    """A parser of one command's options in all their spellings."""

    def __init__(self, program: str, description: str, words: Mapping[str, str]) -> None:
        """Begin without options.

        Args:
            program: what the user types for it.
            description: printed by --help, above the options.
            words: the options that bare words fill, in this order: name in the usage line -> flag.
        """
        self._actions_by_flag: dict[str, argparse.Action] = {}
        self._word_flags = list(words.values())
        super().__init__(
            prog=program, usage=" ".join([program, *(f"[{name}]" for name in words), "[--option=value ...]"]),
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def add(self, *flags: str, help: str, group: Any = None, type: Any = str, **details: Any) -> None:
        """Add an option, in its group; a `type` of bool makes it a switch, and its default shows in the help."""
        if details.get("default") not in (None, False, "", argparse.SUPPRESS) and help != argparse.SUPPRESS:
            help = f"{help} ({details['default']})"
        if type is bool:
            details |= {"nargs": "?", "metavar": "BOOL"}
        elif "choices" not in details:
            details.setdefault("metavar", {int: "INT", float: "FLOAT", _positive: "INT"}.get(type, "TEXT"))
        reader = _truth if type is bool else type
        action = (group or self).add_argument(*flags, type=reader, help=help.replace("%", "%%"), **details)
        self._actions_by_flag |= dict.fromkeys(flags, action)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the options' values; --help prints the options and exits.

        Raises:
            UsageError: on an unknown option, a stray word, a missing or unreadable value, or a word that is not text.
        """
        if any(word in ("-h", "--help") for word in argv):
            self.parse_args(["--help"])
        words, word_flags, spelled = list(argv), list(self._word_flags), []
        while words:
            word = words.pop(0)
            if word.startswith("-") and word != "-":
                action, value = self._read_option(word, words)
            elif word_flags:
                action, value = self._actions_by_flag[word_flags.pop(0)], word
            else:
                raise UsageError(f"unexpected argument '{word}'; options start with --, see --help")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise UsageError(f"{action.dest}={value!a}: not valid UTF-8")
            spelled.append(f"{action.option_strings[-1]}={value}")
        return self.parse_args(spelled)

    def _read_option(self, word: str, following: list[str]) -> tuple[argparse.Action, str]:
        """Return an option and its value, which may be the next of the following words; that is then removed."""
        flag, equals, value = word.partition("=")
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        negated = self._actions_by_flag.get("--" + name.removeprefix("--no-"))
        action = self._actions_by_flag.get(name)
        if action is None and negated is not None and negated.type is _truth and not equals:
            return negated, "false"
        if action is None:
            names = {name.lstrip("-"): name for name in self._actions_by_flag if name.startswith("--")}
            near = difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=0.5)
            raise UsageError(f"unknown option {flag}; {f'did you mean {names[near[0]]}?' if near else 'see --help'}")
        if equals:
            return action, value
        if action.type is _truth:
            return action, following.pop(0) if following and following[0].lower() in TRUTH else "true"
        if not following or following[0].startswith("--"):
            raise UsageError(f"{word}: needs a value, as in {word}=VALUE")
        return action, following.pop(0)


def _truth(word: str) -> bool:
    """Read the value of a switch."""
    if word.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{word}: must be true or false")
    return TRUTH[word.lower()]


def _positive(word: str) -> int:
    """Read an integer of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be a positive integer")
    return int(word)


def _add_model_options(options: Options) -> None:
    """Add what Model.load takes beside the model."""
    group = options.add_argument_group("how the model runs")
    options.add("-z", "--tokenizer", group=group, help="the tokenizer's file (the one inside the model or beside it)")
    options.add("--threads", type=_positive, group=group, help="number of threads (one for each physical core)")
    options.add(
        "--backend", choices=BACKENDS, default=BACKENDS[0], group=group, help="numpy is slow, needs no compiler"
    )
    options.add(
        "--verify", type=bool, group=group, help="verify the checksum of a large file too; small ones always are"
    )


# --- generate and chat ---


def read_sample_options(
    argv: Sequence[str], program: str, description: str, mode: str | None = None
) -> argparse.Namespace:
    """Return the options for stories and conversations, checked, with their SamplingConfig as `sampling`.

    Args:
        argv: the words of the command line.
        program: what the user types for it.
        description: printed by --help.
        mode: generate or chat; None: the user chooses with -m.

    Raises:
        UsageError: see Options.read.
        ConfigError: listing every value out of range and every option that the mode does not have.
    """
    for word, value in zip(argv, argv[1:], strict=False):
        if word == "-p" and not _is_number(value):  # llama.cpp's -p
            raise UsageError(f"-p '{value}': -p is top-p, a number, as in llama2.c; the prompt is -i")
    options = Options(program, description, {"MODEL": "--checkpoint"})
    options.add(
        "--checkpoint", metavar="MODEL",
        help="the model's file or folder, also as the first word (the newest .bin under out/, else the demo model)",
    )  # fmt: skip
    if mode is None:
        options.add(
            "-m", "--mode", choices=("generate", "chat"), default="generate",
            help="generate continues the prompt; chat is for models that were trained to answer, one line a message",
        )  # fmt: skip
    options.add(
        "-i", "--prompt", default="", help="the beginning of the story or the first message; - reads it from stdin"
    )
    groups = {
        "sampling": options.add_argument_group("how tokens are chosen"),
        "generate": options.add_argument_group("stories"),
        "chat": options.add_argument_group("conversations"),
    }

    def add(of: str, *flags: str, help: str, **details: Any) -> None:
        """Add an option; one of the other mode is known, for its error message, but not listed."""
        listed = mode is None or of in ("sampling", mode)
        options.add(*flags, group=groups[of], help=help if listed else argparse.SUPPRESS, **details)

    types = typing.get_type_hints(SamplingConfig)
    for field in dataclasses.fields(SamplingConfig):
        flags = [*([SHORT_FLAGS[field.name]] if field.name in SHORT_FLAGS else []), "--" + field.name.replace("_", "-")]
        help = field.metadata["help"] + (f" ({field.default})" if field.default not in (None, False) else "")
        of = "generate" if field.name in STORY_OPTIONS else "sampling"
        value_type = next(
            (t for t in (bool, int, float) if t in (types[field.name], *get_args(types[field.name]))), str
        )
        details = {"type": value_type} if value_type is not str else {"choices": get_args(types[field.name])}
        add(of, *flags, help=help, default=argparse.SUPPRESS, **details)
    add(
        "generate", "-n", "--steps", type=int,
        help=f"end at this many positions, prompt included ({DEFAULT_STEPS}, unless there is --max-new-tokens); 0: at "
        "the end of the context, or never if that rolls",
    )  # fmt: skip
    add(
        "generate", "--num-samples", type=int, default=1,
        help="number of stories, up to 64 at once; each has its own seed, one more than the last",
    )  # fmt: skip
    add("chat", "-y", "--system-prompt", help="instructions for the model")
    add("chat", "--chat-template", help="llama2, llama3, or a file with a Jinja template (the model's own)")
    _add_model_options(options)
    args = options.read(argv)
    args.mode = mode or args.mode
    _check(args, "add -m chat" if mode is None else "use llamalet chat")
    for standard in (sys.stdin, sys.stdout):
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(encoding="utf-8")
    if args.prompt == "-":
        args.prompt = console.read_stdin()
    return args


def _is_number(word: str) -> bool:
    """Return whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check(args: argparse.Namespace, how_to_chat: str) -> None:
    """Build the SamplingConfig; raise one ConfigError that lists all problems."""
    given = {f.name: vars(args)[f.name] for f in dataclasses.fields(SamplingConfig) if f.name in args}
    problems = []
    try:
        args.sampling = SamplingConfig.create(None, given)
    except ConfigError as error:
        problems.append(str(error))
    steps, n_new = args.steps, given.get("max_new_tokens")
    if steps is not None and n_new is not None:
        problems.append("-n counts the prompt and --max-new-tokens does not: give one of them")
    if steps is not None and steps < 0:
        problems.append(f"steps={steps}: must not be negative (0 continues to the end of the context)")
    rolls = given.get("overflow") == "roll"
    if given.get("keep", KEEP) != KEEP and not rolls:
        problems.append(f"keep={given['keep']}: says what a rolling context keeps; give --overflow=roll too")
    if args.mode == "chat":
        why = "is for stories; in a chat --max-new-tokens ends each answer"
        others = {"steps": steps, "num_samples": args.num_samples != 1, "ignore_eos": given.get("ignore_eos")}
    else:
        why = f"is for chats; {how_to_chat}"
        others = {"system_prompt": args.system_prompt, "chat_template": args.chat_template}
    problems += [f"{name}: {why}" for name, value in others.items() if value is not None and value is not False]
    if not 1 <= args.num_samples <= MAX_STORIES:
        problems.append(f"num_samples={args.num_samples}: must be between 1 and {MAX_STORIES}")
    if args.num_samples > 1 and steps == 0 and rolls and given.get("ignore_eos"):
        problems.append(f"num_samples={args.num_samples}: the first story would never end; give -n a number")
    if n_new == 0:
        problems.append("max_new_tokens=0: must be positive")
    if args.checkpoint == "":
        problems.append("checkpoint='': must name a model")
    if problems:
        raise ConfigError.from_problems(problems)


def load(args: argparse.Namespace) -> Model:
    """Open the model that the options name, else the newest .bin under out/, else the demo model; say which."""
    path = Path(args.checkpoint) if args.checkpoint is not None else _choose_model()
    start = time.perf_counter()
    model = Model.load(path, tokenizer=args.tokenizer, backend=args.backend, threads=args.threads, verify=args.verify)
    load_s = time.perf_counter() - start
    console.note(
        f"model {model.path}: {model.config.n_params / 1e6:.2f}M parameters, {model.dtype}, loaded in {load_s:.2f} s"
    )
    return model


def _choose_model() -> Path:
    """Return the newest .bin under out/, or the demo model if there is none."""
    found = [path for path in OUT.rglob("*.bin") if not path.name.endswith(".tokenizer.bin")]
    if not found:
        console.note(f"no model named and no .bin under {OUT}/: taking the demo model {DEMO_MODEL}")
        return DEMO_MODEL
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))
    console.note(f"no model named: taking the newest under {OUT}/, {newest} of {made}")
    return newest


def story_configs(args: argparse.Namespace, prompt: Sequence[int], context: int) -> list[SamplingConfig]:
    """Return the settings of each story: its own seed, and -n as a number of new tokens.

    Args:
        args: the options.
        prompt: its ids, BOS included.
        context: number of positions of the model's context.

    Raises:
        UsageError: if the prompt is too long for -n or for the context.
    """
    sampling: SamplingConfig = args.sampling
    n_prompt = len(prompt)
    steps = DEFAULT_STEPS if args.steps is None else args.steps
    if sampling.max_new_tokens is None and steps:
        # llama2.c counts passes through the model, and the pass over the last prompt token already gives a new one.
        if steps < n_prompt:
            raise UsageError(
                f"the prompt takes {n_prompt} of the {steps} positions; give a larger -n, or --max-new-tokens"
            )
        sampling = dataclasses.replace(sampling, max_new_tokens=steps - n_prompt + 1)
    check_prompt(prompt, sampling, context)
    room = context - n_prompt + 1
    if sampling.overflow == "stop" and sampling.max_new_tokens is not None and sampling.max_new_tokens > room:
        console.note(f"the context has room for {room} new tokens; to continue after them, give --overflow=roll")
    return sampling.for_texts(args.num_samples)


def talk(model: Model, args: argparse.Namespace) -> None:
    """Hold a conversation at the terminal."""
    (sampling,) = args.sampling.for_texts(1)
    chat = Chat(model, sampling, system=args.system_prompt, template=args.chat_template)
    console.converse(chat, args.prompt, sampling.seed)


def generate(argv: Sequence[str]) -> int:
    """Tell stories as the command line says."""
    args = read_sample_options(argv, "llamalet generate", "Tell a story, or many at once.", "generate")
    model = load(args)
    ids = model.tokenizer.encode(args.prompt, bos=True)
    configs = story_configs(args, ids, model.config.max_seq_len)
    events = generate_batch(model.transformer, [ids] * len(configs), configs, stop_tokens=model.stop_tokens)
    console.print_stories(model.tokenizer, ids, [config.seed for config in configs], events)
    return 0


def chat(argv: Sequence[str]) -> int:
    """Talk to a model as the command line says."""
    description = "Talk to a model that was trained to answer: each line is a message, until Ctrl-D."
    args = read_sample_options(argv, "llamalet chat", description, "chat")
    talk(load(args), args)
    return 0


# --- evaluate ---


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a model as the command line says."""
    from llamalet.evaluate import evaluate_shards, evaluate_text

    description = "Loss and bits per byte of a model on a text file or on prepared data."
    options = Options("llamalet evaluate", description, {"MODEL": "--checkpoint", "DATA": "--data"})
    options.add("--checkpoint", metavar="MODEL", help="the model's file or folder, also as the first word")
    options.add(
        "--data", help="a text file, or a folder of prepared data, also as the second word (the newest below data/)"
    )
    options.add("--split", choices=SPLITS, help="the stories to score, of prepared data (val)")
    options.add("--max-tokens", type=_positive, help="score about this many tokens instead of all")
    options.add("--windows", type=bool, default=False, help="cut into windows of the context, not into stories")
    _add_model_options(options)
    args = options.read(argv)
    if not args.checkpoint:
        raise UsageError("name a model; see --help")
    limits = {"windows": args.windows, "max_tokens": args.max_tokens}
    data = Path(args.data) if args.data is not None else find_newest()
    if data is None:
        raise DataError("no prepared data below data/; name a text file, or a folder made by tinystories.py")
    running = {"backend": args.backend, "threads": args.threads, "verify": args.verify}
    if data.is_file():
        if args.split is not None:
            raise ConfigError(f"split={args.split}: only prepared data has splits, and {data} is a text")
        model = Model.load(args.checkpoint, tokenizer=args.tokenizer, **running)
        print(f"{model.path} on {data}", flush=True)
        print(evaluate_text(model, data, **limits))
        return 0
    if args.tokenizer is not None:
        raise ConfigError(f"tokenizer={args.tokenizer}: is for a text; prepared data brings its own")
    shards, split = Shards.open(data), args.split or "val"
    model = Model.load(args.checkpoint, tokenizer=shards.tokenizer_path, **running)
    print(f"{model.path} on the {split} split of {shards.folder}", flush=True)
    print(evaluate_shards(model, shards, split, **limits))
    return 0


# --- convert ---


def convert(argv: Sequence[str]) -> int:
    """Write a model in another format, as the command line says; return FormatError's code if it is not as meant."""
    from llamalet.convert import formats, target

    description = (
        "Write any model as a .bin, a .gguf or a Hugging Face folder, with its tokenizer. OUT ends in .bin or .gguf, "
        "or is a folder.\nThe result is read back and compared."
    )
    options = Options("llamalet convert", description, {"MODEL": "--model", "OUT": "--out"})
    options.add("--model", help="the model's file or folder, also as the first word")
    options.add("--out", help="the file or folder to write, also as the second word")
    options.add("--format", choices=tuple(target.FORMAT_DTYPES), help="of OUT (what its ending says)")
    options.add("--version", type=int, help="of a .bin: 0 to 3; only 3 has a --dtype (1, or 3 if there is a --dtype)")
    dtypes = "; ".join(f"{format}: {', '.join(dtypes)}" for format, dtypes in target.FORMAT_DTYPES.items())
    options.add("--dtype", help=f"of the weights; {dtypes} (f32)")
    options.add(
        "--from", dest="kind", choices=formats.FORMATS,
        help="the format of MODEL (what its files say); hf takes the ID of a repository on the Hub too and fetches it",
    )  # fmt: skip
    options.add("-z", "--tokenizer", help="the tokenizer's file (the model's own)")
    options.add("--rope-theta", type=float, help="for llama2.c's files, which do not say; Llama 3's is 500000")
    options.add("--rope-scaling", type=float, help="its factor, for the same files: 8 for Llama 3.1, 32 for 3.2")
    options.add("--force", type=bool, default=False, help="write version 0 even if it loses the norm_eps")
    options.add("--check", type=bool, default=True, help="read a .gguf or a folder back and compare; or --no-check")
    args = options.read(argv)
    if not args.model or args.out is None:
        raise UsageError("name the model and the file or folder to write; see --help")
    aim = target.Target(out=args.out, named_format=args.format, named_version=args.version, dtype=args.dtype)
    kind = args.kind or formats.kind_of(Path(args.model))
    source = formats.read(kind, args.model, rope_theta=args.rope_theta, rope_scaling=args.rope_scaling)
    keep = None if args.tokenizer is None else Path(args.tokenizer)
    if keep is not None:
        source = formats.with_tokenizer(source, keep)
    target.write(source, aim, Path(args.out), keep=keep, force=args.force)
    if aim.format != "bin" and args.check and not target.read_back(source, aim, Path(args.out)):
        return FormatError.exit_code
    return 0
