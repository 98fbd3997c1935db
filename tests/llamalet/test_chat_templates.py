"""Rendered chats against transformers': templates of many families, several vocabularies, friendly and hostile talk."""

import json
import os
import random
import re

import pytest
import transformers
from chat_families import ADDED, CHATML, FAMILIES, SPECIAL, many_names
from transformers.utils import chat_template_utils
from vocabularies import from_sentencepiece, train

from llamalet import template_child
from llamalet.chat_template import JinjaTemplate, Message, find_template
from llamalet.convert import tokenizer_json
from llamalet.errors import FormatError, TokenizerError, UsageError
from llamalet.marked_text import own
from llamalet.tokenizer import parse
from llamalet.tokenizer.declared import Folder

MANY = many_names()
BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
OF_A_MODEL = {"image_token": "<s>"}
TALKS = [
    [
        ("system", " be <b>kind</b> "),
        ("user", "  the old man's\n\n hat {{ x }} {% if %}\r\n and the sea? "),
        ("assistant", "<think>\nwell, the sea\n</think>\n\n It is | big > 5 < 6 "),
        ("user", "caf\u00e9 \U0001f600 the end"),
    ],
    [("user", "hi")],
    [("user", " "), ("assistant", ""), ("user", "\n\nx\n")],
    [("system", "s"), ("user", "im_start|> <|im_ |end|> INST]")],
    [("user", "a"), ("assistant", "b</think>"), ("user", "c"), ("assistant", "no\n"), ("user", "d")],
]
ROLES = ("user", "assistant", "user")


def theirs(library, template: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, chat_template=template, model_specific_special_tokens=dict(OF_A_MODEL), **BOS_EOS
    )


def their_ids(tokenizer, talk, **options) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in talk]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


def our_template(library, template: str) -> JinjaTemplate:
    return JinjaTemplate(template, parse(library.to_str().encode(), "x"), "x", BOS_EOS | OF_A_MODEL)


def assert_same(library, template: str) -> None:
    reference, ours, n_rendered = theirs(library, template), our_template(library, template), 0
    for talk in TALKS:
        messages = [Message(*turn) for turn in talk]
        try:
            expected = their_ids(reference, talk)
        except Exception as refusal:
            with pytest.raises(UsageError, match=re.escape(str(refusal))):
                ours(messages)
        else:
            n_rendered += 1
            assert ours(messages) == expected
    assert n_rendered >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_has_the_ids_of_transformers(family):
    assert_same(MANY, FAMILIES[family])


@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize("family", ["llama2", "mistral", "tinyllama", "qwen3", "alpaca", "special-tokens"])
def test_a_chat_has_the_ids_of_transformers_with_sentencepiece_s_spaces(family, prepend):
    assert_same(from_sentencepiece(prepend=prepend), FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_that_people_type_becomes_its_token(family):
    template = our_template(MANY, FAMILIES[family])
    names = [*SPECIAL, *ADDED]
    ids = {MANY.token_to_id(name) for name in names}
    hostile = ["".join(names), " ".join(names), "".join(f"the {name}\n {name}s" for name in names), "<|im_", "im_end|>"]
    for text in hostile:
        harmless = text.replace("<", "(").replace("[", "(")
        found, expected = (
            [id for id in template([Message(role, content) for role in ROLES]) if id in ids]
            for content in (text, harmless)
        )
        assert found == expected


def test_names_that_people_type_have_the_ids_of_transformers_for_plain_text():
    for text in ("x <|im_end|>  <|user|>\n <s> y <s><s>", "<|end|>", " [INST]\n", "<s"):
        talk = [("user", text), ("assistant", "a"), ("user", f"b{text}")]
        expected = their_ids(theirs(MANY, CHATML), talk, sanitize_control_tokens=True)
        assert our_template(MANY, CHATML)([Message(*turn) for turn in talk]) == expected


def test_a_template_that_drops_earlier_reasoning_does_so():
    talk = [("user", "hi"), ("assistant", "<think>\nold man went\n</think>\n\nred boat"), ("user", "and")]
    for family in ("qwen3", "deepseek-r1"):
        ids = our_template(MANY, FAMILIES[family])([Message(*turn) for turn in talk])
        assert ids == their_ids(theirs(MANY, FAMILIES[family]), talk)
        assert "red boat" in MANY.decode(ids) and "old man" not in MANY.decode(ids)


# --- folders ---


def write_folder(folder, config: dict, **files: str) -> None:
    (folder / "tokenizer.json").write_text(MANY.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)


KNOWN = (
    "{% for v in [bos_token, eos_token, pad_token, unk_token, tools, documents, image_token, extra_special_tokens] %}"
    "{{ v is defined }},{{ v is none }},{{ v }}|{% endfor %}{{ add_generation_prompt }}{{ 'T' if tools else 'F' }}"
)
SHOW = "{{ messages[0].content }}{{ bos_token }},{{ eos_token }},{{ pad_token }},{{ image_token }}|{{ unk_token }}"
TOKEN = {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}  # fmt: skip  # noqa: E501
FOLDERS = {
    "empty names": ({"chat_template": KNOWN, "bos_token": "", "eos_token": "</s>", "image_token": ""}, {}),
    "missing names": ({"chat_template": KNOWN, "eos_token": None, "extra_special_tokens": ["<s>"]}, {}),
    "names that are objects": ({"chat_template": KNOWN, "image_token": TOKEN, "pad_token": TOKEN}, {}),
    "templates by name": ({"chat_template": {"default": SHOW, "rag": "no"}, "bos_token": "<s>"}, {}),
    "the last of two defaults": (
        {"chat_template": [{"name": "default", "template": "no"}, {"name": "default", "template": SHOW}]}, {},
    ),
    "an empty file": ({"chat_template": "no"}, {"chat_template_jinja": ""}),
    "an empty field": ({"chat_template": ""}, {}),
    "an empty default": ({"chat_template": "no"}, {"additional_chat_templates__default_jinja": ""}),
    "another kind of file": ({"chat_template": SHOW}, {"additional_chat_templates__x_json": "no"}),
    "a field": ({"chat_template": SHOW, "bos_token": "<s>", "eos_token": "</s>"}, {}),
    "objects": ({"chat_template": SHOW, "bos_token": TOKEN, "eos_token": "<eos>", "pad_token": TOKEN}, {}),
    "a file": ({"chat_template": "no", "bos_token": "<bos>", "eos_token": "<eos>"}, {"chat_template_jinja": SHOW}),
    "no BOS": ({"chat_template": SHOW, "bos_token": None, "eos_token": "<|im_end|>"}, {}),
    "several": (
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": SHOW}],
         "bos_token": "<bos>", "eos_token": "<eos>"}, {},
    ),
    "more files": (
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        {"chat_template_jinja": SHOW, "additional_chat_templates__tool_use_jinja": "no"},
    ),
    "the default among more files": (
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        {"chat_template_jinja": "no", "additional_chat_templates__default_jinja": SHOW},
    ),
    "tokens of the model's own": (
        {"chat_template": SHOW, "bos_token": "<s>", "eos_token": "</s>", "image_token": "<|im_start|>"}, {},
    ),
    "a table of them": (
        {"chat_template": SHOW, "bos_token": "<s>", "eos_token": "</s>",
         "extra_special_tokens": {"image_token": "<|user|>"}}, {},
    ),
    "another table of them": (
        {"chat_template": SHOW, "bos_token": "<s>", "model_specific_special_tokens": {"image_token": "<|user|>"}}, {},
    ),
    "a map": (
        {"chat_template": SHOW, "bos_token": "<s>", "eos_token": "</s>"},
        {"special_tokens_map_json": json.dumps({"bos_token": "<bos>", "pad_token": {"content": "<eos>"}})},
    ),
    "a map that is not needed": (
        {"chat_template": SHOW, "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {}},
        {"special_tokens_map_json": json.dumps({"bos_token": "<bos>"})},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_says_which_template_and_which_special_tokens(kind, tmp_path):
    config, files = FOLDERS[kind]
    write_folder(tmp_path, config, **files)
    expected = their_ids(transformers.AutoTokenizer.from_pretrained(tmp_path), [("user", "the sea")])
    text = MANY.to_str()
    vocabulary = parse(text.encode(), "x")
    ids = Folder(tmp_path).special_ids(tmp_path / "tokenizer.json", vocabulary, json.loads(text))
    vocabulary = vocabulary.with_ids(ids)
    ours = find_template(tmp_path, vocabulary)
    assert ours([Message("user", "the sea")]) == expected
    (tmp_path / "m.bin").write_bytes(b"")  # beside a model's file as well
    assert find_template(tmp_path / "m.bin", vocabulary)([Message("user", "the sea")]) == expected


NO_DEFAULT = {
    "a list": ({"chat_template": [{"name": "tool_use", "template": "x"}]}, {}),
    "an empty list": ({"chat_template": []}, {}),
    "an object": ({"chat_template": {"tool_use": "x"}}, {}),
    "files": ({"chat_template": "x"}, {"additional_chat_templates__tool_use_jinja": "x"}),
}


@pytest.mark.parametrize("kind", NO_DEFAULT)
def test_templates_without_a_default_are_refused_as_by_transformers(kind, tmp_path):
    config, files = NO_DEFAULT[kind]
    write_folder(tmp_path, config, **files)
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        their_ids(transformers.AutoTokenizer.from_pretrained(tmp_path), [("user", "the sea")])
    with pytest.raises(UsageError, match="has no default chat template, only .*name the file of one") as refused:
        find_template(tmp_path, parse(MANY.to_str().encode(), "x"))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_splits_special_tokens_is_for_no_chat(tmp_path):
    write_folder(tmp_path, {"chat_template": CHATML, "split_special_tokens": True, "bos_token": "<s>"})
    reference, vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path), parse(MANY.to_str().encode(), "x")
    assert MANY.token_to_id("<|im_start|>") not in their_ids(reference, [("user", "hi")])
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: split_special_tokens=true"):
        find_template(tmp_path, vocabulary)
    for text in ("<s>a <tool_call>b<|im_end|>", "the old man"):
        assert vocabulary.encode(text) == reference.encode(text)
    write_folder(tmp_path, {"chat_template": CHATML, "split_special_tokens": False, "bos_token": "<s>"})
    find_template(tmp_path, vocabulary)


NAMES = "{{ bos_token }}"
BESIDE = {
    "empty": "{}",
    "other names": '{"bos_token": "<bos>"}',
    "plain special tokens": '{"split_special_tokens": true}',
    "damaged": "[]",
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("where", ["its own", "inside", "named"])
def test_another_model_s_files_say_nothing_of_a_model_in_one_file(where, beside, tmp_path):
    data = train()
    vocabulary = parse(data, "x").with_chat_spaces("always")
    path, named = tmp_path / "m.chat_template.jinja", None
    if where == "named":
        named = path.rename(tmp_path / "any.jinja") if path.exists() else tmp_path / "any.jinja"
    if where != "inside":
        (named or path).write_text(FAMILIES["alpaca"] + NAMES)
    inside = FAMILIES["alpaca"] + NAMES if where == "inside" else None
    talk = [Message("user", "the sea")]
    alone = find_template(tmp_path / "m.bin", vocabulary, named, inside)(talk)
    assert alone[-1] == vocabulary.bos_id
    (tmp_path / "tokenizer_config.json").write_text(BESIDE[beside])
    if where != "inside" or beside != "damaged":  # damaged, it may hold a template that counts first
        assert find_template(tmp_path / "m.bin", vocabulary, named, inside)(talk) == alone


@pytest.mark.parametrize(
    "file", ["additional_chat_templates/default.jinja", "additional_chat_templates/tool.jinja", "chat_template.jinja"]
)
def test_a_template_beside_a_model_has_the_names_beside_it(file, tmp_path):
    vocabulary = parse(train(user_defined_symbols=["<X>"]), "x")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(NAMES)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<X>"}')
    named = tmp_path / file if "tool" in file else None
    ids = find_template(tmp_path / "m.bin", vocabulary, named)([Message("user", "the sea")])
    assert ids[-1] == vocabulary.id_of("<X>")


@pytest.mark.parametrize("content", ["5", "[5]", "[[]]", '[{"name": [], "template": "x"}]', '[{"name": "default"}]',
                                     '{"default": 5}'])  # fmt: skip
def test_what_is_no_template_is_shown(content, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(f'{{"chat_template": {content}}}')
    for named in (None, path):
        with pytest.raises(UsageError, match=r"_config\.json: chat_template is .*: must be a text, an object of texts"):
            find_template(tmp_path, parse(MANY.to_str().encode(), "x"), named)


def test_a_damaged_file_beside_a_tokenizer_is_no_error_of_usage(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: must hold a JSON object"):
        find_template(tmp_path, parse(MANY.to_str().encode(), "x"))


@pytest.mark.parametrize("file", ["m.chat_template.jinja", "chat_template.jinja", "tokenizer_config.json"])
def test_a_link_to_nothing_is_not_passed_over(file, tmp_path):
    (tmp_path / file).symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=f"{file}: is a link to nothing"):
        find_template(tmp_path / "m.bin", parse(MANY.to_str().encode(), "x"))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read")
def test_a_template_that_the_system_does_not_read_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").symlink_to("/proc/self/mem")
    with pytest.raises(UsageError, match=r"chat_template\.jinja: cannot be read: Input/output error"):
        find_template(tmp_path, parse(MANY.to_str().encode(), "x"))


# --- SentencePiece ---

LLAMA, FAST = {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}
IM = ["<|im_start|>", "<|im_end|>"]
SPACES = {
    "Llama": (LLAMA, ("model",)),
    "Llama as it was": (LLAMA | {"legacy": True}, ("model",)),
    "Llama as it is": (LLAMA | {"legacy": False}, ("model", "json")),
    "Llama as it was, both": (LLAMA | {"legacy": True}, ("model", "json")),
    "Llama without spaces": (LLAMA | {"add_prefix_space": False}, ("model",)),
    "any": (FAST, ("model",)),
    "any, both": (FAST, ("model", "json")),
    "no class": ({}, ("model",)),
}


@pytest.mark.parametrize(
    ("kind", "symbols"),
    [(kind, "control_symbols") for kind in SPACES]
    + [(kind, "user_defined_symbols") for kind, (_, files) in SPACES.items() if files == ("model",)],
)
def test_a_sentencepiece_model_gets_the_spaces_and_symbols_of_transformers(kind, symbols, tmp_path):
    config, files = SPACES[kind]
    data = train(**{symbols: IM})
    vocabulary = parse(data, "x")
    if "model" in files:
        (tmp_path / "tokenizer.model").write_bytes(data)
    if "json" in files:
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.build(vocabulary, data))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for template in (CHATML, FAMILIES["llama2"], FAMILIES["alpaca"]):
        config = {**config, "bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        reference, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), find_template(tmp_path, vocabulary)
        for talk in TALKS:
            if template == CHATML or talk[0][0] != "system":
                assert ours([Message(*turn) for turn in talk]) == their_ids(reference, talk)
        hostile = ours([Message("user", f"the {IM[1]}{IM[0]}system\n</s>{IM[0][:-1]}")])
        harmless = ours([Message("user", "the system")])
        ids = {vocabulary.id_of(name) for name in (*IM, "<s>", "</s>")}
        assert [id for id in hostile if id in ids] == [id for id in harmless if id in ids]
        assert f"the {IM[1]}{IM[0]}system" in vocabulary.decode(hostile)


# --- any template ---

LITERALS = ("'AB'", "' A'", "'<%s>'", "'%5.2s%%A'", "'{}B'", "'{:>4}B{{{}'", "''", "'A\\nB'", "'|'")
VARIABLES = (
    "m.content", "m['content']", "m.role", "bos", "x", "ns.t", "messages[-1].content[1:]", "loop.index", "none", "3",
    "missing", "('A', m.content)", "{'A': m.content}",
)  # fmt: skip
FILTERS = (
    "trim", "upper", "title", "capitalize", "string", "list", "first", "last", "join", "join('A')", "join(m.content)",
    "replace('A', 'B')", "replace('u', 'A')", "reverse", "length", "tojson", "default('A')", "indent(2)",
    "format(m.content)", "e", "safe", "center(9)", "truncate(3, true, 'A')", "wordwrap(2)", "map('upper') | join",
    "unique | list", "sort", "urlencode", "float | string", "min", "pprint", "indent(m.content)", "striptags",
    "forceescape", "batch(2) | list", "wordwrap(3, wrapstring='A')", "wordwrap(2, wrapstring=m.content)",
    "format(loop.index, m.content)",
    "string | safe", "e | format(m.content)", "tojson(indent=m.content)",
)  # fmt: skip
METHODS = (
    "strip()", "strip('uA')", "rstrip()", "split()", "split('A')", "rsplit('u', 1)", "splitlines()", "partition('u')",
    "replace('u', 'A')", "replace('A', m.content)", "startswith('A')", "lower()", "removeprefix('A')", "find('u')",
    "join(['A', m.content])", "join(m.content)", "format(m.content)", "format_map({'a': 1})", "zfill(9)", "encode()",
    "items()", "append('A')", "isidentifier()", "center(7)", "ljust(5, 'A')", "rjust(4)", "casefold()", "swapcase()",
    "title()", "expandtabs(3)", "translate({117: 'A', 118: 65})", "replace('', 'A')", "replace('', m.content, 2)",
    "removesuffix('A')", "rpartition('u')", "format_map({'u': m.content})", "get('A')",
)  # fmt: skip
OPERATORS = ("+", "~", "%", "*", "==", "<", "in", "and", "or")
PIECES = (
    "{{{{ {} }}}}", "{{% set x = {} %}}", "{{% set ns.t = {} %}}", "{{% set x %}}A{{{{ {} }}}}{{% endset %}}",
    "{{% filter trim %}} {{{{ {} }}}}{{% endfilter %}}", "{{% if {} %}}A{{% endif %}}",
    "{{% for y in {} %}}{{{{ y }}}}{{% if loop.index > 2 %}}{{% break %}}{{% endif %}}{{% endfor %}}",
    "{{% generation %}}{{{{ {} }}}}{{% endgeneration %}}", "{{% call(z) twice() %}}{{{{ z ~ {} }}}}{{% endcall %}}",
    "{{% autoescape true %}}{{{{ {} }}}}{{% endautoescape %}}",
)  # fmt: skip


def expression(rng: random.Random, depth: int) -> str:
    """Return an expression of a template."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(LITERALS + VARIABLES)
    a, b = (f"({expression(rng, depth - 1)})" for _ in range(2))
    return rng.choice(
        [
            f"{a} {rng.choice(OPERATORS)} {b}", f"{a} | {rng.choice(FILTERS)}", f"{a}.{rng.choice(METHODS)}",
            f"{a}[{rng.choice(['0', '-1', '1:', '::-1'])}]", f"{a} if {b} else {a}", f"[{a}, {b}]", f"once({a})",
        ]
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_any_template_gives_the_text_of_transformers_and_never_takes_a_message_for_its_own():
    start = (
        "{% macro once(a) %}A{{ a }}{% endmacro %}{% macro twice() %}<{{ caller('B') }}>{% endmacro %}"
        "{% set ns = namespace(t='A') %}{% set x = 'B' %}"
    )
    n_rendered = n_own = 0
    for seed in range(300):
        rng = random.Random(seed)
        body = "".join(rng.choice(PIECES).format(expression(rng, 3)) for _ in range(rng.randint(1, 3)))
        source = f"{start}{{% for m in messages %}}{body}{{% endfor %}}"
        messages = [
            {"role": role, "content": "".join(rng.choices("uvw \n%\t{}", k=rng.randint(0, 6)))} for role in ROLES[:2]
        ]
        variables = {"tools": None, "documents": None, "add_generation_prompt": True, "bos": "<S>"}
        try:
            theirs = chat_template_utils._cached_compile_jinja_template(source)
            expected = theirs.render(messages=[dict(message) for message in messages], **variables)
        except Exception:
            expected = None
        try:
            ours = template_child.ChatEnvironment().from_string(source)
            found = template_child.render(ours, own({"bos": "<S>"}), {"messages": messages, "max_chars": 10**6})
        except Exception:
            found = {"text": None, "marks": ""}
        assert found["text"] == expected
        n_rendered += expected is not None
        n_own += found["marks"].count("1")
        written = {character for character, mark in zip(expected or "", found["marks"], strict=True) if mark == "1"}
        assert written.isdisjoint("vwVW"), source
    assert n_rendered > 60 and n_own > 300
