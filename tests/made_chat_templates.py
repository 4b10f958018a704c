"""Chat templates in the style of published ones: what they use of jinja, in words of our own."""

from __future__ import annotations

CHATML_TOOLS = """\
{%- if tools %}
    {{- '<|start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{% else %}{{- 'Be of help.' }}{%- endif %}
    {{- "\\n\\nYou can call these functions:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|start|>system\\n' + messages[0].content + '<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|start|>' + message.role + '\\n' + message.content + '<|end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<|end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|start|>user' }}{%- endif %}
        {{- '\\n<response>\\n' }}{{- message.content }}{{- '\\n</response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}
"""

THINKING = """\
{%- set ns = namespace(asking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.asking and message.role == "user" and message.content is string
           and not(message.content.startswith('<response>') and message.content.endswith('</response>')) %}
        {%- set ns.asking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = "" %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|end|>\\n' }}
    {%- else %}
        {{- '<|start|>' ~ message.role ~ '\\n' ~ content ~ '<|end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|head|>system<|tail|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: notebook\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}{{- system }}{{- "<|turn|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception("There is no user message to put the tools into") }}{%- endif %}
    {{- '<|head|>user<|tail|>\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|turn|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|tail|>\\n\\n'+ message['content'] | trim + '<|turn|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("One call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|tail|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}" }}{{- "<|turn|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|head|>ipython<|tail|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|turn|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|tail|>\\n\\n' }}{%- endif %}
"""

BRACKETS = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("user and assistant must take turns: " ~ message.role) }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function|tojson %}{{- out[:-1] }}
            {%- if not call.id is defined or call.id|length != 9 %}
                {{- raise_exception("ids have nine letters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] in ("tool_results", "tool") %}
        {{- '[RESULTS] {"content": ' + message.content|string + ', "id": "' + message.tool_call_id + '"}[/RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

MACROS = """\
{%- macro kind(spec) -%}
    {%- if spec.type == 'array' -%}{{ kind(spec['items']) }}[]
    {%- elif spec.enum -%}{{ spec.enum | map('tojson') | join(' | ') }}
    {%- else -%}{{ spec.type | default('any', true) | upper | lower }}{%- endif -%}
{%- endmacro -%}
{%- macro wrapped(role) -%}<{{ role | title }}>{{ caller() }}</{{ role | title }}>{%- endmacro -%}
{%- for tool in tools or [] -%}
    {%- set params = tool.function.parameters -%}
    {{ tool.function.name }}({% for name, spec in params.properties | dictsort -%}
    {{ name }}{{ '' if name in params.required else '?' }}: {{ kind(spec) }}{{ ', ' if not loop.last }}
    {%- endfor %}) // {{ tool.function.description.replace('\\n', ' ')[:60] }}
{% endfor -%}
{%- for message in messages recursive -%}
    {%- if loop.changed(message.role) -%}{{ '%s #%d' % (message.role, loop.index) }}|{%- endif -%}
    {%- call wrapped(message.role) -%}
    {%- if message.role == 'assistant' -%}{% generation %}{{ message.content }}{% endgeneration %}
    {%- elif message.content is not string and message.content is iterable -%}
        {%- for part in message.content -%}
            {{ part.text if part.type == 'text' else '<' ~ part.type ~ '>' }}
        {%- endfor -%}
    {%- else -%}{{ message.content | replace('  ', ' ') | indent(2) }}{%- endif -%}
    {%- endcall -%}
    {%- if message.tool_calls -%}{{ message.tool_calls | map(attribute='function.name') | unique | sort | join(',') }}
    {%- endif -%}
{%- endfor -%}
{%- filter trim %} {{ messages | rejectattr('role', 'in', ['tool']) | list | length * 2 + 1 }} {% endfilter -%}
{%- set total = messages | map(attribute='content') | select('string') | map('length') | sum -%}
{{ '{:>6} {}'.format(total, total // 3 % 7 - 2 ** 3) }}{{ '=' * 3 + ([1] * 2) | string }}
{%- if 1 < total <= 10 ** 9 and 'x' not in 'abc' %}{{ cycler('a', 'b').next() }}{{ joiner(', ')() }}{% endif -%}
"""

TEMPLATES = {
    "chatml_tools": CHATML_TOOLS,
    "thinking": THINKING,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "macros": MACROS,
}


def tools(count: int = 3) -> list[dict[str, object]]:
    """Descriptions of functions, as a model is told them."""
    return [
        {
            "type": "function",
            "function": {
                "name": f"search_{number}",
                "description": f"Look for a word\nin the archive number {number} — “é” & <b>.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "words": {"type": "array", "items": {"type": "string"}, "description": "what to look for"},
                        "limit": {"type": "integer", "minimum": 1, "default": 10},
                        "order": {"enum": ["new", "old"], "type": "string"},
                    },
                    "required": ["words"],
                },
            },
        }
        for number in range(count)
    ]


def conversation(count: int) -> list[dict[str, object]]:
    """A conversation with a system message, calls of a tool and their results, of `count` messages."""
    messages: list[dict[str, object]] = [{"role": "system", "content": " You answer  briefly. "}]
    for number in range(count):
        step = number % 4
        if step == 0:
            messages.append({"role": "user", "content": f"Question {number}: what is  “ß”?\n" + "Please. " * 20})
        elif step == 1:
            call = {"name": "search_0", "arguments": {"words": ["ß", f"{number}"], "limit": 3}}
            messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": call}],
                }
            )
        elif step == 2:
            messages.append({"role": "tool", "content": f"It is a letter. {number}", "tool_call_id": "a1b2c3d4e"})
        else:
            content = f"<think>\nHm, {number}.\n</think>\n\nA letter."
            messages.append({"role": "assistant", "content": content, "reasoning_content": None})
    return messages[: count + 1]
