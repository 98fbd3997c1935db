"""Every filter of jinja2 on marked text: the text is jinja2's own, and each mark follows its character."""

import random

import pytest
from transformers.utils import chat_template_utils

from llamalet import template_child
from llamalet.marked_text import OTHERS, OWN, Marked, marks_of

MINE, THEIRS = "AaBb%-", " \t\r\nyYzZ."  # each character says whose it is, in any case


def marked(text: str) -> Marked:
    return Marked(text, expected(text))


def expected(text: str) -> str:
    return "".join(OWN if character in MINE else OTHERS for character in text)


# Expressions of x, y (texts), words (texts), table (texts by texts) and n (5). Numbers are nobody's, unless a template
# writes them.
FILTERS = {
    "abs": [],
    "attr": ["(x | attr('upper'))()", "x | attr('nothing') | string"],
    "batch": ["words | batch(2, 'AB') | map('join') | join('-')", "(x | batch(3) | list)[0] | join"],
    "capitalize": ["x | capitalize", "n | capitalize"],
    "center": ["x | center(30)", "x | center", "n | center(3)"],
    "count": ["x | count"],
    "d": ["missing | d('AB')", "'' | d(x, true)"],
    "default": ["missing | default(y)", "x | default('B')"],
    "dictsort": ["table | dictsort | map('join') | join", "(table | dictsort(by='value', reverse=true))[0][1]"],
    "e": ["x | e", "(x | e) + y", "(x | e) ~ y", "(x | e).upper()"],
    "escape": ["x | escape | upper", "'Ab-%s' | escape | format(x)"],
    "filesizeformat": [],
    "first": ["words | first", "x | first"],
    "float": ["x | float('b')"],
    "forceescape": ["x | forceescape", "x | safe | forceescape"],
    "format": ["'A%%-B%rb' | replace('r', 's') | format(x)", "'%(k)9.3\\x73-' | format(k=x)", "n | format()"],
    "groupby": ["words | groupby('0') | map(attribute='grouper') | join", "(words | groupby(0))[0].list | join"],
    "indent": ["x | indent", "x | indent(2, true)", "x | indent('bA', true, true)", "x | indent(3, blank=true)",
               "x | safe | indent(2)"],
    "int": ["x | int('b')"],
    "items": ["table | items | map('last') | join"],
    "join": ["words | join", "words | join('-')", "words | join(y)", "words | join(n)", "words | join(none)",
             "x | join", "words | join(missing)", "words | map('safe') | join('-')", "[n, 'A'] | join(d='b')",
             "[table, table] | join('-', 'AY')", "[table] | join(attribute='B')"],
    "last": ["words | last", "x | last"],
    "length": ["x | length"],
    "list": ["x | list | join('-')"],
    "lower": ["x | lower"],
    "map": ["words | map('upper') | join", "words | map('replace', 'a', y) | join", "words | map(attribute=0) | join"],
    "max": ["words | max", "words | max(true)"],
    "min": ["words | min"],
    "pprint": [],
    "random": ["[x] | random"],
    "reject": ["words | reject('equalto', x) | join"],
    "rejectattr": ["[table] | rejectattr('no') | map(attribute='B') | join"],
    "replace": ["x | replace('A', y)", "x | replace('', 'b')", "x | replace('Y', 'Ab', 1)", "n | replace(n, 'Ab')",
                "x | safe | replace('A', y)"],
    "reverse": ["x | reverse", "words | reverse | join"],
    "round": ["n | round(1)"],
    "safe": ["x | safe", "(x | safe) + (y | safe)", "(x | safe) * 2", "('-A%\\x73' | safe) % x", "x | safe | string",
             "('b-{}A' | safe).format(x)", "(x | safe).join(words)", "(x | safe)[1:]", "(x | safe).split('b') | join",
             "y + (x | safe)", "(x | safe).replace('A', y)", "(x | safe).center(30)",
             "(x | safe).partition('A') | join"],
    "select": ["words | select | join"],
    "selectattr": ["[table] | selectattr('B') | map(attribute='B') | join"],
    "slice": ["words | slice(2) | map('join') | join('-')", "words | slice(4, 'bA') | map('join') | join"],
    "sort": ["words | sort | join", "words | sort(true, true) | join('-')", "x | sort | join"],
    "string": ["x | string", "n | string | replace('5', 'A')"],
    "striptags": [],
    "sum": ["[n, 2] | sum", "([[x], [y]] | sum(start=[])) | join"],
    "title": ["x | title", "x | safe | title", "n | title"],
    "tojson": [],
    "trim": ["x | trim", "x | trim('A \\t')", "x | trim(y)"],
    "truncate": ["x | truncate(6, true, '-')", "x | truncate(6, false, 'A', 0)", "x | truncate(9, leeway=0, end=y)"],
    "unique": ["words | unique | join", "x | unique(true) | join"],
    "upper": ["x | upper"],
    "urlencode": [],
    "urlize": [],
    "wordcount": ["x | wordcount"],
    "wordwrap": ["x | wordwrap(4)", "x | wordwrap(3, false)", "x | wordwrap(5, wrapstring='-b')",
                 "x | wordwrap(2, true, y, false)", "x | safe | wordwrap(4)"],
    "xmlattr": [],
}  # fmt: skip
# Other expressions and blocks.
OTHER = {
    "format": ["'A{}-{}'.format(x, n)", "'{:9}-{:>9}b{:^9}A'.format(x, y, x)",
              "'{0}{1!s}-{0:.2}'.format(x, y)",
               "'-{k}{k[0]}'.format(k=x)", "'A{t[B]}'.format(t=table)", 
              "('-{{{}}}A{}-' ~ y).format(x, n).replace('{', '').replace('}', '')",
              
               "'A{:{}}b'.format(x, 9)", "'A{:{}{}}b'.format(x, '<', 9)", "'A{k}-'.format_map({'k': x})",
               "(x ~ '-{}A').format(y)", "'{:5d}-{:.2f}%'.format(n, n)", "'A{}'.format(missing)", "'-{}'.format([n])",
               "'A{:5}'.format(n > 1)", "(n | string).format(x) ~ 'A'", "'{!r:>3}-'.format(n)"],
    "operators": ["x ~ y ~ 'A' ~ n", "x + 'A' + y", "'-A' * 3", "x[1:-1]", "x[::-1]", "x[0] if x else 'b'", "x or 'A'",
                  "x and y", "('A-', x)[0]", "{'k': x}.k", "{'A': 1} | list | first", "(x, 'b')[::-1] | join",
                  "'A%d-' % n", "'%(B)\\x73-A' % table", "'-%\\x73%%' % x", "n ~ 'b'", "'A' 'b'", "(not x) | int"],
    "objects": ["dict(k=x).k", "dict.fromkeys([x], 'A').popitem | string | length", "cycler('A', x).next()",
                "dict(k=x).values() | join", "{'A': x}.items() | map('join') | join", "joiner('-')() ~ x",
                "namespace(k=x).k", "[x, 'A'][0]", "x.split('A') | join('-b')", "''.join(words)", "y.join(words)",
                "(n | string).join(words)", "table.get('B', 'A')", "table.get('C', 'A')", "table.keys() | join"],
}  # fmt: skip
BLOCKS = (
    "{% set s %}A{{ x }}-{% endset %}{{ s | upper }}",
    "{% set s | replace('Y', 'A') %}b{{ x }}{% endset %}{{ s }}",
    "{% filter upper | indent(2) %}-b{{ x }}A{{ y }}{% endfilter %}",
    "{% macro m(a, b='-A') %}b{{ a }}{{ b }}{% endmacro %}{{ m(x) }}{{ m(y, x) | trim }}",
    "{% macro m() %}A{{ caller(x) }}{% endmacro %}{% call(z) m() %}-{{ z }}{% endcall %}",
    "{% macro m() %}{{ varargs | join }}{{ kwargs.values() | join('A') }}{% endmacro %}{{ m(x, 'b', k='-', l=y) }}",
    "{% set n = namespace(t='A') %}{% for w in words %}{% set n.t = n.t ~ w ~ '-' %}{% endfor %}{{ n.t }}",
    "{% for w in words %}{{ loop.cycle('A', y) }}{{ loop.previtem }}{{ loop.nextitem }}"
    "{% if loop.changed(w) %}-{% endif %}{% else %}b{% endfor %}",
    "{% for w in words if w != x recursive %}{{ w }}-{{ loop([y]) if loop.depth < 3 }}{% endfor %}",
    "{% generation %}A{{ x }}{% endgeneration %}{% with z = 'b' ~ x %}{{ z }}{% endwith %}"
    "{% block c %}-{{ y }}{% endblock %}",
    "{% set a, b = x, 'A' %}{{ a }}{{ b }}{% raw %}-{% endraw %}{% if x is string %}b{% endif %}{# A #}",
    "{% set t = ('A', x) %}{{ t | last }}{% set p, q = '-', t %}{{ p }}{{ q[0] }}",
)


def rendered(source: str, **variables: object) -> tuple[str, str]:
    """Return the text and the marks of a template."""
    environment = template_child.ChatEnvironment()
    found = environment.concat(environment.from_string(source).generate(**variables))
    return found, marks_of(found)


def outcome(render) -> object:
    try:
        return render()
    except Exception as error:
        return type(error)


def check(source: str) -> None:
    """Compare a template's text with transformers', and its marks with what the characters say."""
    rng, reference = random.Random(1), chat_template_utils._cached_compile_jinja_template(source)
    for _ in range(25):
        x, y, *words = ("".join(rng.choices(MINE + THEIRS, k=rng.randint(0, most))) for most in (20, 3, 4, 4, 4))
        table = {"B": y, "AY": x}
        theirs = outcome(lambda: reference.render(n=5, x=x, y=y, words=[*words, x], table=table))  # noqa: B023
        ours = outcome(
            lambda: rendered(
                source, n=5, x=marked(x), y=marked(y), words=[*map(marked, words), marked(x)],  # noqa: B023
                table={marked(key): marked(value) for key, value in table.items()},  # noqa: B023
            )
        )  # fmt: skip
        if not isinstance(ours, tuple):
            assert ours == theirs
            continue
        text, marks = ours
        assert (text, marks) == (theirs, expected(text))


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_the_marks(name):
    for expression in FILTERS[name]:
        check(f"{{{{ {expression} }}}}")


def test_no_filter_is_forgotten():
    assert FILTERS.keys() == template_child.ChatEnvironment().filters.keys()


@pytest.mark.parametrize("name", OTHER)
def test_an_expression_keeps_the_marks(name):
    for expression in OTHER[name]:
        check(f"{{{{ {expression} }}}}")


@pytest.mark.parametrize("source", BLOCKS)
def test_a_block_keeps_the_marks(source):
    check(source)


# z is a template's own text; an expression of constants alone is computed when the template is read, and all its own.
PLAIN = (
    "z | pprint", "z | striptags", "z | urlize", "{'a': z} | xmlattr", "n | filesizeformat", "n | abs", "[z]",
    "{z: n} ~ n", "'{!r}'.format(z)", "'%r' % z", "dict(s=z) | list | first", "z | safe | pprint", "n | string",
    "z.encode()",
)  # fmt: skip


@pytest.mark.parametrize("expression", PLAIN)
def test_where_marks_cannot_follow_the_text_is_plain(expression):
    source = f"{{{{ {expression} }}}}"
    text, marks = rendered(source, n=5, z=Marked("[z]", "111"))
    assert text == chat_template_utils._cached_compile_jinja_template(source).render(n=5, z="[z]")
    assert OWN not in marks


def test_blocks_that_escape_are_plain():
    source = "{% autoescape true %}{{ x ~ z }}{{ (z | safe) ~ x }}{% endautoescape %}"
    text, marks = rendered(source, x=Marked("<"), z=Marked("[z]", "111"))
    assert text == "&lt;[z][z]&lt;" and OWN not in marks


@pytest.mark.parametrize(
    ("expression", "text", "marks"),
    [
        ("x | e", "&lt;a&amp;", "111100000"),
        ("x | safe ~ x", "<a&<a&", "100100"),
        ("(x | safe) + x", "<a&&lt;a&amp;", "100111100000"),
        ("'<%s>' | safe | format(x)", "<&lt;a&amp;>", "111110000001"),
        ("'<{}>' | safe | attr('format') | list | length", None, ""),
        ("('<{}>' | safe).format(x)", "<&lt;a&amp;>", "111110000001"),
        ("x | urlencode", "%3Ca%26", "1110000"),
        ("{'k': x} | urlencode", "k=%3Ca%26", "0" * 9),
        ("x | tojson", '"<a&"', "01000"),
        ("[x, {'<': n, n: '\n\u00df'}, true, ('b',)] | tojson", '["<a&", {"<": 5, "5": "\\n\u00df"}, true, ["b"]]',
         "00100000001"),
        ("(x ~ '\u00df\n') | tojson(true)", '"<a&\\u00df\\n"', "0100111111110"),
        ("{'b': x, 'a': '<'} | tojson(sort_keys=true, separators=('', '='), indent=1)",
         '{\n "a"="<"\n "b"="<a&"\n}', None),
        ("{true: x} | tojson", '{"true": "<a&"}', "0" * 15),
        ("[n, none] | tojson", "[5, null]", "0" * 9),
        ("messages | tojson", "[]", "00"),
    ],
)  # fmt: skip
def test_html_and_json_have_the_marks_of_what_they_show(expression, text, marks):
    source, x = f"{{{{ {expression} }}}}", "<a&"
    reference = outcome(
        lambda: chat_template_utils._cached_compile_jinja_template(source).render(x=x, n=5, messages=[])
    )
    ours = outcome(lambda: rendered(source, x=Marked(x, "100"), n=5, messages=[]))
    if text is None:
        assert ours == reference
        return
    assert ours[0] == text == reference
    if marks is None:  # what is own can be seen
        assert "".join(letter for letter, mark in zip(*ours, strict=True) if mark == OWN) == "a<b<"
    else:
        assert ours[1].startswith(marks)
