"""Rows become prompts: templates and LaTeX, chat templates, thinking, privileged context, rows that
make no prompt.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.prompts.chat import SEAM
from optimal_sampling.prompts.probe import PROBE
from optimal_sampling.prompts.rows import conversation_of, fill, names_in
from optimal_sampling.vocabulary import Vocabulary
from tests.vocabulary.conftest import (
    ALWAYS_OPEN,
    END,
    SWITCHED,
    TEXT_END,
    make_tokenizer,
    vocabulary_of,
)

VOCABULARY = vocabulary_of()
PLAIN = PromptConfig(chat_template=False)
# Any text of a dataset: Unicode without surrogates, with many characters of templates and LaTeX.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from(list("{}\\ problemansw_^$%1\n"))),
)


def plain(
    config: PromptConfig = PLAIN, vocabulary: Vocabulary = VOCABULARY, **options: Any
) -> PromptRenderer:
    return PromptRenderer(config, vocabulary, **options)


@example(problem=SEAM, answer=PROBE)  # Hypothesis finds constants of the modules that are loaded
@given(problem=TEXTS.filter(str.strip), answer=TEXTS)
def test_any_value_survives_rendering(problem: str, answer: str) -> None:
    """Guards: `str.format` on problems, which fails or changes them at \\frac{a}{b}."""
    config = PromptConfig(
        chat_template=False, teacher_template="P: {problem}\nA: {answer} \\boxed{}"
    )
    rendered = plain(config).render({"problem": problem, "answer": answer})
    assert rendered.student_text == problem
    assert rendered.teacher_text == f"P: {problem}\nA: {answer} \\boxed{{}}"
    decoded = VOCABULARY.student_tokenizer.decode(
        list(rendered.student_ids), clean_up_tokenization_spaces=False
    )
    assert decoded == problem


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r"\boxed{}", r"\boxed{}"),
        (r"x^{2} \frac{1}{x^{2}}", r"x^{2} \frac{1}{x^{2}}"),
        ("{name}", "VALUE"),
        ("{{name}}", "{name}"),
        ("{{{name}}}", "{VALUE}"),
        (r"\boxed{{{name}}}", r"\boxed{VALUE}"),
        ("{{}}", "{}"),
        ("{ name } {na-me} {", "{ name } {na-me} {"),
        ("{name}{name}", "VALUEVALUE"),
    ],
)
def test_only_identifiers_are_placeholders(template: str, expected: str) -> None:
    """Guards: a template with LaTeX braces that cannot be written, or one brace of it lost."""
    assert fill(template, lambda _: "VALUE") == expected


@given(TEXTS)
def test_template_without_names_is_itself(template: str) -> None:
    """Guards: any other reading of braces creeping in."""
    if not names_in(template) and "{{" not in template:
        assert fill(template, str.upper) == template


def test_unknown_column_lists_what_there_is() -> None:
    """Guards: a typing error in a template found after a night of prompts with `{anwser}`."""
    config = PromptConfig(teacher_template="{problem} {anwser}")
    with pytest.raises(
        ConfigError, match=r"asks for \{anwser\}, but the rows have: answer, problem"
    ):
        plain(config).render({"problem": "p", "answer": 1})
    with pytest.raises(ConfigError, match="anwser"):
        plain(config, columns=["problem", "answer"])


@pytest.mark.parametrize(
    "place",
    ["{problem", "{problem.x}", "{0}", "{problem!r:>9}", "{problem:>9}", "{answer[0]}"],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_mistyped_placeholder_is_refused(role: str, place: str) -> None:
    """Guards: every row of a run given the text `{problem.x}`, with exit code 0."""
    config = PromptConfig(chat_template=False, **{f"{role}_template": f"Q: {place}"})
    with pytest.raises(ConfigError) as error:
        plain(config, columns=["problem", "answer"])
    assert f"the {role}'s template has {place!r}" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{}",
        r"\boxed{answer",
        r"\text{answer:x}",
        r"x^{2} \frac{1}{answer.x}",
        "the set {1}",
        '{"answer": 1}',
        "{answer: 4}",
        "{answer here}",
        "{ answer",
        "{",
        "{other.x}",
        "{{problem.x}}",
    ],
)
def test_other_braces_beside_a_column_are_text(text: str) -> None:
    """Guards: LaTeX and JSON in a template taken for mistyped placeholders."""
    config = PromptConfig(chat_template=False, student_template="{problem} " + text)
    rendered = plain(config, columns=["problem", "answer"]).render({"problem": "p"})
    assert rendered.student_text == f"p {text}"


def test_column_that_one_row_lacks_fails_that_row_only() -> None:
    """Guards: a run that stops at the first row of another shape."""
    renderer = plain(PromptConfig(teacher_template="{problem} {hint}"), columns=["problem", "hint"])
    with pytest.raises(PromptError, match="no column 'hint'"):
        renderer.render({"problem": "p"})


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_is_never_written_into_a_prompt(null: object) -> None:
    """Guards: 'The answer is None.' shown to a teacher."""
    renderer = plain(PromptConfig(teacher_template="{problem} {answer}"))
    with pytest.raises(PromptError, match="'answer' is null"):
        renderer.render({"problem": "p", "answer": null})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "none of the columns problem, question, prompt, messages; it has: text"),
        ({"problem": None}, "null"),
        ({"problem": " \n"}, "empty"),
        ({"messages": []}, "no user turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user turn"),
        ({"messages": [{"role": "user", "content": None}]}, "empty"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "turn 0 is no object with `role` and `content`",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"problem": "half \ud800"}, "surrogate"),
        ({"problem": {"a": 1}}, "turn 0 is no object with `role` and `content`"),
    ],
)
def test_row_without_a_problem_is_a_prompt_error(row: dict[str, Any], reason: str) -> None:
    """Guards: one bad row ending a run, or being sampled as an empty prompt."""
    with pytest.raises(PromptError, match=reason):
        plain().render(row)
    assert issubclass(PromptError, ValueError)


def test_problem_is_found_in_every_known_form() -> None:
    """Guards: a conversation's earlier turns, or its answer, taken for the problem."""
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "ree"}],
        },
        {"role": "assistant", "content": "the answer"},
    ]
    conversation = conversation_of({"messages": turns})
    assert (conversation.problem, conversation.place) == ("three", 3)
    assert conversation.messages == (*turns[:3], {"role": "user", "content": "three"})
    assert conversation_of({"prompt": turns[:2]}).problem == "one"
    assert conversation_of({"question": "q", "prompt": "p"}).problem == "q"
    assert conversation_of({"question": "q", "x": 7}, "x").problem == "7"


def test_earlier_turns_and_the_rows_system_prompt_are_rendered() -> None:
    """Guards: a conversation reduced to its last turn in silence."""
    row = {
        "messages": [
            {"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")
        ]
    }
    rendered = PromptRenderer(PromptConfig(teacher_system_prompt="T"), VOCABULARY).render(row)
    user, assistant = (
        f"<|im_start|>{role}\n{role[0]}<|im_end|>\n" for role in ("user", "assistant")
    )
    tail = f"{user}{assistant}{user}"
    assert (
        rendered.student_text == f"<|im_start|>system\ns<|im_end|>\n{tail}<|im_start|>assistant\n"
    )
    assert (
        rendered.teacher_text == f"<|im_start|>system\nT<|im_end|>\n{tail}<|im_start|>assistant\n"
    )


def test_privileged_template_and_system_prompt_go_to_the_teacher_only() -> None:
    """Guards: the reference answer shown to the student, which makes the data worthless."""
    config = PromptConfig(
        teacher_template="{problem}\nHint: {solution}",
        teacher_system_prompt="secret",
        student_system_prompt="open",
    )
    rendered = PromptRenderer(config, VOCABULARY).render({"problem": "2+2", "solution": "4!"})
    assert "4!" not in rendered.student_text
    assert "secret" not in rendered.student_text
    assert "<|im_start|>user\n2+2\nHint: 4!<|im_end|>" in rendered.teacher_text
    assert "<|im_start|>system\nsecret<|im_end|>" in rendered.teacher_text


@pytest.mark.parametrize("context", ["the hint", [{"role": "user", "content": "the hint"}]])
def test_privileged_context_joins_the_teachers_user_turn(context: Any) -> None:
    """Guards: TRL's column ignored, or put into the assistant's turn, as a rival does."""
    row = {"prompt": [{"role": "user", "content": "2+2"}], "privileged_context": context}
    rendered = PromptRenderer(PromptConfig(), VOCABULARY).render(row)
    assert "hint" not in rendered.student_text
    assert "<|im_start|>user\n2+2\n\nthe hint<|im_end|>" in rendered.teacher_text
    placed = PromptRenderer(
        PromptConfig(teacher_template="[{privileged_context}] {problem}"), VOCABULARY
    ).render(row)
    assert "<|im_start|>user\n[the hint] 2+2<|im_end|>" in placed.teacher_text


def test_named_columns_are_used() -> None:
    """Guards: --prompt-column and --answer-column forgotten on the way to the templates."""
    renderer = plain(
        PromptConfig(chat_template=False, teacher_template="{problem}={answer}"),
        prompt_column="q",
        answer_column="a",
        columns=["q", "a"],
    )
    assert renderer.render({"q": "1+1", "a": 2}).teacher_text == "1+1=2"


def test_tokenizer_without_chat_template_falls_back_and_says_so() -> None:
    """Guards: a Base student that fails, or one that is given plain text without a word."""
    renderer = PromptRenderer(
        PromptConfig(student_system_prompt="S"),
        vocabulary_of(make_tokenizer(chat_template=None), make_tokenizer()),
    )
    rendered = renderer.render({"problem": "p"})
    assert rendered.student_text == "S\n\np"
    assert rendered.teacher_text.startswith("<|im_start|>user")
    assert renderer.notes == (
        "the student's tokenizer has no chat template: its prompts are plain text",
    )


@pytest.mark.parametrize(
    ("thinking", "ending"),
    [("on", "assistant\n"), ("off", "</think>\n\n"), ("default", "assistant\n")],
)
def test_thinking_reaches_both_templates(thinking: Any, ending: str) -> None:
    """Guards: the switch given to one of the two models only."""
    vocabulary = vocabulary_of(make_tokenizer(chat_template=SWITCHED))
    renderer = PromptRenderer(PromptConfig(thinking=thinking), vocabulary)
    rendered = renderer.render({"problem": "p"})
    assert rendered.student_text == rendered.teacher_text
    assert rendered.student_text.endswith(ending)
    assert not renderer.notes


@pytest.mark.parametrize("opens", ["student", "teacher"])
def test_one_open_thinking_block_is_refused(opens: str) -> None:
    """Guards: a teacher that reasons mixed with a student that already answers."""
    inside, outside = make_tokenizer(chat_template=ALWAYS_OPEN), make_tokenizer()
    pair = (inside, outside) if opens == "student" else (outside, inside)
    with pytest.raises(ConfigError, match=f"the {opens}'s prompt ends inside an open <think>"):
        PromptRenderer(PromptConfig(), vocabulary_of(*pair))


def test_think_tags_in_user_text_are_no_open_block() -> None:
    """Guards: instructions that mention <think> taken for the template's own block."""
    config = PromptConfig(
        teacher_template="{problem} Reason after <think>.", teacher_system_prompt="Use <think>."
    )
    renderer = PromptRenderer(config, VOCABULARY)
    rendered = renderer.render({"problem": "<think> is a tag?"})
    assert "<think> is a tag? Reason after <think>.<|im_end|>" in rendered.teacher_text
    assert renderer.notes == ()


def test_closed_block_on_one_side_and_ignored_switch_are_noted() -> None:
    """Guards: thinking=off that one of the models does not understand, found out from the
    completions.
    """
    renderer = PromptRenderer(
        PromptConfig(thinking="off"),
        vocabulary_of(make_tokenizer(chat_template=SWITCHED), make_tokenizer()),
    )
    assert "the teacher's chat template knows no thinking mode" in renderer.notes[0]
    assert "only the student's prompt ends with a closed <think> block" in renderer.notes[1]


def test_chat_template_that_refuses_a_system_prompt_is_a_config_error() -> None:
    """Guards: every row of a run failing for the same reason, one by one."""
    refusal = "{{ raise_exception('no system role') }}"
    strict = "{% if messages[0]['role'] == 'system' %}" + refusal + "{% endif %}"
    strict += "{{ messages[0]['content'] }}"
    vocabulary = vocabulary_of(make_tokenizer(chat_template=strict))
    with pytest.raises(ConfigError, match="system prompt: no system role"):
        PromptRenderer(PromptConfig(student_system_prompt="S"), vocabulary)
    with pytest.raises(PromptError, match="no system role"):
        PromptRenderer(PromptConfig(), vocabulary).render(
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
        )


def bos_tokenizer(adds: str = "<s> $A") -> Any:
    template = "<s>{{ messages[0]['content'] }}"
    return make_tokenizer((TEXT_END, END, "<s>"), bos="<s>", adds=adds, chat_template=template)


@pytest.mark.parametrize(("chat", "text"), [(True, "p"), (False, "p"), (False, "<s>p")])
def test_bos_is_there_once(chat: bool, text: str) -> None:
    """Guards: the BOS of the chat template and the tokenizer's own one after another, which shifts
    every logit.
    """
    tokenizer = bos_tokenizer()
    renderer = PromptRenderer(PromptConfig(chat_template=chat), vocabulary_of(tokenizer))
    assert renderer.render_texts(text).student_ids == (tokenizer.bos_token_id, ord("p"))


def test_plain_prompt_does_not_end_with_eos() -> None:
    """Guards: tokenizers that append EOS, after which a model writes an unrelated text."""
    renderer = PromptRenderer(PLAIN, vocabulary_of(bos_tokenizer(f"$A {END}")))
    assert renderer.render_texts("p").student_ids == (ord("p"),)


def test_raw_texts_are_the_prompts() -> None:
    """Guards: `prompts` and `prompts_t` filled as templates, or one of them
    used for both.
    """
    rendered = plain(
        PromptConfig(chat_template=False, student_template="never {problem}")
    ).render_texts("{answer}", "<|im_start|>user\n")
    assert (rendered.student_text, rendered.teacher_text) == ("{answer}", "<|im_start|>user\n")
    assert rendered.teacher_ids[0] == VOCABULARY.teacher_tokenizer.convert_tokens_to_ids(
        "<|im_start|>"
    )
    with pytest.raises(PromptError, match="empty"):
        plain().render_texts("")


def test_long_prompt_is_whole() -> None:
    """Guards: truncation by a tokenizer file that has it switched on."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.model_max_length = 8
    rendered = plain(vocabulary=vocabulary_of(tokenizer)).render({"problem": "x" * 1000})
    assert len(rendered.student_ids) == 1000


def test_prompt_id_without_a_row_in_the_model_is_an_error() -> None:
    """Guards: an index error (on a GPU: a dead process) for a marker that the model has no
    embedding for.
    """
    vocabulary = Vocabulary(
        258, frozenset({257}), 0, make_tokenizer(), make_tokenizer(), student_rows=258
    )
    with pytest.raises(PromptError, match="the model knows 258 ids"):
        plain(vocabulary=vocabulary).render_texts("a<|im_end|>")
