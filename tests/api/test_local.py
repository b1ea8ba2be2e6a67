"""`OptimalSamplingModel` on a scripted engine, then on the shipped pair."""

from __future__ import annotations

import inspect
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import optimal_sampling_hf
from optimal_sampling.api.local import OptimalSamplingModel, PerToken, SamplingOutput
from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.engines import Engine
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace

END = 257  # of the shipped tokenizer
LETTER = ord("a")


class ScriptedEngine(Engine):
    """Answers the k-th letter of the alphabet k+1 times for sample k, last request first; prompts
    with "!" fail."""

    def __init__(self, **opened: Any) -> None:
        self.opened = opened
        self.vocab_size, self.stop_ids = opened["vocabulary"].size, opened["vocabulary"].stop_ids
        self.mixture: MixtureConfig = opened["mixture"]
        self.options: LocalOptions = opened["options"]
        self.views: list[tuple[MixtureConfig, int, frozenset[str]]] = []
        self.seen: list[Request] = []
        self.closed = 0

    def view(
        self,
        mixture: Any = None,
        mode: Any = None,
        options: Any = None,
        capture: frozenset[str] = frozenset(),
    ) -> ScriptedEngine:
        self.views.append((mixture, options.batch_size, capture))
        return self

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in reversed(list(requests)):
            self.seen.append(request)
            yield self._completion(request)

    def _completion(self, request: Request) -> Completion:
        k = request.sample_index
        ids = (LETTER + k,) * (k + 1) + (END,)
        row = dict.fromkeys(TRACE_FIELDS, 0.5) | {"alpha": 0.25 * (k + 1), "ess_student": 0.25}
        row["curvature"] = float(k)
        trace = TokenTrace.from_rows([tuple(row[name] for name in TRACE_FIELDS)] * len(ids))
        captured = {
            name: torch.full((len(ids), self.vocab_size), float(k)) for name in self.views[-1][2]
        }
        if ord("!") in request.student_prompt_ids:
            return Completion(request, ids, "error", trace, error="refused")
        return Completion(request, ids, "stop", trace, captured=captured)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(
        models: Any, mixture: Any, options: Any, vocabulary: Any, load_kwargs: Any
    ) -> ScriptedEngine:
        return ScriptedEngine(
            models=models,
            mixture=mixture,
            options=options,
            vocabulary=vocabulary,
            load_kwargs=load_kwargs,
        )

    monkeypatch.setattr(LocalEngine, "load", load)


def make(**options: Any) -> OptimalSamplingModel:
    return OptimalSamplingModel("toy-student", "toy-teacher", **{"device": "cpu", **options})


def engine_of(model: OptimalSamplingModel) -> ScriptedEngine:
    engine = model._engine
    assert isinstance(engine, ScriptedEngine)
    return engine


def test_signatures_are_those_of_the_usage_guide() -> None:
    """Guards: a name, order or default that users of the predecessor rely on."""
    constructor = inspect.signature(OptimalSamplingModel).parameters
    assert {
        name: parameter.default for name, parameter in constructor.items() if name != "kwargs"
    } == {
        "model_theta_path": inspect.Parameter.empty,
        "model_t_path": None,
        "alpha_method": "kl_symmetry",
        "fixed_alpha": 0.5,
        "alpha_min": 0.5,
        "alpha_max": 1.0,
        "constraint_to_target": False,
        "target_top_k": -1,
        "target_top_p": 1.0,
        "device": "cuda",
        "dtype": torch.float16,
    }
    generate = inspect.signature(OptimalSamplingModel.generate).parameters
    assert [(name, generate[name].default) for name in list(generate)[2:11]] == [
        ("prompts_t", None),
        ("max_new_tokens", 100),
        ("temperature", 1.0),
        ("top_p", 1.0),
        ("top_k", -1),
        ("return_diagnostics", True),
        ("skip_decode", False),
        ("return_logits", False),
        ("return_q_star_probs", False),
    ]
    assert optimal_sampling_hf.OptimalSamplingModel is OptimalSamplingModel
    assert optimal_sampling_hf.SamplingOutput is SamplingOutput


@pytest.mark.usefixtures("scripted")
def test_a_notebook_shows_coloured_text() -> None:
    """Guards: rows shown with the padding of longer ones, or the texts of others; an output that
    cannot be pickled any more, or that ends a notebook after it was."""
    with pytest.warns(UserWarning, match="refused"), make() as model:
        output = model.generate(["x", "x", "!"])
    html = output._repr_html_()
    assert "the first 3 of 3 completions" in html
    assert html.count("<span") == 1 + 2  # without end tokens
    assert html.index(">a</span>") < html.index(">b</span>")
    assert html.count("rgba(44,110,187,") == 1  # alpha 0.25, then twice 0.5: no colour
    assert "prompt 2: refused" in html
    arrived = pickle.loads(pickle.dumps(output))
    assert "no tokenizer" in arrived._repr_html_()
    with make() as model:
        bare = model.generate(["x"], return_diagnostics=False, skip_decode=True)
    assert ">a</span>" in bare._repr_html_()


@pytest.mark.usefixtures("scripted")
def test_rows_are_in_the_order_of_the_prompts() -> None:
    """Guards: completions, which come as they finish, left in that order; equal prompts given the
    same noise."""
    model = make()
    outputs = model.generate(["p", "q", "p", "p"])
    assert outputs.generated_texts == ["a", "a", "bb", "ccc"]
    assert outputs.generated_ids.tolist() == [
        [97, END, 256, 256],
        [97, END, 256, 256],
        [98, 98, END, 256],
        [99, 99, 99, END],
    ]
    assert outputs.diagnostics["num_tokens"] == [2, 2, 3, 4]
    assert outputs.finish_reasons == ["stop"] * 4
    assert outputs.errors == [""] * 4
    assert sorted(request.sample_index for request in engine_of(model).seen) == [0, 0, 1, 2]


@pytest.mark.usefixtures("scripted")
def test_padding_is_nan_and_reductions_leave_it_out() -> None:
    """Guards: padding counted as alpha = 0, or `alpha_values[i].mean()` of the usage guide printing
    nan."""
    outputs = make().generate(["p", "p"])
    alphas = outputs.alpha_values
    assert alphas.dtype == torch.float32
    assert math.isnan(alphas[0, 2])
    assert [float(alphas[i].mean()) for i in range(2)] == [0.25, 0.5]
    assert (
        f"{alphas.mean():.3f} {alphas.min():.2f} {alphas.max():.2f} {alphas[1, 0]:.1f}"
        == "0.400 0.25 0.50 0.5"
    )
    assert outputs.diagnostics["alpha_mean"] == pytest.approx(0.4)
    # the models agree at all tokens of the first sample
    assert outputs.diagnostics["alpha_weighted_mean"] == 0.5
    assert outputs.diagnostics["ess_ratio_mean"] == 2.0
    assert outputs.diagnostics["clamped_share"] == 0.5
    assert outputs.diagnostics["kl_theta"].mean() == 0.5


def test_per_token_reductions_agree_with_nan_functions() -> None:
    """Guards: the tensor class changing what an ordinary tensor does when a `dim` is given."""
    values = torch.tensor(
        [[1.0, 2.0, float("nan")], [4.0, float("nan"), float("nan")]]
    ).as_subclass(PerToken)
    assert float(values.sum()) == 7
    assert float(values.std()) == pytest.approx(float(torch.tensor([1.0, 2.0, 4.0]).std()))
    assert values.mean(0)[0] == 2.5
    assert math.isnan(values.mean(dim=1)[0])
    assert values.max(dim=0).indices.shape == (3,)
    empty = values[:, 2]
    assert all(math.isnan(reduce()) for reduce in (empty.mean, empty.min, empty.max, empty.std))
    assert empty.sum() == 0
    assert isinstance(values[0], PerToken)


@pytest.mark.usefixtures("scripted")
def test_failed_prompts_leave_empty_rows() -> None:
    """Guards: one prompt that fails ending the call, shifting the rows, or going unnoticed."""
    model = make()
    with pytest.warns(
        UserWarning, match="2 of 3 prompts failed; prompt 0: the student's prompt is empty"
    ):
        outputs = model.generate(["", "fine", "no!"])
    assert outputs.generated_texts == ["", "a", ""]
    assert outputs.errors == ["the student's prompt is empty", "", "refused"]
    assert outputs.finish_reasons == ["error", "stop", "error"]
    assert outputs.diagnostics["num_tokens"] == [0, 2, 0]


@pytest.mark.usefixtures("scripted")
def test_no_prompts_no_rows() -> None:
    """Guards: max() of nothing."""
    outputs = make().generate([], return_logits=True, return_q_star_probs=True)
    assert outputs.generated_texts == []
    assert outputs.generated_ids.shape == outputs.alpha_values.shape == (0, 0)
    assert math.isnan(outputs.diagnostics["alpha_mean"])
    assert outputs.q_star_probs is not None


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    "names", [("return_logits", "return_q_star_probs"), ("save_logits", "save_q_star_probs")]
)
def test_captured_rows_under_both_names(names: tuple[str, str]) -> None:
    """Guards: the README's `save_*` names ignored; rows of two prompts mixed up."""
    model = make()
    outputs = model.generate(
        ["p", "p"], skip_decode=True, return_diagnostics=False, **dict.fromkeys(names, True)
    )
    assert outputs.generated_texts is None
    assert outputs.diagnostics == {}
    assert outputs.logits is not None
    assert outputs.q_star_probs is not None
    size = model.vocabulary.size
    assert outputs.logits["theta"].shape == outputs.logits["t"].shape == (2, 3, size)
    assert outputs.logits["theta"][:, 0, 0].tolist() == [0, 1]
    assert outputs.q_star_probs[1, 2, 5] == pytest.approx(math.e)
    assert outputs.q_star_probs[0, 2].isnan().all()


@pytest.mark.usefixtures("scripted")
def test_options_reach_the_engine() -> None:
    """Guards: an option that is accepted and then forgotten."""
    model = make(
        alpha_method="trust_region",
        trust_region=0.2,
        teacher_support_min_p=0.3,
        constraint_to_target=True,
        target_top_k=7,
        batch_size=3,
        trust_remote_code=True,
        allow_unused_weights=True,
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
    )
    model.generate(["p"], None, 9, 0.8, 0.9, 5, batch_size=2, seed=4, force_first_token=True)
    opened = SimpleNamespace(**engine_of(model).opened)
    assert (opened.models.student, opened.models.teacher) == ("toy-student", "toy-teacher")
    assert (opened.models.dtype, opened.models.device) == ("bfloat16", "cpu")
    assert opened.models.trust_remote_code
    assert opened.models.allow_unused_weights
    assert opened.models.load_in_4bit
    assert opened.load_kwargs == {"bnb_4bit_compute_dtype": torch.bfloat16}
    assert opened.options == LocalOptions(batch_size=3)
    mixture, batch_size, capture = engine_of(model).views[0]
    assert mixture == MixtureConfig(
        alpha_method="trust_region",
        trust_region=0.2,
        teacher_support_min_p=0.3,
        teacher_support_top_k=7,
        temperature=0.8,
        top_p=0.9,
        top_k=5,
        force_first_token=True,
    )
    assert (batch_size, capture) == (2, frozenset())
    assert (engine_of(model).seen[0].seed, engine_of(model).seen[0].max_new_tokens) == (4, 9)


@pytest.mark.usefixtures("scripted")
def test_one_path_is_self_distillation() -> None:
    """Guards: `model_t_path=None` taken for a missing teacher, or the weights loaded twice."""
    model = OptimalSamplingModel("toy-student", device="cpu")
    models = engine_of(model).opened["models"]
    assert models.student == models.teacher == "toy-student"


@pytest.mark.usefixtures("scripted")
def test_each_model_gets_its_own_prompt() -> None:
    """Guards: the student's prompt of request 0 used for the whole batch, a bug of the
    predecessor."""
    model = make()
    model.generate(["s0", "s1"], prompts_t=["t0", "t1"])
    prompts = [
        (bytes(each.student_prompt_ids), bytes(each.teacher_prompt_ids))
        for each in engine_of(model).seen
    ]
    assert sorted(prompts) == [(b"s0", b"t0"), (b"s1", b"t1")]


@pytest.mark.usefixtures("scripted")
def test_system_prompts_and_chat_templates() -> None:
    """Guards: system prompts swapped between the models, or the constructor's winning over the
    call's."""
    model = make(theta_system_prompt="S", enable_chat_template=True)
    model.generate(["p"], teacher_system_prompt="T")
    model.generate(["p"], enable_chat_template=False, student_system_prompt="other")
    chat, plain = engine_of(model).seen
    decode = model.vocabulary.student_tokenizer.decode
    assert decode(chat.student_prompt_ids) == "<|system|>S<|end|><|user|>p<|end|><|assistant|>"
    assert decode(chat.teacher_prompt_ids) == "<|system|>T<|end|><|user|>p<|end|><|assistant|>"
    assert decode(plain.student_prompt_ids) == "other\n\np"
    assert decode(plain.teacher_prompt_ids) == "p"


@pytest.mark.usefixtures("scripted")
def test_the_calls_system_prompt_wins_under_either_name() -> None:
    """Guards: `theta_system_prompt` of the constructor clashing with `student_system_prompt` of the
    call."""
    model = make(theta_system_prompt="S")
    model.generate(["p"], student_system_prompt="other")
    assert bytes(engine_of(model).seen[0].student_prompt_ids) == b"other\n\np"


@pytest.mark.usefixtures("scripted")
def test_notes_are_warned_of_once() -> None:
    """Guards: a switch that a template ignores, never said, or said at every call."""
    model = make(enable_chat_template=True)
    with pytest.warns(UserWarning, match="knows no thinking mode") as warned:
        model.generate(["p"], thinking="off")
    assert len(warned) == 2  # student and teacher
    model.generate(["p"], thinking="off")


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_minn": 0.3}, "unknown option 'alpha_minn'; did you mean 'alpha_min'"),
        ({"load_in_4bits": True}, "unknown option 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ({"alpha_method": "best"}, "alpha_method must be one of"),
        ({"alpha_min": 0.9, "alpha_max": 0.1}, "alpha_min"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"thinking": "maybe"}, "thinking must be"),
        ({"theta_system_prompt": "a", "student_system_prompt": "b"}, "same option"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """Guards: options dropped in silence, as `**kwargs` invites."""
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one text"}, "list of strings"),
        ({"prompts": None}, "prompts must be a list of strings, got None"),
        ({"prompts": ["a"], "temperatur": 4}, "'temperatur'; did you mean 'temperature'"),
        ({"prompts": ["a"], "x_y_z": 4}, "there are: batch_size, .*, prompts, .*, top_p$"),
        ({"prompts": ["a"], "prompts_t": []}, "1 prompts but 0 prompts_t"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": ["a"], "temperature": 0.0}, "temperature"),
        ({"prompts": ["a"], "system_prompt": "x"}, "unknown option 'system_prompt'"),
    ],
)
def test_wrong_calls_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Guards: a text taken for a list of letters; lists of prompts of two lengths cut to the
    shorter."""
    with pytest.raises(ConfigError, match=message):
        make().generate(**arguments)


@pytest.mark.usefixtures("scripted")
def test_teacher_support_needs_its_switch() -> None:
    """Guards: `target_top_k` restricting without `constraint_to_target`, or being ignored without a
    word."""
    with pytest.warns(UserWarning, match="ignored without constraint_to_target"):
        model = make(target_top_k=5)
    assert engine_of(model).mixture.teacher_support_top_k == -1
    with pytest.warns(UserWarning, match="restricts nothing"):
        make(constraint_to_target=True)


@pytest.mark.usefixtures("scripted")
def test_device_by_default_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the signature's "cuda" failing on every machine without a GPU, or a named GPU
    replaced in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="running on the CPU") as warned:
        model = OptimalSamplingModel("toy-student")
    assert len(warned) == 1
    assert (model.device, model.dtype) == ("cpu", torch.float32)
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        make(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = OptimalSamplingModel("toy-student")
    assert (model.device, model.dtype) == ("cuda", torch.float16)


@pytest.mark.usefixtures("scripted")
def test_leaving_the_with_block_frees_the_models() -> None:
    """Guards: models of a notebook that stay in memory."""
    with make() as model:
        pass
    assert engine_of(model).closed == 1
    with pytest.raises(EngineError, match="closed"):
        model.generate(["p"])


# On the shipped pair.


@pytest.fixture(scope="module")
def model() -> Iterator[OptimalSamplingModel]:
    with make(enable_chat_template=True) as model:
        yield model


PROMPTS = ["12*3+4=?", "7*8-50=?", "12*3+4=?", "90+5-3*2=?", "1+1=?"]


def test_tokens_do_not_depend_on_the_batch(model: OptimalSamplingModel) -> None:
    """Guards: state of one row leaking into another; a seed that counts calls."""
    together = model.generate(PROMPTS, max_new_tokens=24, seed=3)
    assert (
        together.generated_texts
        == model.generate(PROMPTS, max_new_tokens=24, seed=3, batch_size=1).generated_texts
    )
    for place in (0, 1, 3, 4):
        alone = model.generate([PROMPTS[place]], max_new_tokens=24, seed=3)
        assert (
            alone.generated_ids[0].tolist()
            == together.generated_ids[place][: alone.generated_ids.shape[1]].tolist()
        )
    assert (
        together.generated_texts
        != model.generate(PROMPTS, max_new_tokens=24, seed=4).generated_texts
    )


def test_diagnostics_follow_from_the_captured_logits(model: OptimalSamplingModel) -> None:
    """Guards: logits, mixture and diagnostics that belong to different tokens, roles or
    temperatures."""
    outputs = model.generate(
        PROMPTS[:2], max_new_tokens=8, temperature=0.7, save_logits=True, save_q_star_probs=True
    )
    assert outputs.logits is not None
    assert outputs.q_star_probs is not None
    log_p = {name: (rows.double() / 0.7).log_softmax(-1) for name, rows in outputs.logits.items()}
    for row, count in enumerate(outputs.diagnostics["num_tokens"]):
        ids = outputs.generated_ids[row, :count, None]
        theta, t = log_p["theta"][row, :count], log_p["t"][row, :count]
        alpha = outputs.alpha_values.as_subclass(torch.Tensor)[row, :count, None].double()
        log_q = ((1 - alpha) * theta + alpha * t).log_softmax(-1)
        torch.testing.assert_close(
            outputs.q_star_probs[row, :count].double(), log_q.exp(), atol=1e-5, rtol=1e-4
        )
        for name, expected in (("log_q", log_q), ("log_p_theta", theta), ("log_p_t", t)):
            given = outputs.diagnostics[name].as_subclass(torch.Tensor)[row, :count].double()
            wanted = expected.gather(-1, ids)[:, 0]
            torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)
        kl = (log_q.exp() * (log_q - t)).sum(-1)
        given = outputs.diagnostics["kl_t"].as_subclass(torch.Tensor)[row, :count].double()
        torch.testing.assert_close(given, kl, atol=1e-4, rtol=1e-3)


def test_alpha_one_is_the_teacher(model: OptimalSamplingModel) -> None:
    """Guards: the two models' roles swapped on the way from the constructor to the mixture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with make(alpha_method="fixed", fixed_alpha=1.0, enable_chat_template=True) as teacher:
            outputs = teacher.generate(PROMPTS[:2], max_new_tokens=8)
    assert outputs.diagnostics["kl_t_mean"] == pytest.approx(0, abs=1e-5)
    assert outputs.diagnostics["kl_theta_mean"] > 0.01


def test_prompt_beyond_the_context_fails_alone(model: OptimalSamplingModel) -> None:
    """Guards: a prompt that is cut without a word, or that ends the whole call."""
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        outputs = model.generate(["9" * 5000, PROMPTS[0]], max_new_tokens=8)
    assert outputs.errors[0]
    assert outputs.generated_texts is not None
    assert outputs.generated_texts[0] == ""
    assert outputs.generated_texts[1]


def test_an_empty_prompt_fails_alone_and_generators_are_read_once(
    model: OptimalSamplingModel,
) -> None:
    """Guards: a chat template that hides an empty prompt, and a generator that a check has used
    up."""
    prompts = (prompt for prompt in ("1+1=?", " ", "2+2=?"))
    with pytest.warns(UserWarning, match="empty"):
        outputs = model.generate(prompts, max_new_tokens=4, enable_chat_template=True)
    assert outputs.errors is not None
    assert [bool(error) for error in outputs.errors] == [False, True, False]
    assert outputs.generated_ids.shape[0] == 3


@pytest.mark.usefixtures("scripted")
def test_numbers_of_numpy_are_numbers() -> None:
    """Guards: `np.int64(3)` refused as no whole number, or recorded as another seed."""
    model = make()
    plain = model.generate(["p"], max_new_tokens=3, top_k=3, temperature=0.5, seed=7)
    ours = model.generate(
        ["p"],
        max_new_tokens=np.int64(3),
        top_k=np.int64(3),
        temperature=np.float64(0.5),
        seed=np.int32(7),
    )
    assert torch.equal(plain.generated_ids, ours.generated_ids)
    first, second = engine_of(model).seen
    assert first == second
    assert type(second.seed) is type(second.max_new_tokens) is int
    for name, value in {"max_new_tokens": 2.5, "seed": None, "top_k": None}.items():
        with pytest.raises(ConfigError, match=f"{name} must be a whole number, got {value}"):
            model.generate(["p"], **{name: value})
