"""A conversation laid out by a checkpoint's chat template, which is treated as a hostile program.

It is rendered by transformers, so that a conversation looks as the publisher meant it, in jinja's sandbox, where it
reaches no attribute that is not meant for it; and metered, so that no template takes memory or time out of proportion
to the conversation (see `preble.engine.template_meter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

from jinja2 import Template

from preble.engine.template_environment import MeteredEnvironment
from preble.engine.template_meter import Meter, TemplateTooCostly, metered

MAX_TEMPLATE = 256 * 1024
"""Characters of a template. The largest published ones have a tenth of that."""


def render_chat(
    tokenizer: Any,
    conversation: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    chat_template: str | None = None,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """What transformers' `apply_chat_template` of `tokenizer` renders, as text.

    Raises `TemplateTooCostly` where the template or what it is given goes beyond the limits, and whatever the template
    and transformers raise.
    """
    source = tokenizer.get_chat_template(chat_template, tools)
    with metered(Meter.for_input(conversation, tools, variables)):
        rendered, _ = _renderer()(
            # APIs hand on fields that are null, where templates expect them to be absent: as in apply_chat_template.
            conversations=[[{k: v for k, v in message.items() if v is not None} for message in conversation]],
            tools=tools,
            chat_template=source,
            continue_final_message=continue_final_message,
            **{**tokenizer.special_tokens_map, **variables},
        )
    return str(rendered[0])


@lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    """The compiled template; `TemplateTooCostly` when it is too long."""
    if not isinstance(source, str):
        raise TypeError(f"a chat template must be a string, not {type(source).__name__}")
    if len(source) > MAX_TEMPLATE:
        raise TemplateTooCostly(f"it has {len(source)} characters, more than {MAX_TEMPLATE}")
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> MeteredEnvironment:
    from transformers.utils import chat_template_utils

    return MeteredEnvironment(chat_template_utils._compile_jinja_template("").environment)


@lru_cache(maxsize=1)
def _renderer() -> Callable[..., tuple[list[str], Any]]:
    """transformers' function around the template, which compiles with ours instead of its own compiler.

    A function with other globals, and not a patch of their module: what else uses transformers keeps its own.
    """
    from transformers.utils import chat_template_utils

    theirs: Any = chat_template_utils.render_jinja_template
    names = {**vars(chat_template_utils), "_compile_jinja_template": compile_template}
    renderer = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    renderer.__kwdefaults__ = theirs.__kwdefaults__
    return renderer
