"""How fast the server is on this machine, beside batches in one process and, if given, llama.cpp's llama-server.

python -m benchmarks.serving --peer-llama-server=PATH/llama-server
python -m benchmarks.serving --shapes=15M --clients=16 --prompts=16 --streams=yes --turns=3
python -m benchmarks.serving --cases=long --shapes=110M

The cases:

closed   clients that send the next request when they have an answer: 1, 4, 16 and 64 of them, prompts of 16, 128 and
         half the context, streamed and not, temperature 0, and 1 with top-p 0.9
poisson  streamed requests at random times, as many in the mean as 60 % of what batches in one process would take
long     a prompt of nearly the whole context that comes while 16 others stream: what it costs them, and itself

Each reports output tokens/s, the time to the first token and between tokens (p50, p99), the share of prompt tokens
that came from the prefix cache, and the server's memory. Tokens are counted as the servers' `usage` says. Both servers
get the same model with random weights, whose texts never end by themselves, and the same prompts, which all differ.
All contenders take turns, and every figure is the median over the turns. The client is a process of its own, but on
the same processors. llama-server has as many slots as there are clients; the fastest of its settings counts.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import contextlib
import dataclasses
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers, random_models, serving_report
from benchmarks.harness import OUT, kind_and_message, machine, run_benchmark
from benchmarks.load import LoadClient, Plan
from benchmarks.report import OURS, Key, Results
from benchmarks.servers import (
    LLAMA_SERVER_Q8_CACHE,
    LLAMA_SERVERS,
    TOP_P,
    Server,
    cpu_seconds,
    free_port,
    llama_command,
    our_command,
    resident_bytes,
    running,
)
from benchmarks.serving_report import BATCH, LONG_PROMPT, SHARES, Case, ServingResults
from benchmarks.shapes import SHAPES
from configurator import parse
from llamalet import Model, tokenizer
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.config import ModelConfig
from llamalet.cores import thread_count
from llamalet.engine import MAX_BATCH
from llamalet.errors import ConfigError, UsageError, note
from llamalet.generate import generate_batch
from llamalet.sampler import SamplingConfig

CASES = ("closed", "poisson", "long")
DTYPES = ("f32", "q8", "q4")
YES_NO = {"yes": True, "no": False}
HALF = "half"  # of the context, as a length of prompts

# Requests of a closed loop: so many for each client, and at least so many.
ROUNDS, MIN_REQUESTS = 2, 16
# Random arrivals: as many requests, their rate as a share of what in-process batches of so many texts take.
POISSON_LOAD, POISSON_CLIENTS = 0.6, 16
# A long prompt comes when each of the others has so many tokens; they write so many altogether.
LONG_OTHERS, LONG_PROMPT_OF_OTHERS, LONG_AFTER, LONG_TOKENS = 16, 16, 32, 256
LONG_NEW = 4  # tokens after the long prompt itself

Found = Iterator[tuple[Key, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingBenchConfig:
    """The options of benchmarks/serving.py."""

    shapes: str = "15M,110M"
    """The models, separated by commas: 15M, 110M, 1B."""
    dtype: str = "q8"
    """The weights' type: f32, q8 or q4."""
    cases: str = ",".join(CASES)
    """What to measure; see above."""
    clients: str = "1,4,16,64"
    """Numbers of clients, separated by commas."""
    prompts: str = f"16,128,{HALF}"
    """Numbers of tokens of prompts; half is half of the context."""
    streams: str = "yes,no"
    """Whether answers are streamed."""
    temperatures: str = "0,1"
    """Temperatures; any but 0 comes with top-p 0.9."""
    tokens: int = 64
    """New tokens of each text."""
    context: int = 1024
    """Positions of the model's context."""
    shared: int = 0
    """Number of tokens with which all prompts begin alike, for the prefix cache."""
    turns: int = 5
    """Turns of each contender."""
    threads: int | None = None
    """Compute threads of each server; by default one per physical core."""
    out: str = str(OUT)
    """Folder for serving.json and serving.png."""
    serve_options: str = ""
    """More options for our server, as in a shell."""
    peer_llama_server: str | None = None
    """llama.cpp's llama-server, on a GGUF file of the same weights."""
    peer_settings: str = ",".join(LLAMA_SERVERS)
    """Which settings of llama-server compete."""
    ours: bool = True
    """Whether our server takes part."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "turns", "tokens", "context")
        for option, known in (
            ("shapes", SHAPES), ("dtype", DTYPES), ("cases", CASES), ("streams", YES_NO),
            ("peer_settings", LLAMA_SERVERS),
        ):  # fmt: skip
            unknown = [name for name in self.names(option) if name not in known]
            problems += [f"{option}={name}: must be one of {', '.join(known)}" for name in unknown]
        for name in self.names("clients"):
            if not name.isdecimal() or not 1 <= int(name) <= MAX_BATCH:
                problems.append(f"clients={name}: must be between 1 and {MAX_BATCH}")
        for name in self.names("prompts"):
            if name != HALF and not name.isdecimal() or not 2 <= self.prompt_tokens(name) <= self.context - self.tokens:
                problems.append(
                    f"prompts={name}: must be {HALF}, or between 2 and {self.context - self.tokens}, what a context of "
                    f"{self.context} has room for beside {self.tokens} new tokens"
                )
        for name in self.names("temperatures"):
            try:
                SamplingConfig(temperature=float(name))
            except ValueError:
                problems.append(f"temperatures={name}: must be a number, at least 0")
        if "long" in self.names("cases") and self.context < 2 * LONG_AFTER:
            problems.append(f"context={self.context}: must be at least {2 * LONG_AFTER} for a long prompt")
        path = self.peer_llama_server
        if path is not None and not os.access(path, os.X_OK):
            problems.append(f"peer_llama_server={path}: not an executable program")
        ConfigError.raise_for(problems)

    def names(self, option: str) -> list[str]:
        """Return the names listed in an option."""
        return [name.strip() for name in getattr(self, option).split(",") if name.strip()]

    def prompt_tokens(self, name: str) -> int:
        """Return the length of a prompt by its name."""
        return self.context // 2 if name == HALF else int(name)

    def model_config(self, shape: str) -> ModelConfig:
        """Return the model's shape with the context that the options ask for."""
        return dataclasses.replace(SHAPES[shape].config, max_seq_len=self.context)

    def loads(self) -> list[Case]:
        """Return the closed and the random loads, those with as many clients next to each other."""
        prompts = [self.prompt_tokens(name) for name in self.names("prompts")]
        streams = [YES_NO[name] for name in self.names("streams")]
        temperatures = [float(name) for name in self.names("temperatures")]
        closed = [
            Case(clients=clients, prompt=prompt, temperature=temperature, stream=stream)
            for clients, prompt, temperature, stream in product(
                map(int, self.names("clients")), prompts, temperatures, streams
            )
        ]
        poisson = [
            Case(clients=POISSON_CLIENTS, prompt=prompt, temperature=temperature, stream=True, poisson=True)
            for prompt, temperature in product(prompts, temperatures)
        ]
        asked = self.names("cases")
        return [*(closed if "closed" in asked else []), *(poisson if "poisson" in asked else [])]


@dataclass(frozen=True, slots=True)
class ServingContest:
    """A shape: its files, our model in this process, and the client."""

    name: str
    config: ServingBenchConfig
    files: tuple[Path, Path]
    model: Model
    client: LoadClient
    threads: int
    results: ServingResults

    def key(self, figure: str, contender: str) -> Key:
        """Return the key of a figure."""
        return Key(self.name, self.config.dtype, figure, contender)

    def prompts(self, n: int, length: int, *seed: int) -> list[list[int]]:
        """Return n prompts of so many tokens, BOS first; other seeds give others, of which no cache knows anything."""
        rng = np.random.default_rng(seed)
        rows = rng.integers(random_models.FIRST_WORD, self.model.config.vocab_size, (n, length))
        rows[:, 0] = tokenizer.BOS_ID
        rows[:, 1 : self.config.shared] = rows[0, 1 : self.config.shared]
        return rows.tolist()


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(ServingBenchConfig, argv, program="python -m benchmarks.serving", description=__doc__)
    threads, builds = thread_count(config.threads), {}
    if config.peer_llama_server is not None:
        builds["llama-server"] = peers.llama_cpp_build(config.peer_llama_server)
    results = ServingResults()

    def measure(name: str, folder: Path, _: Results) -> Iterator[str]:
        measure_shape(config, name, folder, threads, results)
        return serving_report.shape_lines(results, name, config.dtype)

    def draw(figure: Any, _: Results, names: Sequence[str]) -> None:
        serving_report.draw(figure, results, names)

    facts = {"builds": machine(threads) | builds, "options": config}
    shapes = {name: config.model_config(name) for name in config.names("shapes")}
    run_benchmark("serving", facts, shapes, measure, draw, Path(config.out), results)
    for check in results.checks():
        print(check)
    return 0


def measure_shape(config: ServingBenchConfig, name: str, folder: Path, threads: int, results: ServingResults) -> None:
    """Write the model's files and let all contenders take their turns at each number of clients."""
    note(f"{name} {config.dtype}: writing files")
    files = random_models.write_served(folder, config.model_config(name), config.dtype, np.random.default_rng(0))
    model = Model.load(files[0], threads=threads)
    cases = results.cases[name] = config.loads()
    with LoadClient() as client:
        contest = ServingContest(name, config, files, model, client, threads, results)
        for slots in dict.fromkeys(case.slots for case in cases):
            take_turns(contest, slots, partial(load_turn, [case for case in cases if case.slots == slots]))
        if "long" in config.names("cases"):
            take_turns(contest, LONG_OTHERS + 1, long_prompt_turn)


def take_turns(
    contest: ServingContest, slots: int, turn_of: Callable[[ServingContest, Sequence[Server], int], Found]
) -> None:
    """Start all servers with room for so many texts, let them take their turns, and stop them."""
    turns = contest.config.turns
    with contextlib.ExitStack() as stack:
        servers = []
        for contender, command, port in commands(contest, slots):
            try:
                log = contest.files[0].with_name(f"{contender}.log")
                server = stack.enter_context(running(contender, command, port, log))
                warm_up(contest, server, slots)
                servers.append(server)
            except Exception as error:  # the others are measured even if this one fails
                contest.results.missing[contest.key("start", contender)] = kind_and_message(error)
                note(f"{contest.name} {contender}: {kind_and_message(error)}")
        batch_rate(
            contest, contest.prompts(slots, 16, 0, 0), Case(clients=slots, prompt=16, stream=True, temperature=0.0)
        )  # as the servers, unmeasured
        for turn in range(turns):
            for key, value in turn_of(contest, servers if turn % 2 == 0 else servers[::-1], turn):
                contest.results.add(key, value)
            note(f"{contest.name} with {slots} slots: turn {turn + 1} of {turns}")
        resident = serving_report.resident_with(slots)
        for server in servers:
            contest.results.add(contest.key(resident, server.contender), resident_bytes(server.process))


def commands(contest: ServingContest, slots: int) -> Iterator[tuple[str, list[str], int]]:
    """Yield the contenders that take part: name, command line and port."""
    config, (ours, theirs) = contest.config, contest.files
    if config.ours:
        port = free_port()
        yield OURS, our_command(ours, port, contest.threads, config.serve_options), port
    if config.peer_llama_server is None:
        return
    for name in config.names("peer_settings"):
        if name == LLAMA_SERVER_Q8_CACHE and contest.model.config.head_dim % 32:
            continue  # Q8_0 has blocks of 32
        port = free_port()
        yield name, llama_command(
            config.peer_llama_server, theirs, port, contest.threads,
            slots=slots, context=config.context, options=LLAMA_SERVERS[name],
        ), port  # fmt: skip


def warm_up(contest: ServingContest, server: Server, slots: int) -> None:
    """Let a server do once what is compiled or allocated at first use."""
    for temperature in (0.0, 1.0):
        prompts = contest.prompts(slots, 16, 0, int(temperature))
        bodies = [server.body(prompt, 4, stream=True, temperature=temperature, seed=1) for prompt in prompts]
        contest.client.run(Plan(port=server.port, bodies=bodies, clients=slots))


# -- turns ------------------------------------------------------------------------------------------------------------


def load_turn(cases: Sequence[Case], contest: ServingContest, servers: Sequence[Server], turn: int) -> Found:
    """Yield what one turn at each case gives, in-process batches first."""
    rates: dict[str, float] = {}
    for case in cases:
        n = max(MIN_REQUESTS, ROUNDS * case.clients)
        prompts = contest.prompts(n, case.prompt, 1, turn, zlib.crc32(case.name.encode()))
        if case.batch not in rates:
            rates[case.batch] = batch_rate(contest, prompts, case)
            yield contest.key(f"{case.batch}: {serving_report.RATE}", BATCH), rates[case.batch]
        arrivals: list[float] = []
        if case.poisson:
            per_s = POISSON_LOAD * rates[case.batch] / contest.config.tokens
            arrivals = np.random.default_rng(turn).exponential(1 / per_s, n).cumsum().tolist()
        for server in servers:
            bodies = [
                server.body(prompt, contest.config.tokens, stream=case.stream, temperature=case.temperature, seed=seed)
                for seed, prompt in enumerate(prompts)
            ]
            plan = Plan(port=server.port, bodies=bodies, clients=case.clients, arrivals=arrivals)
            yield from attempt(contest, server, case.name, partial(load_figures, contest.client, plan, server))


def batch_rate(contest: ServingContest, prompts: Sequence[Sequence[int]], case: Case) -> float:
    """Return the tokens/s of the same texts in this process, as many at once as there are clients."""
    configs = [
        SamplingConfig(
            temperature=case.temperature, top_p=TOP_P, seed=seed, max_new_tokens=contest.config.tokens, ignore_eos=True
        )
        for seed in range(len(prompts))
    ]
    start = time.perf_counter()
    events = generate_batch(contest.model.transformer, prompts, configs, batch_size=case.clients)
    n_tokens = sum(token is not None for _, token in events)
    return n_tokens / (time.perf_counter() - start)


def attempt(
    contest: ServingContest, server: Server, name: str, measure: Callable[[], Iterator[tuple[str, float]]]
) -> Found:
    """Yield what is measured of a case; if that fails, record why: the others are measured all the same."""
    try:
        for what, value in measure():
            yield contest.key(f"{name}: {what}", server.contender), value
    except UsageError as error:
        contest.results.missing[contest.key(name, server.contender)] = f"{name}: {error}"
        note(f"{contest.name} {server.contender}, {name}: {error}")


def load_figures(client: LoadClient, plan: Plan, server: Server) -> Iterator[tuple[str, float]]:
    """Send the requests of a plan; yield tokens/s, times, the share cached, and processor time per second."""
    cpu_start = cpu_seconds(server.process)
    load = client.run(plan)
    server_cpu_s = cpu_seconds(server.process) - cpu_start
    yield serving_report.RATE, load.tokens_per_s
    yield from percentiles(serving_report.FIRST, [answer.first_s for answer in load.answers])
    yield from percentiles(serving_report.BETWEEN, [gap for answer in load.answers for gap in answer.gaps_s])
    prompt_tokens = sum(answer.prompt_tokens for answer in load.answers)
    yield serving_report.CACHED, sum(answer.cached_tokens for answer in load.answers) / prompt_tokens
    yield serving_report.SERVER_CPU, server_cpu_s / load.seconds
    yield serving_report.CLIENT_CPU, load.cpu_s / load.seconds


def percentiles(what: str, times: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield the percentiles of some times, none of none."""
    if times:
        yield from ((f"{what} {name}", float(np.quantile(times, share))) for name, share in SHARES.items())


def long_prompt_turn(contest: ServingContest, servers: Sequence[Server], turn: int) -> Found:
    """Yield what a prompt of nearly the whole context costs the others that stream, and itself."""
    long = contest.prompts(2, contest.config.context - LONG_NEW, 2, turn)
    others = contest.prompts(LONG_OTHERS, LONG_PROMPT_OF_OTHERS, 3, turn)
    tokens = min(LONG_TOKENS, contest.config.context - LONG_PROMPT_OF_OTHERS)
    for server in servers:
        ask = partial(server.body, stream=True, temperature=0.0, seed=1)
        alone = Plan(port=server.port, bodies=[ask(long[0], LONG_NEW)])
        bodies = [*(ask(prompt, tokens) for prompt in others), ask(long[1], LONG_NEW)]
        among = Plan(port=server.port, bodies=bodies, late_after=LONG_AFTER)
        yield from attempt(contest, server, LONG_PROMPT, partial(long_prompt_figures, contest.client, alone, among))


def long_prompt_figures(client: LoadClient, alone: Plan, among: Plan) -> Iterator[tuple[str, float]]:
    """Send a long prompt alone, and last of some; yield its times, and the others' before it and while it is read."""
    yield serving_report.ALONE, client.run(alone).answers[0].first_s
    *others, late = client.run(among).answers
    begun, first = max(other.times[0] for other in others), late.start + late.first_s
    before, during = list[float](), list[float]()
    for other in others:
        for start, end in zip(other.times, other.times[1:], strict=False):
            if begun <= start and end <= late.start:
                before.append(end - start)
            elif end > late.start and start < first:
                during.append(end - start)
    yield serving_report.LATE, late.first_s
    yield from percentiles(serving_report.BEFORE, before)
    yield from percentiles(serving_report.WHILE, during)


if __name__ == "__main__":
    run(main)
