"""Chat templates and messages made at random: a prompt, or `InvalidRequest`, soon."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hostile_values import check_brief, fuzz, hostile, mutated
from hypothesis import strategies as st

from preble.engine import template_meter
from preble.engine.template_filters import METHODS
from preble.engine.tokenizer import Tokenizer
from preble.errors import InvalidRequest

ATOMS = """messages messages[0] messages[-1].content m.role ns.a loop.index0 loop.length x tools bos_token self caller
none true 0 1 -1 2.5 10**9 99999 'a' '%s%9d' '{0}{1:>9}' '<b>&' '' [] {} () [1,'a'] {'a':1} range(9) range(99999)
varargs kwargs cycler joiner namespace dict range strftime_now raise_exception lipsum""".split()
FILTERS = """abs attr batch capitalize center count d default dictsort e filesizeformat first float forceescape format
groupby indent int items join last length list lower map max min pprint random reject rejectattr replace reverse round
safe select selectattr slice sort string striptags sum title tojson trim truncate unique upper urlencode urlize
wordcount wordwrap xmlattr""".split()
TESTS = """odd even divisibleby defined undefined none boolean false true integer float lower upper string mapping
number sequence iterable callable sameas escaped in eq ne gt ge lt le filter test""".split()
ATTRIBUTES = [*sorted(METHODS[str] | METHODS[list] | METHODS[dict] | METHODS[int]), "role", "content", "a", "next"]
ATTRIBUTES += "__class__ __init__ mro encode pop append update translate to_bytes gi_frame cycle changed name".split()
OPERATORS = [*"+ - * / // % ** ~ == != < <= and or in".split(), "not in", "is", "|"]
WIDE = ["10**9", "9999", "'x'*9999", "-1", "0.5", "none", "messages", "[1]*999", "'role'", "'a', 'b'"]


def expression(random: Random, depth: int = 0) -> str:
    """A random expression of jinja, most of them sensible."""
    if depth > 3 or random.random() < 0.25:
        return random.choice(ATOMS)

    def inner() -> str:
        return expression(random, depth + 1)

    def given() -> str:
        return ", ".join(random.choice((inner(), random.choice(WIDE))) for _ in range(random.choice((0, 1, 1, 2))))

    match random.randrange(9):
        case 0 | 1:
            operator = random.choice(OPERATORS)
            if operator == "is":
                return f"({inner()} is {random.choice(TESTS)}({given()}))"
            if operator == "|":
                return f"({inner()} | {random.choice(FILTERS)})"
            return f"({inner()} {operator} {inner()})"
        case 2 | 3:
            return f"({inner()} | {random.choice(FILTERS)}({given()}))"
        case 4:
            return f"{inner()}.{random.choice(ATTRIBUTES)}({given()})"
        case 5:
            return f"{inner()}[{random.choice((inner(), ':', '::-1', '1:', ':-1'))}]"
        case 6:
            return f"[{inner()}, {inner()}]"
        case 7:
            return f"({inner()} if {inner()} else {inner()})"
        case _:
            return f"{{{inner()}: {inner()}}}"


def template(random: Random, depth: int = 0) -> str:
    """A random template."""
    parts = []
    for _ in range(random.randrange(1, 3)):
        body = template(random, depth + 1) if depth < 2 else "text"
        value = expression(random)
        parts.append(
            random.choice(
                (
                    f"{{{{ {value} }}}}",
                    f"{{{{ {value} }}}}",
                    f"{{% for m in {value} %}}{body}{{% endfor %}}",
                    f"{{% for m in messages %}}{body}{{% endfor %}}",
                    f"{{% for m in range(99999) if {value} %}}{body}{{% endfor %}}",
                    f"{{% for m in {value} recursive %}}{body}{{{{ loop(m) }}}}{{% endfor %}}",
                    f"{{% if {value} %}}{body}{{% elif x %}}{body}{{% else %}}.{{% endif %}}",
                    f"{{% set x = {value} %}}",
                    f"{{% set x %}}{body}{{{{ x }}}}{{{{ x }}}}{{% endset %}}",
                    f"{{% set ns = namespace(a={value}) %}}{{% for i in range(99) %}}{{% set ns.a = [ns.a, ns.a] %}}"
                    f"{{% endfor %}}{{{{ {value} }}}}",
                    f"{{% macro f(a, b=1) %}}{body}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f({value}) }}}}",
                    f"{{% call f({value}) %}}{body}{{% endcall %}}",
                    f"{{% filter {random.choice(FILTERS)} %}}{body}{{% endfilter %}}",
                    f"{{% with x = {value} %}}{body}{{% endwith %}}",
                    f"{{% generation %}}{body}{{% endgeneration %}}",
                    f"{{% autoescape true %}}{body}{{% endautoescape %}}",
                    f"{{% block b{random.randrange(9**9)} %}}{body}{{% endblock %}}",
                )
            )
        )
    return "".join(parts)


SHARING = 4
"""Conversations that each template lays out."""
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", ""]), "content": CONTENT},
        optional={"tool_calls": CONTENT, "name": CONTENT, "reasoning_content": CONTENT},
    ),
    min_size=1,
    max_size=4,
)


def test_templates(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limits' place does not matter here, and lower ones leave time for more templates.
    monkeypatch.setattr(template_meter, "BASE_UNITS", 50_000)
    tokenizer = Tokenizer(llama)
    own = (llama / "chat_template.jinja").read_text()
    ended = {"prompt": 0, "refused": 0}

    def attempt(messages: list[dict[str, Any]], random: Random) -> None:
        source = own if random.random() < 0.2 else template(random)
        if random.random() < 0.2:
            source = mutated(source.encode(), random).decode(errors="replace")
        if random.random() < 0.1:
            messages = [*messages, {"role": "user", "content": hostile(random)}]
        try:
            tokenizer.chat(
                messages, tools=random.choice((None, [{"a": 1}])), chat_template=source, tone=hostile(random)
            )
        except InvalidRequest as error:
            check_brief(error)
            ended["refused"] += 1
        else:
            ended["prompt"] += 1

    fuzz("templates", 10, MESSAGES, attempt, each=SHARING)
    assert min(ended.values()) > sum(ended.values()) // 20
