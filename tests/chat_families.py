"""Chat templates in the manner of the families that people use, written for these tests, and a vocabulary for all."""

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

# Special tokens of many families, and tokens that are not special but found in any text.
SPECIAL = (
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<bos>", "<eos>",
    "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "[INST]", "[/INST]", "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|start_of_role|>", "<|end_of_role|>", "<reserved_106>", "<reserved_107>",
)  # fmt: skip
ADDED = ("<tool_call>", "</tool_call>", "<end_of_utterance>")
STRIPPING = ("<|end|>", "<|user|>", "<|assistant|>")  # they take the white space behind them, as Phi-3's

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FAMILIES = {
    "chatml": CHATML,
    "chatml-lines": """
{%- for m in messages %}
    <|im_start|>{{ m.role }}
    {% if m.role == 'system' %}
{{ m.content | trim }}
    {% else %}
{{ m.content }}
    {% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{% if loop.first and system != false %}{% set content = '<<SYS>>\\n' + system + "
        "'\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% set ns = namespace(first=true) %}{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] "
        "+ '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if ns.first %}"
        "{% set content = bos_token + content %}{% set ns.first = false %}{% endif %}{{ content }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "llama3.1": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "mistral-v3": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{{- "" if user_messages | length else raise_exception("no user") }}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "phi3": (
        "{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}{{'<|system|>\n' + m['content'] + "
        "'<|end|>\n'}}{% elif m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}"
        "{% elif m['role'] == 'assistant' %}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi4-mini": (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
        "{{ '<|' + 'assistant' + '|>' }}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "qwen2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- "# Tools\\n" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<tool_call>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen3": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "deepseek-r1": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}{%- for m in messages %}"
        "{%- if m['role'] == 'system' %}{% set ns.system_prompt = m['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for m in messages %}{%- if m['role'] == 'user' %}"
        "{{'<\uff5cUser\uff5c>' + m['content']}}{%- endif %}{%- if m['role'] == 'assistant' and m['content'] is not none %}"
        "{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
        "{% endif %}{{'<\uff5cAssistant\uff5c>' + content + eos_token}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}"
    ),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
        "{% else %}{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}"
        "{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}{{ 'ASSISTANT:' }}"
    ),
    "alpaca": """{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}

{% elif m.role == 'user' %}### Instruction:
{{ m.content }}

{% else %}### Response:
{{ m.content }}{{ eos_token }}

{% endif %}{% endfor %}### Response:
""",
    "command-r": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
        "{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}{% set content = m['content'] %}"
        "{% if m['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + "
        "'<|END_OF_TURN_TOKEN|>' }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    "olmo": (
        "{{ '<|endoftext|>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% if not loop.last %}"
        "{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + m['content'] }}"
        "{% endif %}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% if loop.last %}"
        "{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "smollm2": (
        "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a "
        "helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}<|im_start|>{{ m.role | lower }}\n{{ m.content }}"
        "<end_of_utterance><|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    ),
    "tinyllama": (
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n{% else %}\n"
        "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}"
        "\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "falcon": (
        "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ m['role'] | capitalize }}: "
        "{{ m['content'].replace('\r\n', '\n').replace('\n\n', '\n') | trim }}\n{% endfor %}\nFalcon:"
    ),
    "generation-tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}<|im_start|>assistant\n"
    ),
    "gpt-oss": """{%- macro turn(role, channel, content) -%}
    {{- "<|start|>" + role }}{% if channel %}{{ "<|channel|>" ~ channel }}{% endif %}
    {{- "<|message|>" + content + "<|end|>" }}
{%- endmacro -%}
{%- macro system(identity="You are ChatGPT.") -%}
    {{- identity + "\\n" }}{{ "Knowledge cutoff: 2024-06\\n" }}{{ "# Valid channels: " ~ ['analysis', 'final'] | join(', ') }}
{%- endmacro -%}
{{- turn('system', none, system()) }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- turn('assistant', 'final', m.content) }}
    {%- else %}
        {{- turn('developer' if m.role == 'system' else m.role, none, m.content) }}
    {%- endif %}
{%- endfor %}<|start|>assistant""",
    "namespace": (
        "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.text = ns.text ~ '<|im_start|>' ~ m.role ~ ' ' ~ ns.n ~ '\n' ~ m.content ~ '<|im_end|>' %}"
        "{% endfor %}{{ ns.text.strip() }}<|im_start|>assistant"
    ),
    "lookup": (
        "{% set names = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} %}"
        "{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' ~ names[m.role] ~ m.content }}"
        "{{ ['<|END_OF_TURN_TOKEN|>', '\n'] | join }}{% endfor %}{{ names.get('assistant') }}"
    ),
    "captured": (
        "{% set body %}{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
        "<|end_of_text|>\n{% endfor %}{% endset %}{% filter trim %}  {{ body }}{% endfilter %}<|start_of_role|>assistant"
        "<|end_of_role|>"
    ),
    "loop-controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}"
        "{% endif %}<reserved_10{{ '6' if m.role == 'user' else '7' }}>{{ m.content }}{% endfor %}<reserved_107>"
    ),
    "format-filter": (
        "{% for m in messages %}{{ '<|im_start|>%s\n%s<|im_end|>\n' | format(m.role, m.content) }}"
        "{{ '%s|' % m.role }}{{ '%-9s%d' % (m.role, loop.index) }}{% endfor %}"
    ),
    "str-format": (
        "{% for m in messages %}{{ '<|im_start|>{}\n{}<|im_end|>\n'.format(m.role, m.content) }}"
        "{{ '<|{role}|>{1}'.format('', m.content, role=m.role) }}{{ '{:>9}{!r}'.format(m.role, 1) }}{% endfor %}"
    ),
    "formats": (
        "{% for m in messages %}{{ '<|im_start|>%(role)s\n%(text)s<|im_end|>' % {'role': m.role, 'text': m.content} }}"
        "{{ '<|im_start|>{}:{:>3}|{0.role}'.replace('0.role', 'm[role]').replace('{}', '{i}').replace('{:>3}', '{i:>3}')"
        ".format(i=loop.index, m=m) }}{{ '<|user|>{:s}<|end|>'.format(m.role) }}{{ '<|system|>%5.1f' % loop.index }}"
        "{{ '[INST]{role!r}'.format_map({'role': 1}) }}{% endfor %}"
    ),
    "methods": (
        "{% for m in messages %}{{ '<|im_start|>'.center(30) ~ '<|im_end|>'.ljust(12, '*') ~ '<|user|>'.rjust(12) }}"
        "{{ '<|END|>'.casefold() ~ '<S>'.swapcase() ~ '<|\t|>'.expandtabs(2) ~ '[INST]'.zfill(9) }}"
        "{{ '(|im_end|)'.translate(''.maketrans('()', '<>')) ~ '<|end|>:'.partition(':')[0] ~ m.content.replace('', '|') }}"
        "{{ 'x<|end|>'.removeprefix('x') ~ '<|user|>\n<|end|>'.splitlines() | join('<s>') }}{% endfor %}"
    ),
    "filters": (
        "{% for m in messages %}{{ '<|im_start|>' | safe }}{{ m.content | safe }}{{ ('<|im_end|>' ~ m.role) | indent(2) }}"
        "{{ ('[INST]' ~ m.content) | e }}{{ ('<|user|> ' ~ m.content) | wordwrap(12) }}{{ '<|end|>' | center(20) }}"
        "{{ ['[INST]', m.role] | tojson }}{{ ('[inst] ' ~ m.role) | title }}{{ [m.role, '<s>'] | join(5) }}"
        "{{ [m.role, '<|end|>'] | join(none) }}{{ ('<|user|>' ~ m.content) | truncate(12, true, '</s>') }}"
        "{{ ['<s>', m.role, '</s>'] | batch(2, '<eos>') | map('join', '<|end|>') | join }}{{ '<|user|>%s' | format(3) }}"
        "{% set b %}<|start|>{{ m.role | upper }}{% endset %}{{ b | list | join }}{% endfor %}"
    ),
    "pieces": (
        "{% for m in messages %}{% for name in '<|im_start|>,<|im_end|>'.split(',') %}{% if loop.first %}{{ name }}"
        "{{ m.role }}\n{{ m.content.splitlines() | map('trim') | join('\n') }}{% else %}{{ name }}{% endif %}"
        "{% endfor %}{% endfor %}{{ '<|im_start|>assistant\n||'.partition('||')[0].rstrip() }}"
    ),
    "call-block": (
        "{% macro turn(role) %}<|im_start|>{{ role }}\n{{ caller(role) }}<|im_end|>\n{% endmacro %}{% for m in messages %}"
        "{% call(role) turn(m.role) %}{{ role | upper }}: {{ m.content }}{% endcall %}{% endfor %}"
    ),
    "recursive": (
        "{% for m in [messages] recursive %}{% if m is mapping %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>"
        "{% else %}{{ loop(m) }}{% endif %}{% endfor %}"
    ),
    "json": (
        "{{ {'a': [1, 'x<y']} | tojson }}{{ messages[0] | tojson(indent=2) }}{{ 'caf\u00e9' | tojson(ensure_ascii=true) }}"
        "{% for m in messages %}<|user|>{{ m.content | tojson }}{% endfor %}{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}"
    ),
    "special-tokens": (
        "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{% if cls_token is defined %}!{% endif %}"
        "{{ image_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ),
    "odds": (
        "{# a comment #}{% raw %}{{ not this }}{% endraw %}{% set a, b = '<|im_', 'end|>' %}{% for m in messages %}"
        "{{ a ~ 'start|>' }}{{ loop.previtem.content if loop.previtem is defined else '-' }}{{ m.content[:9] }}"
        "{{ m.content[-5:] | reverse }}{{ m.content | length }}{{ a + b }}{{ loop.cycle('<|user|>', '<|system|>') }}"
        "{{ m.content | replace('the', '<|im_end|>', 1) }}{{ 'y' if m.content is string }}{% endfor %}"
        "{{ '<|user|>' * 2 }}{{ dict(a='<|end|>').a }}{{ messages | map(attribute='role') | join(', ') }}"
        "{{ '<|USER|>' | lower }}{{ ['<|system|>', 'x'] | first }}{{ '  <|user|>  '.strip() }}"
        "{{ '<|user|>x'.removesuffix('x') }}{{ messages[0].content | e }}{{ messages[-1].content | indent(2) }}"
    ),
}  # fmt: skip


def many_names() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer with all these tokens."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    words = ["the old man and the sea", "user assistant system", "im_start im_end INST think </think> <think>"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    built.train_from_iterator(words, trainer)
    for name in SPECIAL:
        token = AddedToken(name, special=True, normalized=False, rstrip=name in STRIPPING)
        built.add_special_tokens([token])
    built.add_tokens([AddedToken(name, special=False, normalized=False) for name in ADDED])
    return built
