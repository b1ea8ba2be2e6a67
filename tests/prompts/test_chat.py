"""Conversations reach the models whole: messages, tools, dates, thinking, control tokens."""

from __future__ import annotations

import json
from datetime import date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.normalizers import Replace

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.prompts.chat import SEAM
from tests.vocabulary.conftest import CHATML, END, KINDS, make_tokenizer, trained, vocabulary_of

TOOLS_TEMPLATE = (
    "{%- if tools %}TOOLS {{ tools | tojson }}\n{% endif -%}"
    "{%- for m in messages -%}"
    "<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}"
    "{%- if m.content %}{{ m.content }}{% endif -%}"
    "{%- for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor -%}"
    "{%- if m.tool_call_id %} for {{ m.tool_call_id }}{% endif -%}"
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "Use the tool.",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "Add."}
EVERY_PART = ["TOOLS", "Use the tool.", '<call>add {"a": 2}</call>', "tool add4 for c1"]


def renderer_of(template: str | None = CHATML, **options: Any) -> PromptRenderer:
    vocabulary = vocabulary_of(make_tokenizer(chat_template=template))
    return PromptRenderer(PromptConfig(**options), vocabulary)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_calls_results_and_reasoning_reach_the_template(tools: Any) -> None:
    """Guards: `tools`, `tool_calls`, `reasoning_content`, `name`, `tool_call_id` and a tool's
    result after the last user turn left out of the prompt, with exit code 0.
    """
    renderer = renderer_of(TOOLS_TEMPLATE)
    row = {"messages": [QUESTION, CALL, RESULT, {"role": "assistant", "content": "It is four."}]}
    text = renderer.render(row | {"tools": tools}).student_text
    assert all(part in text for part in EVERY_PART)
    assert text.endswith("4 for c1<|im_end|>\n<|im_start|>assistant\n")
    again = {"messages": [*row["messages"], {"role": "user", "content": "And now?"}]}
    text = renderer.render(again | {"tools": tools}).student_text
    assert all(part in text for part in [*EVERY_PART, "It is four.", "And now?"])


def test_messages_are_what_the_stock_template_gets() -> None:
    """Guards: a prompt that differs from `apply_chat_template` on the row's own messages."""
    tokenizer = make_tokenizer(chat_template=TOOLS_TEMPLATE)
    developer = {"role": "developer", "content": "Be brief."}
    messages = [developer, QUESTION, CALL, RESULT, {"role": "user", "content": "Why?"}]
    rendered = PromptRenderer(PromptConfig(), vocabulary_of(tokenizer)).render(
        {"messages": messages, "tools": [TOOL]}
    )
    assert rendered.student_text == tokenizer.apply_chat_template(
        messages, tools=[TOOL], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(
    "messages",
    [
        json.dumps([QUESTION]),
        json.dumps(QUESTION),
        QUESTION,
        {"role": ["user"], "content": ["Add."]},
        [{"role": "user", "content": [{"type": "text", "text": "Add."}]}],
        [{"role": "user", "content": {"type": "text", "text": "Add."}}],
        [{"role": "user", "content": "Add.", "tool_calls": None, "name": None}],
        "Add.",
        b"Add.",
    ],
)
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_every_form_of_messages_is_one_conversation(messages: Any, column: str) -> None:
    """Guards: JSON text or the repr of an object shown to the models as the problem."""
    text = renderer_of().render({column: messages}).student_text
    assert text == "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "[{'role': 'user', 'content': 'x'}]"}, "no JSON"),
        ({"messages": '[{"role": "user"'}, "no JSON"),
        ({"messages": [{"role": "user", "text": "x"}]}, "no object with `role` and `content`"),
        ({"messages": [{"role": "user"}]}, "no object with `role` and `content`"),
        ({"messages": [QUESTION], "tools": "a hammer"}, "column 'tools' is a text, but no JSON"),
        ({"messages": [QUESTION], "tools": [1]}, "column 'tools' is no list of objects"),
        ({"messages": [QUESTION, {**CALL, "tool_calls": "add("}, RESULT]}, "`tool_calls` is a"),
        ({"problem": b"\xff\xd8\xff"}, "column 'problem' holds 3 bytes, no text"),
    ],
)
def test_messages_of_no_known_form_are_a_failed_row(row: dict[str, Any], reason: str) -> None:
    """Guards: half a conversation, or the repr of bytes, sampled as if it were the problem."""
    with pytest.raises(PromptError, match=reason):
        renderer_of(TOOLS_TEMPLATE).render(row)


def test_text_that_looks_like_json_stays_a_problem() -> None:
    """Guards: problems about JSON, and columns called `tools` that hold none, failing."""
    problem = '[{"name": "x"}] is how long?'
    renderer = renderer_of()
    for row in ({"problem": problem}, {"problem": '{"a": 1}'}, {"problem": "p", "tools": "saw"}):
        assert row["problem"] in renderer.render(row).student_text


BY_ID = TOOLS_TEMPLATE.replace("{{ c.function.name }}", "{{ c.id }}")


@pytest.mark.parametrize("arguments", [{"a": 2}, {}, '{"a": 2}', "{}"])
def test_tool_calls_may_be_shown_by_their_ids(arguments: Any) -> None:
    """Guards: conversations refused because a template shows the id of a call, not its name."""
    call = {"id": "functions.add:0", "function": {"name": "add", "arguments": arguments}}
    row = {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}, RESULT]}
    text = renderer_of(BY_ID).render(row).student_text
    assert f"<call>functions.add:0 {arguments}</call>" in text


def test_system_prompt_of_the_config_replaces_a_developers() -> None:
    """Guards: two system prompts that contradict each other."""
    row = {"messages": [{"role": "developer", "content": "theirs"}, QUESTION]}
    text = renderer_of(student_system_prompt="ours").render(row).student_text
    assert text.startswith("<|im_start|>developer\nours<|im_end|>\n<|im_start|>user\nAdd.")


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_template_that_wants_parts_is_given_parts() -> None:
    """Guards: an empty user turn of a template that iterates over content parts."""
    row = {"messages": [{"role": "system", "content": "S"}, QUESTION]}
    assert renderer_of(PARTS).render(row).student_text == renderer_of().render(row).student_text


def test_template_that_needs_a_content_is_given_an_empty_one() -> None:
    """Guards: tool calls refused by templates that join `content` to other text (Qwen3)."""
    joined = TOOLS_TEMPLATE.replace("{%- if m.content %}", "{{- '' + m.content -}}{%- if false %}")
    text = renderer_of(joined).render({"messages": [QUESTION, CALL, RESULT]}).student_text
    assert "<call>add" in text


NO_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
LAST_ONLY = "<|im_start|>{{ messages[-1].content }}<|im_end|>"
CUT = CHATML.replace("m['content']", "m['content'][:40]")
TURNS = [QUESTION, {"role": "assistant", "content": "2"}, QUESTION]


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (NO_SYSTEM, {"messages": [{"role": "system", "content": "S"}, QUESTION]}, "system prompt"),
        (LAST_ONLY, {"messages": TURNS}, r"turn 0 \(user\), turn 1 \(assistant\)"),
        (LAST_ONLY, {"messages": [QUESTION, CALL, RESULT]}, "the user turn"),
        (CHATML, {"messages": [QUESTION, CALL, RESULT]}, "the reasoning of turn 1, the tool calls"),
        (CHATML, {"messages": [QUESTION], "tools": [TOOL]}, "the tools"),
    ],
)
def test_part_that_a_template_leaves_out_fails_the_row(
    template: str, row: dict[str, Any], lost: str
) -> None:
    """Guards: a system prompt, a history, a tool call that never reached the model."""
    renderer = renderer_of(template)
    renderer.render({"problem": "p"})
    for _ in range(2):  # the second time from the cache
        with pytest.raises(PromptError, match=f"the student's chat template leaves out.*{lost}"):
            renderer.render(row)


@pytest.mark.parametrize(
    ("template", "options", "reason"),
    [
        (NO_SYSTEM, {"teacher_system_prompt": "HINT"}, "teacher's .* leaves out the system prompt"),
        (NO_SYSTEM, {"student_system_prompt": "S"}, "student's .* leaves out the system prompt"),
        ("<|im_start|>", {}, "leaves out the user turn"),
        (CHATML + "{{ range(99999) | random }}", {}, "in different ways"),
    ],
)
def test_part_of_the_config_that_a_template_leaves_out_fails_at_start(
    template: str, options: dict[str, Any], reason: str
) -> None:
    """Guards: a teacher's hint that no prompt shows, found out after the run."""
    with pytest.raises(ConfigError, match=reason):
        renderer_of(template, **options)


CUTS = {
    "system": "{% set c = m.content[:40] if m.role == 'system' else m.content %}",
    "user": "{% set c = m.content[:40] if not loop.last else m.content %}",
    "assistant": "{% set c = m.content[:40] if m.role == 'assistant' else m.content %}",
}
LONG = "one two three four five six seven\neight nine ten eleven twelve"


@pytest.mark.parametrize("role", CUTS)
def test_long_turns_that_a_template_cuts_are_failed_rows(role: str) -> None:
    """Guards: markers that are shorter than what a template shows of a system prompt, of an
    earlier turn or of an answer."""
    template = (
        "{% for m in messages %}" + CUTS[role] + "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = renderer_of(template)

    def row(text: str) -> dict[str, Any]:
        turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "last")]
        return {
            "messages": [
                {"role": name, "content": text if name == role and content != "last" else content}
                for name, content in turns
            ]
        }

    renderer.render(row("short"))
    with pytest.raises(PromptError, match=rf"chat template changes .*{role}"):
        renderer.render(row(LONG))


def test_what_templates_take_out_on_purpose_is_no_failure() -> None:
    """Guards: rows refused for a switch in their system prompt, for reasoning in an earlier
    answer, or for the form in which a template writes the result of a tool."""
    template = (
        "{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'system' %}{% set c = c.replace('/no_think', '').rstrip() %}{% endif %}"
        "{% if m.role == 'assistant' %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
        "{% if m.role == 'tool' %}{% set c = c | tojson %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    contents = {
        "system": f"{LONG} /no_think",
        "user": LONG,
        "assistant": f"<think>\n{LONG}</think>\n\n{LONG}",
        "tool": f'{{"a": "{LONG}"}}',
    }
    messages = [{"role": name, "content": content} for name, content in contents.items()]
    only_reasoning = {"role": "assistant", "content": f"<think>{LONG}</think>"}
    messages += [{"role": "user", "content": "why?"}, only_reasoning]
    messages.append({"role": "user", "content": "last"})
    renderer_of(template).render({"messages": messages})


def test_long_user_turn_that_a_template_cuts_is_a_failed_row() -> None:
    """Guards: a template that shows the first characters of a turn."""
    renderer = renderer_of(CUT)
    renderer.render({"problem": "short"})
    with pytest.raises(PromptError, match="changes the user turn"):
        renderer.render({"problem": "x" * 41})


def test_plain_text_cannot_show_tools() -> None:
    """Guards: tool calls left out of the prompt of a base model."""
    renderer = renderer_of(None)
    with pytest.raises(PromptError, match="plain text, which has no reasoning_content"):
        renderer.render({"messages": [QUESTION, CALL, RESULT]})
    with pytest.raises(PromptError, match="plain text, which has no tools"):
        renderer.render({"messages": [QUESTION], "tools": [TOOL]})


FORMATS = ["%d %b %Y", "%Y-%m-%d %H:%M:%S", "%-d/%-m %% %A, %j", "100%%", "plain", "%B%y%p"]


@pytest.mark.parametrize("format", FORMATS)
def test_date_of_a_template_is_that_of_the_run(format: str) -> None:
    """Guards: prompts, and so ids, that change with the clock."""
    template = "{{- strftime_now('" + format + "') }}|" + CHATML
    vocabulary = vocabulary_of(make_tokenizer(chat_template=template))
    day = date(2024, 7, 6)
    renderer = PromptRenderer(PromptConfig(), vocabulary, day=day)
    text = renderer.render({"problem": "p"}).student_text
    assert text.startswith(datetime(2024, 7, 6).strftime(format) + "|<|im_start|>")
    assert renderer.prints_date
    assert not renderer_of().prints_date


def test_template_without_a_date_is_rendered_unchanged() -> None:
    """Guards: the pinned clock changing the spaces at the start of a template."""
    for start in ("\n\n  ", "  {%- if true %}", "{%- if true -%}\n"):
        template = start + "{% if strftime_now is defined and false %}{% endif %}x" + CHATML
        template += "{% endif %}" if "if true" in start else ""
        tokenizer = make_tokenizer(chat_template=template)
        rendered = PromptRenderer(PromptConfig(), vocabulary_of(tokenizer)).render({"problem": "p"})
        messages = [{"role": "user", "content": "p"}]
        assert rendered.student_text == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )


@pytest.mark.parametrize("opening", ["<reasoning>", "◁think▷", "<|START_THINKING|>"])
def test_open_block_is_found_whatever_its_marker(opening: str) -> None:
    """Guards: a teacher that reasons mixed with a student that answers, because its marker is none
    of a fixed list.
    """
    opens = CHATML.replace("assistant\n", f"assistant\n{opening}\n")
    pair = make_tokenizer(), make_tokenizer(chat_template=opens)
    with pytest.raises(ConfigError, match="the teacher's prompt ends inside an open"):
        PromptRenderer(PromptConfig(), vocabulary_of(*pair))


@pytest.mark.parametrize(
    ("template", "name"), [("{{problem}}", "problem"), ("{{question}} {{answer}}", "answer")]
)
def test_doubled_braces_are_named_at_start(template: str, name: str) -> None:
    """Guards: every row of a run given the prompt `{problem}`."""
    for role in ("student", "teacher"):
        config = PromptConfig(**{f"{role}_template": template})
        with pytest.raises(ConfigError, match=f"the {role}'s template writes the text .{name}."):
            PromptRenderer(config, vocabulary_of(), columns=["question", "answer"])


def test_template_without_a_column_is_noted() -> None:
    """Guards: `{ problem }`, `$problem` or `Solve it.` that make one prompt of all rows."""
    for template in ("{ problem }", "$problem {answer:>3}", "Solve it."):
        assert renderer_of(teacher_template=template).notes == (
            "the teacher's template shows no column: all its user turns are equal",
        )
    assert renderer_of(student_template="{problem}: answer as {{problem}}").notes == ()


def test_control_tokens_in_rows_are_counted() -> None:
    """Guards: a row that ends its own turn, without a word."""
    rows = [
        {"problem": "a"},
        {"problem": f"b{END}"},
        {"messages": [{"role": "system", "content": "<|im_start|>"}, QUESTION]},
        {"problem": "c", "answer": END},
        {"problem": "c", "unused": END},
        {"problem": None},
    ]
    (note,) = renderer_of(teacher_template="{problem} {answer}").row_notes(rows)
    assert note.startswith("3 rows hold texts that are control tokens, such as '<|im_end|>'")
    assert renderer_of(literal_control_tokens=True).row_notes(rows) == []
    assert renderer_of().row_notes(rows[:1]) == []


CONTROL = st.sampled_from(["<|im_start|>", END, "<think>", "</think>", "<|", "|>", " ", "\n", "é"])


@given(st.lists(CONTROL | st.text(max_size=3), min_size=1).map("".join).filter(str.strip))
def test_literal_control_tokens_are_ordinary_text(text: str) -> None:
    """Guards: control ids that a row brings in, or text that is lost on the way around them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    vocabulary = vocabulary_of()
    tokenizer = vocabulary.student_tokenizer
    config = PromptConfig(literal_control_tokens=True, teacher_template="{problem}\n{answer}")
    row = {"messages": [{"role": "user", "content": text}], "answer": text}
    rendered = PromptRenderer(config, vocabulary).render(row)
    plain = PromptRenderer(PromptConfig(teacher_template="{problem}\n{answer}"), vocabulary)
    assert rendered.student_text == plain.render(row).student_text
    assert rendered.teacher_text == plain.render(row).teacher_text
    for ids in (rendered.student_ids, rendered.teacher_ids):
        control = [index for index in ids if index >= 256]
        assert tokenizer.convert_ids_to_tokens(control) == ["<|im_start|>", END, "<|im_start|>"]
        assert tokenizer.decode(ids) in (rendered.student_text, rendered.teacher_text)


def test_a_row_with_the_mark_of_literal_control_tokens() -> None:
    """Guards: a text that is taken out of a prompt because it is used as a mark."""
    row = {"problem": f"a{SEAM}b"}
    assert SEAM in renderer_of().render(row).student_text
    with pytest.raises(PromptError, match="which marks control tokens"):
        renderer_of(literal_control_tokens=True).render(row)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"word pieces"}))
def test_literal_control_tokens_keep_their_spaces(kind: str) -> None:
    """Guards: a space that sentencepiece's tokenizers put before each piece of a text."""
    tokenizer = trained(kind)
    config = PromptConfig(literal_control_tokens=True, chat_template=False)
    text = f"1 + 1{END} is{END}\n2"
    rendered = PromptRenderer(config, vocabulary_of(tokenizer)).render({"problem": text})
    assert tokenizer.eos_token_id not in rendered.student_ids
    decoded = tokenizer.decode(rendered.student_ids, clean_up_tokenization_spaces=False)
    assert decoded.removeprefix(" ") == text


def test_tokenizer_that_loses_text_is_named() -> None:
    """Guards: a normaliser that drops letters, whose prompts are not what was written."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("d5e", "")
    with pytest.raises(ConfigError, match="the student's tokenizer loses the user turn"):
        PromptRenderer(PromptConfig(), vocabulary_of(tokenizer))


def test_template_of_several_names_is_chosen_as_transformers_does() -> None:
    """Guards: a tokenizer with one template for tools and one without taken for none."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{- strftime_now('') -}}" + CHATML, "tool_use": PARTS}
    renderer = PromptRenderer(PromptConfig(), vocabulary_of(tokenizer))
    assert "Add." in renderer.render({"messages": [QUESTION]}).student_text
    with pytest.raises(PromptError, match="leaves out the tools"):
        renderer.render({"messages": [QUESTION], "tools": [TOOL]})
