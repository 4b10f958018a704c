from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import made_chat_templates
import made_tokenizers
import pytest
from transformers import AutoTokenizer

from preble.engine import template_meter
from preble.engine.chat_template import MAX_TEMPLATE, render_chat
from preble.engine.template_filters import METHODS, REFUSED
from preble.engine.template_meter import (
    BASE_UNITS,
    MAX_BITS,
    MAX_DEPTH,
    MAX_INPUT,
    Meter,
    TemplateTooCostly,
    metered,
    weigh,
)
from preble.engine.tokenizer import Tokenizer
from preble.errors import InvalidRequest

MEBIBYTE = 1 << 20
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def grown(start: str, step: str, then: str, times: int = 60) -> str:
    """A template that takes a step again and again, each doubling what there is, and then does something with it."""
    return (
        f"{{% set ns = namespace(a={start}, b={start}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.a = {step.format('ns.a')} %}}{{% set ns.b = {step.format('ns.b')} %}}{{% endfor %}}{then}"
    )


TOO_COSTLY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop with a condition": "{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "loops that look at their length": (
        "{% for a in range(99999) %}{% for b in range(99999)|map('string') %}{{ loop.length }}{% break %}{% endfor %}"
        "{% endfor %}"
    ),
    "text repeated by a loop": "{% for a in range(99999) %}" + "x" * 99_999 + "{% endfor %}",
    "text repeated by a macro": (
        "{% macro m() %}{% for a in range(99999) %}" + "x" * 99_999 + "{% endfor %}{% endmacro %}{% set x = m() %}"
    ),
    "a string times a number": "{{ 'a' * 10**10 }}",
    "a number times a string": "{{ 10**10 * 'a' }}",
    "a list times a number": "{{ [1] * 10**10 }}",
    "a number times a tuple": "{{ 10**10 * (1, 2) }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{{ " + " ** ".join(["9999"] * 9) + " }}",
    "a product": grown("3", "{0} * {0}", ""),
    "doubling by ~": grown("'ab'", "{0} ~ {0}", ""),
    "doubling by +": grown("'ab'", "{0} + {0}", ""),
    "doubling a list": grown("[1]", "{0} + {0}", ""),
    "doubling by a block": (
        "{% set ns = namespace(a='ab') %}{% for i in range(60) %}{% set x %}{{ ns.a }}{{ ns.a }}{% endset %}"
        "{% set ns.a = x %}{% endfor %}"
    ),
    "macros that call twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}"
    ),
    "blocks that call twice": "{% block a0 %}x{% endblock %}"
    + "".join(
        f"{{% block a{n} %}}{{{{ self.a{n - 1}() }}}}{{{{ self.a{n - 1}() }}}}{{% endblock %}}" for n in range(1, 25)
    ),
    "printing shared lists": grown("[1]", "[{0}, {0}]", "{{ ns.a }}"),
    "printing shared namespaces": grown("1", "namespace(a={0}, b={0})", "{{ ns.a }}"),
    "comparing shared lists": grown("[1]", "[{0}, {0}]", "{{ ns.a == ns.b }}"),
    "ordering shared lists": grown("[1]", "[{0}, {0}]", "{{ ns.a < ns.b }}"),
    "finding shared lists": grown("[1]", "[{0}, {0}]", "{{ ns.a in [ns.b] }}"),
    "testing shared lists": grown("[1]", "[{0}, {0}]", "{{ ns.a is eq(ns.b) }}"),
    "selecting shared lists": grown("[1]", "[{0}, {0}]", "{{ [ns.a] | select('in', [ns.b]) | list | length }}"),
    "sorting shared lists": grown("[1]", "[{0}, {0}]", "{{ [ns.a, ns.b] | sort | length }}"),
    "changing shared lists": grown("[1]", "[{0}, {0}]", "{% for i in [ns.a, ns.b] %}{{ loop.changed(i) }}{% endfor %}"),
    "hashing shared tuples": grown("(1,)", "({0}, {0})", "{{ {ns.a: 1} }}"),
    "looking up shared tuples": grown("(1,)", "({0}, {0})", "{{ {}[ns.a] }}"),
    "getting shared tuples": grown("(1,)", "({0}, {0})", "{{ {}.get(ns.a) }}"),
    "hashing deep tuples": grown("(1,)", "({0},)", "{{ {ns.a: 1} }}", 9_000),
    "uniting deep tuples": grown("(1,)", "({0},)", "{{ [ns.a] | unique | list }}", 9_000),
    "shared lists as JSON": grown("[1]", "[{0}, {0}]", "{{ ns.a | tojson }}"),
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "%d with a width": "{{ '%999999999d' % 1 }}",
    "%d with many widths": "{{ ('%(a)9999d' * 20000) % {'a': 1} }}",
    "%d with a computed width": "{{ '%*d' % (10 ** 9, 1) }}",
    "%s of a long text": "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "the filter format": "{{ '%999999999d' | format(1) }}",
    "format with a width": "{{ '{:999999999}'.format(1) }}",
    "format with a computed width": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format of a long text": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "format_map of a long text": "{{ ('{a}' * 99999).format_map({'a': 'x' * 99999}) }}",
    "the filter center": "{{ 'a' | center(10 ** 9) }}",
    "center": "{{ 'a'.center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "rjust": "{{ 'a'.rjust(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10 ** 9) }}",
    "many tabs": "{{ ('\\t' * 99999).expandtabs(9999) }}",
    "padding through map": "{{ ['a'] | map('center', 10 ** 9) | list }}",
    "padding through a filter block": "{% filter center(10 ** 9) %}a{% endfilter %}",
    "the filter indent": "{{ 'a\\nb' | indent(10 ** 9) }}",
    "indenting many lines": "{{ ('a\\n' * 99999) | indent('x' * 99999) }}",
    "the filter replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replacing nothing": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "the filter join": "{{ (['a'] * 99999) | join('x' * 99999) }}",
    "join": "{{ ('x' * 99999).join(['a'] * 99999) }}",
    "joining an iterator": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "sum of lists": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "round": "{{ 5 | round(-10 ** 9) }}{{ 5 | round(10 ** 9, 'floor') }}",
    "JSON with an indent": "{{ [1, [2]] | tojson(indent=10 ** 9) }}",
    "JSON with a long indent": "{{ (range(9999) | list) | tojson(indent='x' * 99999) }}",
    "JSON with long separators": "{{ (range(9999) | list) | tojson(separators=('x' * 99999, ':')) }}",
    "a long number read": "{{ ('f' * 999999) | int(base=16) }}",
    "slices of a long text": "{% set s = 'x' * 999999 %}{% for i in range(99999) %}{% set y = s[1:] %}{% endfor %}",
    "searches in a long text": "{% set s = 'x' * 999999 %}{% for i in range(99999) %}{{ 'y' in s }}{% endfor %}",
    "many arguments": "{% for i in range(99999) %}{{ loop.cycle(*range(99999)) }}{% endfor %}",
    "many arguments of a macro": (
        "{% macro m() %}{{ varargs }}{% endmacro %}{% for i in range(9999) %}{{ m(*range(9999)) }}{% endfor %}"
    ),
    "many escapes": "{% autoescape true %}" + "{{ '<' * 999999 }}" * 99 + "{% endautoescape %}",
    "a long template": "x" * (MAX_TEMPLATE + 1),
    "a template of many parts": "{{ a }}" * 20_000,
}
"""What stops at a limit of ours."""

FAILING = {
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block that calls itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop in itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}",
    "a long chain of additions": "{{ " + "1 + " * 4_000 + "1 }}",
    "a long chain of filters": "{{ a" + " | upper" * 4_000 + " }}",
    "a long chain of attributes": "{{ messages" + ".a" * 4_000 + " }}",
    "a long chain of conditions": "{% if a %}" + "{% elif b %}" * 4_000 + "{% endif %}",
    "nested statements": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "opened comments": "{#" * 50_000,
    "opened expressions": "{{" * 50_000,
    "too long a range": "{{ range(10 ** 9) }}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class through a filter": "{{ ('' | attr('__class__')).mro() }}",
    "a class through format": "{{ '{0.__class__.__mro__}'.format('')() }}{{ ''['__class__']() }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m._func() }}",
    "the environment": "{{ self._TemplateReference__context.environment() }}",
    "globals of a function": "{{ raise_exception.__globals__['jinja2']() }}",
    "underscores in a namespace": "{% set ns = namespace(__class__=1) %}",
    "a file": "{% include '/etc/hosts' %}",
    "another template": "{% extends 'base.html' %}",
    "bytes": "{{ 'a'.encode().hex() }}",
    "a number as bytes": "{{ (5).to_bytes(10 ** 9, 'little') }}",
    "a type's method": "{{ ''.maketrans('a', 'b') }}",
    "changing the messages": "{{ messages.append(1) }}",
    "random paragraphs": "{{ lipsum(10 ** 9) }}",
    "the filter urlize": "{{ 'x' | urlize }}",
    "its own words": "{{ raise_exception('no') }}",
}
"""What fails on the way, in jinja's words."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_tokenizers.save(made_tokenizers.byte_level(), tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.mark.parametrize("name", made_chat_templates.TEMPLATES)
@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("functions", [None, made_chat_templates.tools()], ids=["plain", "tools"])
def test_a_published_style_renders_as_in_transformers(theirs, name, count, functions):
    template, messages = made_chat_templates.TEMPLATES[name], made_chat_templates.conversation(count)
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 May"},
        {"custom_tools": made_chat_templates.tools(1)},
    ):
        expected = theirs.apply_chat_template(
            messages, tools=functions, chat_template=template, tokenize=False, **options
        )
        assert render_chat(theirs, messages, tools=functions, chat_template=template, **options) == expected


def test_the_last_message_is_continued_as_in_transformers(theirs):
    messages = [*HELLO, {"role": "assistant", "content": "It is  ", "name": None}]
    for template in ("chatml_tools", "headers"):
        options = {"chat_template": made_chat_templates.TEMPLATES[template], "continue_final_message": True}
        rendered = render_chat(theirs, messages, **options)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, **options)
        assert rendered.rstrip().endswith("It is")


def test_objects_of_the_caller_are_nothing_but_data(theirs):
    class Tool(dict):
        def run(self) -> str:
            raise AssertionError("this ran")

    for template in ("{{ tools[0].run() }}", "{{ x.write_text('a') }}"):
        with pytest.raises(Exception, match="has no attribute"):
            render_chat(theirs, HELLO, tools=[Tool(name="a")], chat_template=template, x=theirs)


@pytest.fixture
def a_tenth(monkeypatch):
    """Smaller limits: where a bomb ends does not depend on them, and the test is faster."""
    monkeypatch.setattr(template_meter, "BASE_UNITS", BASE_UNITS // 10)


@pytest.mark.usefixtures("a_tenth")
@pytest.mark.parametrize("name", TOO_COSTLY)
def test_a_bomb_is_refused(tokenizer, name):
    """Twice, since nothing that decides may depend on the clock."""
    told = set()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"the chat template of .* rejects the messages: ") as caught:
            tokenizer.chat(HELLO, chat_template=TOO_COSTLY[name])
        assert isinstance(caught.value.__cause__, TemplateTooCostly)
        told.add(str(caught.value))
    assert len(told) == 1


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_is_the_requests_failure(tokenizer, name):
    with pytest.raises(InvalidRequest, match=r"the chat template of .* rejects the messages: "):
        tokenizer.chat(HELLO, chat_template=FAILING[name])


@pytest.mark.parametrize("name", ["doubling by ~", "doubling a list", "doubling by a block", "a list times a number"])
def test_a_bomb_takes_little_memory(tokenizer, name):
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            tokenizer.chat(HELLO, chat_template=TOO_COSTLY[name])
        assert tracemalloc.get_traced_memory()[1] < 150 * MEBIBYTE
    finally:
        tracemalloc.stop()


def test_a_long_conversation_may_take_more_than_a_short_one(theirs):
    template = "{% for m in messages %}{{ m.content * 99 }}{% endfor %}"
    few, many = ([{"role": "user", "content": "word " * 50}] * count for count in (1, 2_000))
    assert len(render_chat(theirs, few, chat_template=template)) == 99 * 250
    with pytest.raises(TemplateTooCostly, match="writes far more"):
        render_chat(theirs, many, chat_template=template)
    assert len(render_chat(theirs, many, chat_template=template.replace("99", "5"))) == 2_000 * 5 * 250
    assert Meter.for_input(few).left < Meter.for_input(many).left < 10 * BASE_UNITS


def test_messages_themselves_may_be_bombs(tokenizer):
    shared: list[object] = ["a"]
    for _ in range(60):
        shared = [shared, shared]
    deep: list[object] = []
    for _ in range(99_999):
        deep = [deep]
    cycle: list[object] = []
    cycle.append(cycle)
    for content in (shared, deep, cycle, 1 << (MAX_BITS + 1)):
        with pytest.raises(InvalidRequest, match=r"holds more than|levels deep|whole number"):
            tokenizer.chat([{"role": "user", "content": content}])
        with pytest.raises(InvalidRequest, match=r"holds more than|levels deep|whole number"):
            tokenizer.chat(HELLO, tools=[{"name": content}])
    with pytest.raises(InvalidRequest, match="holds more than"):
        tokenizer.chat([{"role": "user", "content": "x" * (17 * MAX_INPUT)}])


def test_an_error_is_told_in_few_words(tokenizer):
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.chat(HELLO, chat_template="{{ raise_exception('no ' * 9999) }}")
    assert "no no" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_other_users_of_transformers_keep_their_environment(theirs, tokenizer):
    template = "{{ 'a'.encode() }}{{ 'x' | center(20000) | length }}"
    with pytest.raises(InvalidRequest):
        tokenizer.chat(HELLO, chat_template=template)
    assert theirs.apply_chat_template(HELLO, chat_template=template, tokenize=False) == "b'a'20000"


@pytest.mark.usefixtures("a_tenth")
def test_each_thread_has_a_meter_of_its_own(tokenizer):
    def render(number: int) -> object:
        template = TOO_COSTLY["nested loops"] if number % 4 == 0 else "{{ messages[0].content * 3 }}"
        try:
            return tokenizer.decode(tokenizer.chat(HELLO, chat_template=template))
        except InvalidRequest as error:
            return type(error)

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(render, range(16)))
    assert ended == [InvalidRequest if number % 4 == 0 else "Hello" * 3 for number in range(16)]


def test_a_meter_ends_with_its_rendering():
    with metered(Meter(5)) as outer:
        with metered(Meter(1)) as inner, pytest.raises(TemplateTooCostly):
            inner.charge(2)
        outer.charge(5)


def test_every_method_that_templates_get_was_looked_at():
    """What a new Python adds is not there for templates until somebody thinks about what it costs."""
    seen = {
        str: "encode isspace maketrans translate",
        list: "append clear extend insert pop remove reverse sort",
        tuple: "",
        dict: "clear fromkeys pop popitem setdefault update",
        int: "as_integer_ratio conjugate from_bytes to_bytes",
        float: "as_integer_ratio conjugate fromhex hex",
        range: "count index",
    }
    for kind, others in seen.items():
        assert METHODS[kind] <= {*dir(kind), "is_integer"}
        refused = {name for name in dir(kind) if not name.startswith("_")} - METHODS[kind]
        assert refused <= {*others.split(), "from_number"}, kind


def test_refused_filters_are_those_of_web_pages():
    assert {"pprint", "striptags", "urlize", "wordwrap"} == REFUSED


@pytest.mark.parametrize(
    ("value", "units"),
    [
        ("a", 1),
        ("a" * 160, 11),
        (None, 1),
        ([], 3),
        ([1, 2], 5),
        ({"a": "b" * 32}, 7),
        ([[[1]]], 10),
        ({1: 2}.items(), 8),
    ],
)
def test_what_a_value_weighs(value, units):
    assert weigh(value, 1000) == units
    assert weigh(value, units) == units
    if not isinstance(value, str | None):
        with pytest.raises(TemplateTooCostly):
            weigh(value, units - 1)


def test_how_deep_a_value_may_be():
    value: list[object] = []
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert weigh(value, 1000) == 3 * MAX_DEPTH
    with pytest.raises(TemplateTooCostly, match="nested"):
        weigh([value], 1000)
