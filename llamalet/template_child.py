"""The process in which a chat template runs: it renders conversations until its input ends.

A template is a stranger's program, so it runs apart from everything else (template_process.py), in little memory and
for a short time. Each line of the input and the output is a JSON value:

    in   {"source": the template, "special": {name: text of a special token}, "seconds": S, "bytes": N}
    out  {}, or {"error": why it is not a template}
    in   {"messages": [{"role": R, "content": C, "marks": OWN or OTHERS for each character}, ...], "max_chars": N}
    out  {"text": the conversation, "marks": OWN or OTHERS for each character}, or {"error": why there is none}

This process imports nothing but the standard library, jinja2, marked_text.py and template_filters.py.
"""

import contextlib
import datetime
import faulthandler
import json
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llamalet.marked_text import Marked, concat, marks_of, own
from llamalet.template_filters import FILTERS, Html, formatter

MAX_ERROR_CHARS = 1000
# A template may build a token's name from one of these; any other role could be text that someone typed.
ROLES = ("system", "user", "assistant", "tool", "developer")


class Refused(Exception):
    """The conversation would become too long."""


class MarkingGenerator(CodeGenerator):
    """Compiles a template so that all text written in it is marked as its own."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        """Compile a constant."""
        if isinstance(node.value, (str, list, tuple, set, frozenset, dict)):
            self.write(f"environment.own({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Compile a ~ b ~ c."""
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            return super().visit_Concat(node, frame)
        self.write("environment.concat(map(str, (")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Any) -> str:
        return f"environment.own({super()._output_const_repr(group)})"


class Generation(Extension):
    """The tag {% generation %}, which marks what a model said in training data. Here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a block whose text goes through _unchanged."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateNamespace(Namespace):
    """A template's variables that outlive a loop, none of them of Python's internal kind."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, so that a variable may have that name
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class TemplateDict:
    """dict, of which a template may use no more than this."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a dict with the same value for every key."""
        return dict.fromkeys(*args, **kwargs)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that transformers sets up, which templates are written for, and that marks text.

    Source: transformers 5.23, utils/chat_template_utils.py
    """

    code_generator_class = MarkingGenerator
    concat = staticmethod(concat)
    own = staticmethod(own)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters |= FILTERS
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": TemplateDict()}
        self.globals["namespace"] = TemplateNamespace

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute; the methods of plain text take marked text too."""
        return super().getattr(Marked(obj) if type(obj) is str else obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return str.format or format_map of a text as the sandbox allows it, with marks."""
        plain = super().wrap_str_format(value)
        if plain is None or not isinstance(value.__self__, Marked):
            return plain

        def filled(*args: Any, **kwargs: Any) -> str:
            plain(*args, **kwargs)  # raises what it raises
            template: Marked = value.__self__
            values = ((), args[0]) if value.__name__ == "format_map" else (args, kwargs)
            found = formatter(self, template).vformat(template, *values)
            return Html(found) if isinstance(template, Html) else found

        return filled


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _check_name(name: Any) -> None:
    """Raise a SecurityError for a name of Python's internal kind."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r}: a namespace's names cannot begin with an underscore")


def render(template: jinja2.Template, special: Mapping[str, str], request: Mapping[str, Any]) -> dict[str, str]:
    """Return a conversation's text and its marks.

    Raises:
        Refused: if it has more than the allowed number of characters.
        Exception: whatever the template causes.
    """
    messages = [
        {
            "role": own(m["role"]) if m["role"] in ROLES else Marked(m["role"]),
            "content": Marked(m["content"], m.get("marks")),
        }
        for m in request["messages"]
    ]
    variables = {**special, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    pieces, n_chars = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        n_chars += len(piece)
        if n_chars > request["max_chars"]:
            raise Refused(f"it becomes longer than {request['max_chars']} characters, more than the context can hold")
    text = concat(pieces)
    return {"text": str(text), "marks": marks_of(text)}


def limit_memory(n_bytes: int) -> None:
    """Let this process have no more memory than this, where the system has such a limit: not on Windows and macOS."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    first = json.loads(requests.readline())
    special, templates = own(first["special"]), []
    limit_memory(first["bytes"])

    def compile() -> dict[str, str]:
        templates.append(ChatEnvironment().from_string(first["source"]))
        return {}

    def answer(work: Callable[[], dict[str, str]]) -> None:
        # The alarm needs neither this thread nor the parent, so that nothing can run on alone.
        faulthandler.dump_traceback_later(first["seconds"], exit=True)
        try:
            reply = json.dumps(work())
        except BaseException as error:
            reply = json.dumps({"error": describe(error)[:MAX_ERROR_CHARS]})
        faulthandler.cancel_dump_traceback_later()
        replies.write(reply.encode() + b"\n")
        replies.flush()

    answer(compile)
    for line in requests:
        answer(lambda: render(templates[0], special, json.loads(line)))  # noqa: B023 - it is called at once


def describe(error: BaseException) -> str:
    """Return what went wrong."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, (jinja2.TemplateError, Refused)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Serve the process that started this one."""
    serve(sys.stdin.buffer, sys.stdout.buffer)
