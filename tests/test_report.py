"""The report: its numbers are the run's, what it leaves out is said, and no text of a model
gets out of its place."""

import base64
import gzip
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from configs import gppo_tiny, sft_tiny
from klear_jax import losses, report, tokens
from klear_jax.errors import InputError
from tests.test_tokens import CHAIN, make_hugging_face

HOSTILE = (
    "</script><img src=x onerror=\"document.title='broken'\"><!-- <script> ]]> "
    "\u2028\u2029 & &lt; {{DATA}} ${alert(1)} \ud800 \\u003cb\\u003e '\"`"
)
THOUGHT = "<think>7+5=12</think>\\boxed{\\frac{24}{2}} = $x^2$"


def config_of(task, **changes):
    module = {"gppo": gppo_tiny, "sft": sft_tiny}[task]
    values = json.loads(module.get_config().to_json())
    del values["task"]
    for key, value in changes.items():
        section = values
        *sections, name = key.split("__")
        for one in sections:
            section = section[one]
        section[name] = value
    return values


def line(step, **values):
    return {
        "step": step,
        "reward/correct": step / 100,
        "entropy": 0.5,
        "updates": 4.0,
        "seconds/step": 1.5,
    } | {name.replace("__", "/"): value for name, value in values.items()}


def sample(group, response="<think>1</think>2", *, advantage=0.5, ids=None, **values):
    row = {
        "prompt_id": 7,
        "prompt": "7+5=",
        "source": "",
        "response": response,
        "reward": 1.0,
        "reward_status": "ok",
        "reward_detail": "",
        "advantage": advantage,
        "group": group,
        "finished": True,
        "num_tokens": len(ids or response),
        "policy_steps": [0],
        "logprob": -1.25,
    }
    if ids is not None:
        row |= {
            "tokens": ids,
            "old_logp": [-0.125] * len(ids),
            "log_ratio": np.linspace(-0.5, 0.5, len(ids)).tolist(),
        }
    return row | values


def write(folder, config, lines, steps=None):
    """A workdir; `steps` has the samples of some."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for step, rows in (steps or {}).items():
        (folder / "rollouts").mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    return str(folder)


def read(page):
    """What the page embeds, as its script reads it: the data, and samples by step of the
    first run."""

    class Reader(html.parser.HTMLParser):
        texts, at = {}, None

        def handle_starttag(self, tag, attributes):
            self.at = dict(attributes).get("id") if tag == "script" else None

        def handle_data(self, text):
            if self.at:
                self.texts[self.at] = self.texts.get(self.at, "") + text

        def handle_endtag(self, tag):
            self.at = None

    reader = Reader()
    reader.texts = {}
    reader.feed(page)
    data = json.loads(reader.texts["data"])
    steps = {
        one["step"]: json.loads(
            gzip.decompress(base64.b64decode(reader.texts[one["blob"]]))
        )
        for one in data["runs"][0]["samples"]
    }
    return data, steps


@pytest.fixture
def make(tmp_path):
    """Writes workdirs, numbered."""
    count = iter(range(100))

    def make(task="gppo", lines=None, steps=None, **changes):
        folder = tmp_path / f"run_{next(count)}"
        lines = [line(step) for step in range(4)] if lines is None else lines
        return write(folder, config_of(task, **changes), lines, steps)

    return make


def test_the_numbers_are_those_of_the_metrics(make):
    lines = [
        line(0, eval__accuracy=0.123456789, sampler__slot_steps=123456789.0),
        line(1, loss=-3.5e-7),
        line(2, eval__accuracy=None),
    ]
    data, _ = read(report.make_page([make(lines=lines)], None))
    (run,) = data["runs"]
    assert run["series"]["reward/correct"] == {"x": [0, 1, 2], "y": [0, 0.01, 0.02]}
    assert run["series"]["eval/accuracy"] == {"x": [0, 2], "y": [0.1234568, None]}
    assert run["series"]["loss"] == {"x": [1], "y": [-3.5e-7]}
    assert run["series"]["sampler/slot_steps"]["y"] == [123456789]
    assert (run["done"], run["planned"], run["task"]) == (3, 60, "gppo")
    assert run["config"] == config_of("gppo")
    assert ["loss.clip_high", 0.28] in run["highlights"]
    assert run["limits"]["entropy"] == 0.01


def test_thinning_keeps_the_ends_the_extremes_and_what_is_no_number():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_001).tolist()
    values[4_321], values[7_000], values[9_000] = 50.0, -50.0, None
    steps = list(range(5, 10_006))
    found = report.thinned(steps, values, 500)
    assert 400 < len(found["x"]) <= 503
    assert found["x"] == sorted(set(found["x"]))
    places = dict(zip(found["x"], found["y"], strict=True))
    assert places[4_326] == 50 and places[7_005] == -50 and places[9_005] is None
    assert found["x"][0] == 5 and found["x"][-1] == 10_005
    for step, value in places.items():
        assert value == report.short(values[step - 5])
    assert report.thinned([1, 2], [0.5, None], 500) == {"x": [1, 2], "y": [0.5, None]}
    means = found["means"]
    assert len(means["x"]) == 249 and set(means["x"]) <= set(steps)
    numbers = [0 if v is None else v for v in values]
    assert np.mean(means["y"]) == pytest.approx(np.mean(numbers), abs=1e-3)
    nothing = report.thinned(range(900), [None] * 900, 100)
    assert set(nothing["y"]) == {None}


def check_of(workdir, name):
    data, _ = read(report.make_page([workdir], None))
    (found,) = [c for c in data["runs"][0]["checks"] if c["name"].startswith(name)]
    return found


def test_a_healthy_run_has_good_checks_alone(make):
    data, _ = read(report.make_page([make()], None))
    assert {c["level"] for c in data["runs"][0]["checks"]} == {"good", "unknown"}
    assert check_of(make(), "entropy below 0.01")["says"] == "lowest 0.5, step 0"
    assert check_of(make(), "grad_norm")["says"] == "not measured"


@pytest.mark.parametrize(
    "bad, name, says",
    [
        ({"entropy": 0.001}, "entropy below", "steps 1 to 2; lowest 0.001, step 1"),
        ({"logprob_gap__mean": 0.5}, "logprob_gap/mean above", "steps 1 to 2; highest"),
        ({"updates": 0.0}, "no update", "steps 1 to 2"),
        ({"updates_skipped": 1.0}, "updates_skipped", "steps 1 to 2"),
        ({"reward__masked_late": 3.0}, "reward/masked_late", "steps 1 to 2"),
        ({"loss": None}, "loss is no number", "steps 1 to 2"),
    ],
)
def test_what_is_broken_is_said_with_its_steps_and_advice(make, bad, name, says):
    run = make(lines=[line(0), line(1, **bad), line(2, **bad), line(3)])
    found = check_of(run, name)
    assert found["says"].startswith(says)
    assert found["advice"]
    # Levels: what was never measured again is as it was when it was last seen.
    assert found["level"] == (
        "bad"
        if bad.keys() & {"logprob_gap__mean", "updates_skipped", "reward__masked_late"}
        else "past"
    )
    last = make(lines=[line(0), line(1, **bad)])
    assert check_of(last, name)["level"] == "bad"


def test_unplanned_compilations_are_counted_where_they_happen(make):
    counts = [0.0, 2.0, 2.0, 3.0, 0.0, 1.0]
    lines = [line(i, compilations__unplanned=n) for i, n in enumerate(counts)]
    assert check_of(make(lines=lines), "compilations")["says"] == "steps 1, 3, 5"


def test_a_mean_of_nothing_is_no_fault_and_a_saved_batch_is(make):
    run = make(lines=[line(0, samples__length_wrong=None)])
    assert check_of(run, "a metric is no number")["level"] == "good"
    (report.epath.Path(run) / "not_finite_step_000001.npz").touch()
    found = check_of(run, "loss or gradient no number")
    assert (found["level"], found["says"]) == (
        "bad",
        "the batch is in not_finite_step_000001.npz",
    )
    lines = [line(step) for step in range(4)]
    damage(run, "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    assert check_of(run, "loss or gradient no number")["level"] == "past"


def test_seeds_are_one_group_and_others_say_what_differs(make):
    runs = [
        make(seed=0, workdir="a", loss__kind="gppo"),
        make(loss__kind="cispo", loss__dual_clip=None),
        make(seed=1, workdir="b", init_from="other", loss__kind="gppo"),
    ]
    data, _ = read(report.make_page(runs, None))
    assert data["groups"] == [
        {"runs": [0, 2], "differs": [["loss.dual_clip", 10.0], ["loss.kind", "gppo"]]},
        {"runs": [1], "differs": [["loss.dual_clip", None], ["loss.kind", "cispo"]]},
    ]
    assert [run["name"] for run in data["runs"]] == ["run_0", "run_1", "run_2"]
    one, _ = read(report.make_page(runs[:1], None))
    assert one["groups"] == [{"runs": [0], "differs": []}]


def test_samples_are_those_of_evenly_spread_steps_or_the_given_ones(make):
    steps = {step: [sample(0)] for step in range(0, 300, 3)}
    run = make(lines=[line(299)], steps=steps)
    data, found = read(report.make_page([run], None))
    assert len(found) == report.STEPS and {0, 297} <= found.keys()
    assert set(np.diff(list(found))) == {15, 18}
    assert data["runs"][0]["notes"] == [
        "samples of 20 of 100 steps are here; --steps=10,20 chooses others"
    ]
    _, found = read(report.make_page([run], [3, 150]))
    assert list(found) == [3, 150]
    with pytest.raises(InputError, match="--steps=4: there are no samples of it"):
        report.make_page([run], [3, 4])


def test_groups_with_tokens_go_first_and_as_many_as_there_is_room_for():
    def of(group, cost, has_tokens=False, trained=True):
        return report.Summary(group, 1.0, has_tokens, trained, cost)

    found = [of(0, 10, trained=False), of(1, 10), of(1, 10), of(2, 10), of(3, 10, True)]
    assert report.choose_groups(found, 1) == {3}
    assert report.choose_groups(found, 30) == {3, 1}
    assert report.choose_groups(found, 40) == {3, 1, 2}
    assert report.choose_groups(found, 100) == {0, 1, 2, 3}
    many = [of(group, 1) for group in range(100)]
    assert report.choose_groups(many, 1000) == set(range(report.GROUPS))


def test_a_step_says_what_there_was_in_all(make, monkeypatch):
    monkeypatch.setattr(report, "GROUPS", 2)
    rows = [sample(g, reward=float(g)) for g in range(4) for _ in range(2)]
    _, found = read(report.make_page([make(steps={0: rows})], None))
    assert [row["group"] for row in found[0]["samples"]] == [0, 0, 1, 1]
    assert (found[0]["all_groups"], found[0]["all_samples"]) == (4, 8)
    assert found[0]["mean_reward"] == 1.5


def test_what_a_sample_shows(make):
    rows = [
        sample(0, reward=1.0),
        sample(0, reward=None, advantage=None, reward_status="late"),
    ]
    _, found = read(report.make_page([make(steps={0: rows})], None))
    right, masked = found[0]["samples"]
    assert right["correct"] and not masked["correct"]
    assert masked["reward"] is None and masked["advantage"] is None
    assert right["parts"] == [
        {"text": "<think>1</think>2", "thinking": False, "formulas": []}
    ]


def test_hostile_text_stays_in_its_place(make):
    rows = [
        sample(0, HOSTILE, prompt=HOSTILE, source=HOSTILE, reward_detail=HOSTILE),
        sample(0, f"${HOSTILE}$ \\boxed{{\\href{{javascript:x}}{{</math>}}}}"),
    ]
    lines = [line(0, **{HOSTILE: 1.0})]
    run = make(lines=lines, steps={0: rows}, tokenizer=HOSTILE, seed=HOSTILE)
    page = report.make_page([run], None)
    template = report.fill_template({"runs": [], "groups": []}, {})
    # The same tags as an empty page, but for that of the samples; and all is still there.
    tags = re.compile(r"<[!/a-zA-Z][^>]*>")
    added = '<script type="text/plain" id="samples-0">'
    assert tags.findall(page) == [
        one
        for tag in tags.findall(template)
        for one in ([added, "</script>", tag] if tag == "<script>" else [tag])
    ]
    assert page.isascii() or set(page) <= set(template)
    data, found = read(page)
    assert data["runs"][0]["config"]["tokenizer"] == HOSTILE
    assert HOSTILE in data["runs"][0]["series"]
    shown = found[0]["samples"][0]
    assert [shown[n] for n in ("prompt", "source", "reward_detail")] == [HOSTILE] * 3
    assert shown["parts"][0]["text"] == HOSTILE


def test_only_the_page_s_own_script_and_style_may_run(make):
    page = report.make_page([make()], None)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert (
        len(script) == 1 and f"script-src '{report.content_hash(script[0])}'" in policy
    )
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for way_in in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
    ):
        assert way_in not in script[0]
    assert "http" not in re.sub(r"http://www\.w3\.org/\S*", "", script[0])


# ---- Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_hugging_face(folder)
    return tokens.load(folder)


def with_tokens(make, tokenizer, texts, **changes):
    """A run whose samples have these responses, with tokens and a stop token."""
    rows = [
        sample(0, text, ids=[*tokenizer.encode(text), tokenizer.stop_ids[0]])
        for text in texts
    ]
    run = make(steps={0: rows}, **changes)
    tokenizer.save(report.epath.Path(run) / "model")
    return run, rows


def text_of(part, *, plain):
    whole = [x if isinstance(x, list) else [x, 1, True] for x in part["pieces"]]
    return "".join(text for text, _, is_plain in whole if is_plain or not plain)


def test_the_pieces_of_tokens_make_up_the_response(make, tokenizer):
    texts = [CHAIN, "é😀 中文\n\nx<think>½", ""]
    run, rows = with_tokens(make, tokenizer, texts)
    _, found = read(report.make_page([run], None))
    for shown, row in zip(found[0]["samples"], rows, strict=True):
        (part,) = shown["parts"]
        assert text_of(part, plain=True) == row["response"]
        assert part["pieces"][-1] == ["<|im_end|>", 1, False]
        counts = [x[1] if isinstance(x, list) else 1 for x in part["pieces"]]
        assert sum(counts) == len(part["ids"]) == len(part["regions"])
        assert part["ids"] == row["tokens"]
        np.testing.assert_allclose(part["log_ratio"], row["log_ratio"], atol=1e-5)
    assert ["😀", 4, True] in found[0]["samples"][1]["parts"][0]["pieces"]


def test_regions_are_those_of_the_loss(make, tokenizer):
    rows = [
        sample(0, advantage=a, ids=tokenizer.encode(CHAIN)) for a in (1.0, -1.0, None)
    ]
    rows[1]["log_ratio"] = [-1.0, 0.0, 1.0, 3.0, *rows[1]["log_ratio"][4:]]
    rows[2]["log_ratio"][0] = None
    run = make(steps={0: rows})
    tokenizer.save(report.epath.Path(run) / "model")
    _, found = read(report.make_page([run], None))
    loss = config_of("gppo")["loss"]
    clip = {
        name: loss[name]
        for name in (
            "kind",
            "clip_low",
            "clip_high",
            "beta_low",
            "beta_high",
            "dual_clip",
        )
    }
    for shown, row in zip(found[0]["samples"], rows, strict=True):
        regions = shown["parts"][0]["regions"]
        x = np.float32([[0.0 if r is None else r for r in row["log_ratio"]]])
        advantage = np.float32([[row["advantage"] or 0]])
        _, counted = losses.policy_loss(
            x, np.zeros_like(x), advantage, np.ones_like(x), **clip
        )
        for name in ("low", "high", "dual"):
            assert regions.count(name[0]) == counted[f"tokens_{name}"]
    assert found[0]["samples"][1]["parts"][0]["regions"][:4] == "liid"
    assert set(found[0]["samples"][2]["parts"][0]["regions"]) == {"i"}


def test_a_long_response_is_cut_in_the_middle(make, tokenizer, monkeypatch):
    monkeypatch.setattr(report, "RESPONSE_TOKENS", 10)
    monkeypatch.setattr(report, "RESPONSE_CHARACTERS", 20)
    text = "<think>" + "7" * 40 + "</think>9"
    run, (row,) = with_tokens(make, tokenizer, [text])
    shown = read(report.make_page([run], None))[1][0]["samples"][0]
    first, last = shown["parts"]
    num = len(row["tokens"])
    assert shown["left_out"] == f"{num - 10} tokens"
    assert (first["start"], last["start"]) == (0, num - 5)
    assert first["ids"] + last["ids"] == row["tokens"][:5] + row["tokens"][-5:]
    assert text.startswith(text_of(first, plain=True))
    assert text.endswith(text_of(last, plain=True))
    assert (first["thinking"], last["thinking"]) == (False, True)
    (plain,) = read(report.make_page([make(steps={0: [sample(0, text)]})], None))[1][0][
        "samples"
    ]
    assert [part["text"] for part in plain["parts"]] == [text[:10], text[-10:]]
    assert plain["left_out"] == f"{len(text) - 20} characters"
    assert [part["thinking"] for part in plain["parts"]] == [False, True]
    (unopened,) = report.parts_of_text("7+5</think>9")[0][:1]
    assert unopened["thinking"]


# ---- Formulas


def test_formulas_are_found_and_broken_ones_stay_text():
    typeset = report.Formulas()
    text = "😀 $x^2$, \\(y\\) and \\boxed{\\frac{1}{2}}; $5 and $6, $\\frac{1$, $$\\sum_{i} i$$ $x^2$"
    found = typeset.find(text)
    units = text.encode("utf-16-le")
    sources = [units[2 * a : 2 * b].decode("utf-16-le") for a, b, _ in found]
    assert sources == [
        "$x^2$",
        "\\(y\\)",
        "\\boxed{\\frac{1}{2}}",
        "$$\\sum_{i} i$$",
        "$x^2$",
    ]
    assert found[0][2] == found[-1][2] and len(typeset.trees) == 4
    assert typeset.trees[0] == [
        "math",
        {"display": "inline"},
        ["mrow", {}, ["msup", {}, ["mi", {}, "x"], ["mn", {}, "2"]]],
    ]
    assert typeset.trees[3][1] == {"display": "block"}


@pytest.mark.parametrize(
    "latex",
    [
        "1}",
        "\\frac{1",
        "\\frac{1}",
        "\\foo{x}",
        "x^",
        "a & b",
        "x_{" * 50 + "x" + "}" * 50,
    ],
)
def test_broken_formulas_are_none(latex):
    assert report.to_mathml(latex, block=False) is None


def test_mathml_holds_only_what_is_allowed():
    for latex in (
        "\\href{javascript:alert(1)}{x}",
        "\\text{</math><script>}",
        "\\style{x}{y}",
        "\\class{a}{b}",
        "{" * 500,
    ):
        tree = report.to_mathml(latex, block=False)
        stack = [tree] if tree else []
        while stack:
            tag, attributes, *children = stack.pop()
            assert tag in report.TAGS and set(attributes) <= report.ATTRIBUTES
            stack += [child for child in children if isinstance(child, list)]


# ---- Input


def test_an_sft_run_has_no_samples(make):
    lines = [{"step": step, "loss": 1 / (step + 1)} for step in range(3)]
    data, found = read(report.make_page([make("sft", lines=lines)], None))
    assert data["runs"][0]["task"] == "sft" and found == {}
    assert data["runs"][0]["series"]["loss"]["y"] == [1, 0.5, 0.3333333]


def test_a_run_under_way_is_shown_without_its_last_line(make):
    run = make(steps={0: [sample(0)], 1: [sample(0)] * 2})
    for name in ("metrics.jsonl", "rollouts/step_000001.jsonl"):
        path = report.epath.Path(run) / name
        path.write_text(path.read_text()[:-20])
    data, found = read(report.make_page([run], None))
    assert data["runs"][0]["done"] == 3
    assert len(found[1]["samples"]) == 1
    assert data["runs"][0]["notes"] == [
        f"the last line of {name} is cut off and left out"
        for name in ("metrics.jsonl", "step_000001.jsonl")
    ]


def damage(run, name, text):
    (report.epath.Path(run) / name).write_text(text)


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged: it is no object"),
        ("metrics.jsonl", "", "holds no step: the run has not finished its first one"),
        ("metrics.jsonl", '{"step": 0', "holds no step"),
        (
            "metrics.jsonl",
            '{"step": 0}\nx\n{"step": 1}\n',
            "metrics.jsonl line 2 is damaged",
        ),
        ("metrics.jsonl", '{"loss": 0}\n', "line 1 is damaged: it lacks .'step'"),
        ("metrics.jsonl", '{"step": 0, "loss": "x"}\n', "line 1 is damaged: .*'x'"),
        ("metrics.jsonl", '{"step": "0"}\n', "line 1 is damaged: .*'0'"),
        ("rollouts/step_000000.jsonl", "{}\n", "step_000000.jsonl line 1 is damaged"),
        ("rollouts/step_000000.jsonl", "[1]\n", "step_000000.jsonl line 1 is damaged"),
    ],
)
def test_damaged_files_are_one_sentence(make, name, text, sentence):
    run = make(steps={0: [sample(0)]})
    damage(run, name, text)
    with pytest.raises(InputError, match=sentence):
        report.make_page([run], None)


def test_tokens_that_do_not_fit_are_one_sentence(make, tokenizer):
    run, (row,) = with_tokens(make, tokenizer, [CHAIN])
    row["old_logp"].pop()
    damage(run, "rollouts/step_000000.jsonl", json.dumps(row) + "\n")
    with pytest.raises(
        InputError, match=r"step_000000.jsonl line 1 is damaged: .*old_logp"
    ):
        report.make_page([run], None)


def test_bad_flags_are_one_sentence(make, tmp_path):
    with pytest.raises(InputError, match="--workdir=DIR is missing"):
        report.main(["report"])
    with pytest.raises(InputError, match=r"holds no run: there is no config.json"):
        report.main(["report", f"--workdir={tmp_path}"])
    with pytest.raises(InputError, match="--steps must be numbers such as 10,20"):
        report.main(["report", f"--workdir={make()}", "--steps=10,x"])
    run = make()
    with pytest.raises(InputError, match="names a run twice"):
        report.main(["report", f"--workdir={run},{run}"])


def test_the_command_writes_the_same_file_each_time(make, tmp_path, capsys):
    run = make(steps={0: [sample(0, THOUGHT)]})
    report.main(["report", f"--workdir={run}"])
    once = (report.epath.Path(run) / "report.html").read_bytes()
    report.main(["report", f"--workdir={run}", f"--output={tmp_path / 'x.html'}"])
    assert (tmp_path / "x.html").read_bytes() == once
    assert f"{tmp_path / 'x.html'}: 0.1 MB" in capsys.readouterr().out
    assert base64.b64decode(report.packed({}))[4:8] == bytes(4)  # gzip's time.


# ---- In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_a_browser_draws_the_page_and_runs_nothing_else(make, tmp_path):
    rows = [sample(0, HOSTILE, prompt=HOSTILE)]
    run = make(steps={0: rows}, tokenizer=HOSTILE)
    path = tmp_path / "page.html"
    report.main(["report", f"--workdir={run}", f"--output={path}"])
    found = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"),
            f"file://{path}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "<title>run_0 - klear_jax</title>" in found
    assert "Healthy" in found and 'class="line"' in found
    assert "<img" not in found
