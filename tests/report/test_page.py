"""The page as data: what is in it, and that nothing in it can become markup."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.store import decode_line, encode_line, read_json
from optimal_sampling.report import ReportOptions
from optimal_sampling.report.page import write_report

HOSTILE = "</script><script>alert(1)</script></style><img src=x onerror=alert(1)>&lt;"


@pytest.fixture
def report(tmp_path):
    def write(*runs, **options):
        path = tmp_path / "page.html"
        write_report(ReportOptions(runs=tuple(map(str, runs)), output=str(path), **options))
        return path.read_text("utf-8")

    return write


def block(page, name):
    packed = re.search(rf'id="{name}">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(b64decode(packed)))


class Tags(HTMLParser):
    """Start tags, and the text of those that hold text alone."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_text_of_models_is_never_markup(report, make_run, draw):
    """Guards: a completion, a prompt or the name of a folder that runs in the reader's browser."""
    run = make_run("[[script]]<b>x", [draw(HOSTILE)])
    page = report(run)
    found = Tags(page)
    assert "alert(1)" not in page
    assert block(page, "texts-0")[0]["pieces"][0] == "<"
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert [each for each in scripts if "type" not in each] == [{}]
    assert "b" not in [tag for tag, _ in found.tags]


def test_the_policy_allows_our_script_and_style_alone(report, make_run, draw):
    """Guards: a hash that no longer fits, so that the page stays empty; a policy with holes."""
    page = report(make_run("run", [draw()]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_same_run_gives_the_same_page(report, make_run, draw):
    """Guards: a time or an order in the page, which a diff of two reports would show."""
    run = make_run("run", [draw("1+1=2", "correct", row=row) for row in range(30)])
    assert report(run, samples=7) == report(run, samples=7)


def test_a_larger_run_is_cut_and_says_so(report, make_run, draw):
    """Guards: counts of the samples shown in place of those of the run."""
    run = make_run("run", [draw("1+1=2", "correct", row=row) for row in range(30)])
    index = block(report(run, samples=7), "index")
    [found] = index["runs"]
    assert (found["shown"], found["good"], len(index["samples"])) == (7, 30, 7)
    assert found["verdicts"] == {"correct": 30}
    assert sum(found["lengths"]["counts"]) == 30


def test_what_is_beside_a_token(report, make_run, draw):
    """Guards: numbers off by their scale, and top tokens of another place or distribution."""
    run = make_run("run", [draw("a🙂", top=3)])
    page = report(run, top=2)
    [text], [top] = block(page, "texts-0"), block(page, "tops-0")
    scales = {each["name"]: each["scale"] for each in block(page, "index")["metrics"]}
    assert text["pieces"] == ["a", "🙂"]
    assert text["counts"] == [[1, 4]]
    assert text["columns"]["kl_student"] == [0.5 * scales["kl_student"]] * 2
    assert text["columns"]["alpha"][0] == 0.5 * scales["alpha"]
    assert (top["k"], top["distributions"]) == (2, ["student", "teacher", "mixture"])
    first = [top["texts"][place] for place in top["places"][:6]]
    assert first[1] == first[2] == first[4] == "a"  # the student's second, the others' first
    assert top["shares"][:6] == pytest.approx([6000, 3000, 9000, 500, 8000, 1000], abs=3)
    assert top["texts"][top["drawn"][0]] == "a"


def test_a_record_of_30000_tokens(report, make_run, draw):
    """Guards: a time that grows with the square of the length, and numbers lost on the way."""
    text = "1234567890" * 3000
    page = report(make_run("run", [draw(text)]))
    [found] = block(page, "texts-0")
    assert "".join(found["pieces"]) == text
    assert len(found["columns"]["alpha"]) == 30_000
    [run] = block(page, "index")["runs"]
    assert sum(run["profiles"]["alpha"]["n"]) == 30_001


def test_a_run_without_top_tokens_has_none(report, make_run, draw):
    """Guards: empty blocks, 100 bytes for every twenty samples."""
    page = report(make_run("run", [draw()]))
    assert "tops-0" not in page
    with_top = make_run("top", [draw(top=2)])
    assert "tops-0" in report(with_top)
    assert "tops-0" not in report(with_top, top=0)


def test_a_failed_sample_shows_its_error(report, make_run, draw):
    """Guards: samples that failed and are nowhere on the page."""
    index = block(report(make_run("run", [draw(), draw(error="too long", row=1)])), "index")
    assert [sample[14] for sample in index["samples"]] == ["", "too long"]
    assert index["runs"][0]["errors"] == [["too long", 1]]


def test_runs_of_different_models(report, make_run, draw):
    """Guards: two runs beside each other that do not say in what they differ."""
    first = make_run("first", [draw()])
    second = make_run("second", [draw()], alpha_method="fixed")
    config = read_json(second / "config.json")
    config["compared"]["student"] = "/gone"
    (second / "config.json").write_text(json.dumps(config))
    index = block(report(first, second), "index")
    assert index["differences"] == ["student", "alpha_method"]
    assert not index["runs"][1]["notes"][1:]  # the teacher's tokenizer is here


def test_no_tokenizer_is_no_end(report, make_run, draw):
    """Guards: no page for a run whose models are on another machine, or one that hides why its
    text has no colours."""
    run = make_run("run", [draw("1+1=2")])
    config = read_json(run / "config.json")
    config["compared"] |= {"student": "/gone", "teacher": "/gone"}
    (run / "config.json").write_text(json.dumps(config))
    page = report(run)
    assert "not coloured" in " ".join(block(page, "index")["runs"][0]["notes"])
    assert block(page, "texts-0")[0]["pieces"] == ["1+1=2"]


def test_a_run_of_another_schema_is_named(report, make_run, draw):
    """Guards: one old run that keeps the page from all others; fields read as those of today."""
    good, old = make_run("good", [draw()]), make_run("old", [draw()])
    path = old / "records" / "main.jsonl"
    record = decode_line(path.read_bytes())
    path.write_bytes(encode_line({**record, "schema_version": 0}))
    first, second = block(report(good, old), "index")["runs"]
    assert first["good"] == 1
    assert second["good"] == second["shown"] == 0
    assert "schema 0" in " ".join(second["notes"])
    with pytest.raises(RunFolderError, match="schema 0"):
        report(old)


def test_an_old_record_lacks_some_fields(report, make_run, draw):
    """Guards: no page for a run of an earlier version, whose records are of the same schema."""
    run = make_run("run", [draw("1+1=2", "correct")])
    path = run / "records" / "main.jsonl"
    record = decode_line(path.read_bytes())
    newer = "mode granularity ess_student ess_teacher curvature alpha_weighted chernoff vetoed"
    old = {name: value for name, value in record.items() if name not in newer.split()}
    path.write_bytes(encode_line(old))
    index = block(report(run), "index")
    assert index["runs"][0]["good"] == 1
    assert "alpha" in index["columns"]


def test_scores_of_evaluate(report, make_run, draw, tmp_path):
    """Guards: a folder of scores taken for a run folder."""
    scores = tmp_path / "scores"
    scores.mkdir()
    summary = {"rows": [], "metrics": ["avg@1"], "baseline": "a", "notes": []}
    (scores / "results.json").write_text(json.dumps(summary))
    index = block(report(make_run("run", [draw()]), scores), "index")
    assert [each["name"] for each in index["evaluations"]] == ["scores"]
    assert len(index["runs"]) == 1


def test_lone_surrogates(report, make_run, draw):
    """Guards: an encoding error at the end of a long command."""
    page = report(make_run("run", [draw(error="bad \ud800 é\U0001f642")]))
    [entry] = block(page, "index")["samples"]
    assert "bad \ufffd é\U0001f642" in entry
