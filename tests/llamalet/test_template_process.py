import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llamalet import template_process
from llamalet.errors import UsageError
from llamalet.marked_text import OTHERS, OWN
from llamalet.template_process import TemplateProcess

HI = [{"role": "user", "content": "hi"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def render(source: str, messages=HI, max_chars: int = 1000, **special: str) -> tuple[str, str]:
    return TemplateProcess(source, special, "x").render(messages, max_chars)


REFUSED = {
    "a break outside a loop": ("{% break %}", "not a usable chat template: .*'break' outside loop"),
    "an argument twice": ("{{ f(a=1,a=2) }}", "keyword argument repeated"),
    "nested loops": ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
    "a number too long to print": ("{{ 10**5000 }}", "4300 digits"),
    "an endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "an endless loop": (ENDLESS, "takes more than 2 s"),
    "an endless computation": ("{{ 7**99999999 }}", "takes more than 2 s"),
    "parentheses": (f"{{{{ {'(' * 3000}1{')' * 3000} }}}}", "RecursionError"),
    "no syntax": ("{% if %}", "Expected an expression"),
    "a NUL": ("{{ \0 }}", "unexpected char"),
    "an unknown filter": ("{{ 1 | nofilter }}", "No filter named 'nofilter'"),
    "an unknown tag": ("{% nothing %}", "unknown tag"),
    "an unknown variable": ("{{ a.b.c }}", "'a' is undefined"),
    "an unknown message": ("{{ messages[5].role }}", "has no element 5"),
    "its own refusal": ("{{ raise_exception('no \n way\x1b[2J') }}", r"no way\?\[2J$"),
    "a refusal that is no text": ("{{ raise_exception(messages) }}", "'hi'"),
    "a long refusal": ("{{ raise_exception('a' * 99999) }}", r"a{99}\.\.\.$"),
    "another file": ("{% include 'x' %}", "no loader"),
    "a way out": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a way out in pieces": ("{{ '' | attr('__cl' ~ 'ass__') | attr('mro') }}", "unsafe"),
    "a way out by a format": ("{{ ('{0.__class__.__mro__}' | safe).format(1) }}", "unsafe"),
    "another module": ("{% import 'os' as o %}{{ o.system('id') }}", "no loader"),
    "a list in a list in a list": (
        "{% set n = namespace(a=[1]) %}{% for i in range(99999) %}{% set n.a = [n.a] %}{% endfor %}{{ n.a | tojson }}",
        "RecursionError",
    ),
    "a list that doubles": (
        "{% set n = namespace(a=[1]) %}{% for i in range(40) %}{% set n.a = 2 * [n.a] %}{% endfor %}{{ n.a | tojson }}",
        "takes more than 2 s",
    ),
    "a wheel that turns for ever": (
        "{% set c = cycler(*range(99)) %}{% for i in range(99999) %}{{ c.next() }}aaa{% endfor %}",
        "longer than 1000",
    ),
    "a way out by a namespace": ("{% set n = namespace(__init__=1) %}", "underscore"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "a division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "too long a text": ("{% for i in range(9999) %}aaaa{% endfor %}", "longer than 1000 characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_in_one_line_in_time(case):
    source, complaint = REFUSED[case]
    begin = time.monotonic()
    with pytest.raises(UsageError, match=complaint) as refused:
        render(source)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits a process's memory")
@pytest.mark.parametrize(
    "source",
    [
        "{{ '%1500000000d' | format(1) }}",
        "{{ 'ab' * messages | length * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ [1] | tojson(indent=2000000000) }}",
        "{{ messages[0].content | indent(1000000000, true) }}",
        "{{ [1] | batch(10**12, 'x') | list }}",
        "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
        "{{ '{:{}}'.format(messages[0].content, 10**10) }}",
    ],
)
def test_a_template_gets_little_memory(source):
    with pytest.raises(UsageError, match="out of memory|more than 512 MB"):
        render(source)


def test_a_conversation_goes_on_after_a_refusal():
    source = "{% if messages[0].content == 'die' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
    process = TemplateProcess(source, {}, "x")
    first = process._process.pid
    assert process.render(HI, 9) == ("hi", OTHERS * 2)
    with pytest.raises(UsageError, match="longer than 1 char"):
        process.render(HI, 1)
    assert process.render(HI, 9)[0] == "hi" and process._process.pid == first
    with pytest.raises(UsageError, match="2 s"):
        process.render([{"role": "user", "content": "die"}], 9)
    assert process.render(HI, 9)[0] == "hi" and process._process.pid != first
    process._process.kill()
    process._process.wait()
    assert process.render(HI, 9)[0] == "hi"


def test_text_is_the_templates_or_someone_elses():
    messages = [{"role": role, "content": "<s>"} for role in ("user", "<s>")]
    text, marks = render("{{ bos_token }}{% for m in messages %}{{ '<' ~ m.role ~ m.content }}{% endfor %}", messages,
                         bos_token="<s>")  # fmt: skip
    assert (text, marks) == ("<s><user<s><<s><s>", OWN * 8 + OTHERS * 3 + OWN + OTHERS * 6)


def test_texts_of_all_kinds_pass_unchanged():
    texts = ("\0", "\ud800", "\U0001f600", "\n", "{{ x }}", '"', "\\", "\x85\u2028", "")
    process = TemplateProcess("{{ messages[0].content }}", {}, "x")
    for text in texts:
        assert process.render([{"role": "user", "content": text}], 99) == (text, OTHERS * len(text))
    literal = "".join(texts).replace("{{ x }}", "") + "x"
    assert render(literal) == (literal, OWN * len(literal))


def test_the_process_knows_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    process = TemplateProcess("", {}, "x")
    if sys.platform == "linux":
        with open(f"/proc/{process._process.pid}/environ", "rb") as file:
            assert b"s3cret" not in file.read()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [("print('garbage')", "senseless"), ("print(5)", "senseless"), ("print('{}' + chr(10) + '{}')", "senseless"),
     ("", "crashes Python"), ("import os; os.abort()", "crashes Python"), ("print('{', end='')", "crashes Python"),
     ("print('[' * 9999)", "senseless")],
)  # fmt: skip
def test_a_process_that_answers_nonsense_is_refused(monkeypatch, answer, complaint):
    monkeypatch.setattr(template_process, "BOOT", f"import sys; sys.stdin.readline(); {answer or 'pass'}")
    with pytest.raises(UsageError, match=complaint):
        render("")


def test_a_process_that_ignores_its_alarm_is_ended(monkeypatch):
    monkeypatch.setattr(template_process, "BOOT", "print('{}', flush=True); import time; time.sleep(60)")
    process = TemplateProcess("", {}, "x")
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(UsageError, match=r"more than 0\.2 s"):
        process.render(HI, 9)
    assert time.monotonic() - begin < 20
    assert process._process.poll() is not None


def test_a_missing_python_is_said(monkeypatch):
    for executable, complaint in (("/nonexistent/python", "No such file"), ("", "sys.executable names none")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(UsageError, match=complaint):
            render("")


def test_a_jinja2_that_holds_nothing_back_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.1.5")
    with pytest.raises(UsageError, match="jinja2 3.1.5 lets"):
        render("")


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_ends_with_its_template():
    process = TemplateProcess("", {}, "x")
    pid = process._process.pid
    assert is_running(pid)
    del process
    assert wait_until_gone(pid, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", ["", ENDLESS])
def test_the_process_ends_with_its_parent_even_if_that_is_killed(source):
    program = (
        "import sys; from llamalet.template_process import TemplateProcess as T; t = T(sys.argv[1], {}, 'x');"
        "print(t._process.pid, flush=True); t.render([], 9); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)  # the template is at work now
        parent.kill()
    assert wait_until_gone(pid, 10)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_interrupts_a_template():
    process = TemplateProcess(ENDLESS, {}, "x")
    pid, alarm = process._process.pid, threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    assert os.getpgid(pid) == pid != os.getpgid(0)  # Ctrl-C at a terminal goes to everyone in this group
    begin = time.monotonic()
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        process.render(HI, 9)
    assert time.monotonic() - begin < 2 and process._process.pid == pid and process._process.poll() is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_gets_a_process_of_its_own_and_leaves_the_parents_alone():
    program = (
        "import os; from llamalet.template_process import TemplateProcess as T; t = T('{{ 1 }}', {}, 'x')\n"
        "parents = t._process.pid; child = os.fork()\n"
        "if not child: assert t.render([], 9) == ('1', '1') and t._process.pid != parents\n"
        "if child:\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "    assert t.render([], 9) == ('1', '1') and t._process.pid == parents\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_many_texts_and_marks_fit_the_reply():
    text = "\U0001f600" * 5000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}], 5000)[0] == text
    assert json.dumps("\U0001f600") == '"\\ud83d\\ude00"'  # why a reply may have 12 bytes a character
