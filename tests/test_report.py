"""The page of a run: what it tells, through stops, in few bytes; and several runs on one."""

import json
import logging
import re

import numpy as np
import pytest

from learnax.__main__ import main
from learnax.loss import LossPipe
from learnax.sinks import JsonLines, Report, page, report
from learnax.sinks.compare import compare
from learnax.sinks.curves import MOST, Curve, unpack
from tests.helpers import Poisonable, StopAt, make_data, make_trainer


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING, "learnax")
    return caplog


def curves(told):
    """Of each metric: steps, means."""
    return {curve["name"]: (unpack(told["x"][curve["x"]]).tolist(), unpack(curve["mean"])) for curve in told["curves"]}


def read(folder):
    return page.read(folder / "report.html")


# ---- curves


@pytest.mark.parametrize("count", [1, 7, MOST, MOST + 1, 5000, 70_001])
def test_a_column_has_the_least_the_largest_and_the_mean_however_the_values_come(count):
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    values[rng.random(count) < 0.1] = np.nan
    curve, whole, at = Curve(), Curve(), 0
    while at < count:
        size = int(rng.integers(1, 900))
        curve.extend(values[at : at + size])
        at += size
    whole.extend(values)
    ends, low, high, mean = curve.columns()
    for mine, other in zip(curve.columns(), whole.columns(), strict=True):
        np.testing.assert_allclose(mine, other)
    assert len(ends) <= MOST
    assert count <= MOST or len(ends) > MOST // 2
    assert ends[-1] == count
    for number in {0, len(ends) // 2, len(ends) - 1}:
        part = values[ends[number - 1] if number else 0 : ends[number]]
        part = part[np.isfinite(part)]
        if len(part):
            np.testing.assert_allclose([low[number], high[number], mean[number]], [part.min(), part.max(), part.mean()])
    fewer = curve.columns(16)
    assert len(fewer[0]) <= 16
    np.testing.assert_allclose(np.nanmin(fewer[1]), np.nanmin(values)) if np.isfinite(values).any() else None


# ---- a run


def test_the_page_has_what_the_run_was(tmp_path, registry_path):
    trainer = make_trainer(
        run=[Report(tmp_path / "report"), JsonLines(tmp_path / "a.jsonl")],
        val_datasets={"held out": make_data(9, 1)},
        num_epochs=4,
        val_every=2,
        registry="tests",
        keep_best_checkpoint=True,
        best_metric_name="held out/loss",
        checkpoint_every=6,
        sample_every=6,
        sample_model=lambda params, key, datum: datum[0].sum(),
        sample_metrics=lambda sample, datum: {"size": float(sample)},
        plot_every=7,
        plot_pipe=lambda run, *_: run.log({"mine": 2.0}),
    )
    trainer.train()
    told, metrics = read(tmp_path / "report"), trainer.metrics
    shown = curves(told)
    for name in ("train/loss", "train/rmse", "train/learning_rate", "train/update_time"):
        assert shown[name][0] == list(range(1, 21))
        np.testing.assert_array_equal(shown[name][1], np.float32(metrics[name]))
    assert shown["held out/loss"][0] == [5, 15, 20]
    np.testing.assert_array_equal(shown["held out/loss"][1], np.float32(metrics["held out/loss"]))
    assert shown["train/size"][0] == [6, 12, 18]
    assert not any("_epoch/" in name for name in shown)
    assert told["own"] == [{"name": "mine", "x": [7.0, 14.0], "y": [2.0, 2.0]}]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    assert told["norms"]["names"] == ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"]
    for name, packed in zip(told["norms"]["names"], told["norms"]["values"], strict=True):
        np.testing.assert_array_equal(unpack(packed), np.float32([row[f"grads/{name}"] for row in rows]))
    assert (told["state"], told["step"], told["epoch"], told["num_epochs"]) == ("complete", 20, 4, 4)
    assert [(event["what"], event["step"]) for event in told["events"]] == [("started", 0), ("ended", 20)]
    numbered = [save["step"] for save in told["saves"] if save["numbered"]]
    assert numbered == [6, 12, 18]
    (best,) = [save for save in told["saves"] if save["best"]]
    assert best["metric"] == "held out/loss"
    assert best["value"] == min(metrics["held out/loss"])
    assert told["ledger"]["steps"] == 20
    assert sum(row["seconds"] for row in told["ledger"]["rows"]) == pytest.approx(told["ledger"]["wall"])
    assert {program["kind"] for program in told["programs"]} == {"train", "evaluate", "sample"}
    assert next(program for program in told["programs"] if program["kind"] == "train")["reused"] > 0
    assert told["arguments"]["num_epochs"] == "4"
    assert told["arguments"]["train_dataset"] == "list of 43"
    assert told["arguments"]["losses"] == "LossPipe of Squared"
    assert told["arguments"]["val_datasets"] == "held out: list of 9"
    assert "load_checkpoint" not in told["arguments"]
    assert told["versions"].keys() >= {"Python", "learnax", "jax", "flax"}
    assert told["devices"] == ["1 x cpu"]
    assert told["parameters"] == 195
    assert told["parameter_bytes"] == 780


def test_the_page_needs_nothing_beside_it(tmp_path):
    make_trainer(run=Report(tmp_path)).train()
    text = (tmp_path / "report.html").read_text()
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, and no address
    assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(?!data:)", text)
    assert "@import" not in text
    assert "fetch(" not in text


def test_what_a_run_is_called_ends_no_script(tmp_path):
    data = {"version": 1, "title": "</script><script>alert(1)</script>@@SCRIPT@@", "x": "<!--"}
    text = page.page(data)
    assert text.count("</script>") == 2
    page.write(tmp_path / "a.html", text)
    assert page.read(tmp_path / "a.html") == data


def test_the_page_is_there_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_LEAST_S", 0.0)
    monkeypatch.setattr(report, "_SHARE", 0)
    seen = []

    def save_model(params):
        told = read(tmp_path)
        seen.append((told["state"], len(curves(told)["train/loss"][0])))

    make_trainer(run=Report(tmp_path), save_every=4, save_model=save_model, steps_per_execution=1).train()
    assert seen == [("running", 4), ("running", 8)]
    assert read(tmp_path)["state"] == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_is_written_seldom(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(page, "write", lambda path, text: written.append(len(text)))
    make_trainer(run=Report(tmp_path), num_epochs=20, steps_per_execution=1).train()
    assert len(written) == 2, "at the beginning and at the end of a second"


def test_a_run_that_was_stopped_goes_on_with_its_page(tmp_path):
    options = {"registry": "tests", "val_datasets": [make_data(9, 1)], "num_epochs": 3}
    first = make_trainer(run=Report(tmp_path), **options)
    first.parts.hooks.saves.append(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert read(tmp_path)["state"] == "stopped"
    second = make_trainer(run=Report(tmp_path), load_checkpoint=True, **options)
    for epoch in range(1, 3):  # a session for each
        second.epoch(epoch)
    told = read(tmp_path)
    assert [(event["what"], event["step"], event["text"]) for event in told["events"]] == [
        ("started", 0, ""),
        ("stopped", 7, "SIGINT"),
        ("resumed", 7, ""),
        ("ended", 15, ""),
    ]
    shown = curves(told)
    assert shown["train/loss"][0] == list(range(1, 16))
    np.testing.assert_array_equal(shown["train/loss"][1], np.float32(second.metrics["train/loss"]))
    assert shown["val/loss"][0] == [5, 10, 15]
    assert unpack(told["norms"]["x"]).tolist() == list(range(1, 16))
    assert told["seconds_before"] > 0


def test_a_loop_over_epochs_is_one_run(tmp_path):
    trainer = make_trainer(run=Report(tmp_path))
    for epoch in range(2):
        trainer.epoch(epoch)
    told = read(tmp_path)
    assert [event["what"] for event in told["events"]] == ["started", "ended"]
    assert curves(told)["train/loss"][0] == list(range(1, 11))
    assert told["seconds_before"] == 0


def test_a_fresh_run_moves_the_page_of_another_one_aside(tmp_path, caplog):
    make_trainer(run=Report(tmp_path), num_epochs=1).train()
    before = read(tmp_path)
    make_trainer(run=Report(tmp_path)).train()
    assert page.read(tmp_path / "report.1.html") == before
    assert read(tmp_path)["step"] == 10
    assert caplog.messages == [
        f"Report('{tmp_path}'): the page of another run is moved to {tmp_path / 'report.1.html'}"
    ]


def test_dropped_updates_are_on_the_time_line(tmp_path):
    data = make_data(40)
    data[17][1][0] = data[24][1][0] = 7
    trainer = make_trainer(run=Report(tmp_path), train_dataset=data, losses=LossPipe([Poisonable()]))
    trainer.train()
    told = read(tmp_path)
    assert told["dropped"] == {"steps": [2, 2, 5, 5], "count": 4}
    assert curves(told)["train/loss"][0] == [1, 2, 2, 2, 3, 4, 5, 5, 5, 6]


def test_a_trainer_writes_its_page_without_a_sink(tmp_path):
    trainer = make_trainer(val_datasets=[make_data(9, 1)])
    trainer.report(tmp_path / "new" / "before.html")
    assert page.read(tmp_path / "new" / "before.html")["curves"] == []
    trainer.epoch(0)
    trainer.report(tmp_path / "half.html")
    trainer.epoch(1)
    trainer.report(tmp_path / "whole.html")
    half, whole = page.read(tmp_path / "half.html"), page.read(tmp_path / "whole.html")
    assert (half["state"], whole["state"]) == ("paused", "complete")
    assert curves(whole)["train/loss"][0] == list(range(1, 11))
    assert curves(whole)["val/loss"][0] == [5, 10]
    assert unpack(whole["norms"]["x"]).tolist() == list(range(1, 11))


def test_the_page_of_many_metrics_over_many_steps_is_small(tmp_path):
    trainer = make_trainer()
    steps = np.arange(100_000)
    for number in range(60):
        trainer.metrics[f"train/metric {number}"] = np.exp(-steps / 3e4 + number).tolist()
    trainer.metrics["train/has_nan"] = np.zeros(len(steps)).tolist()
    trainer.log.step = len(steps)
    trainer.report(tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 2_000_000
    told = page.read(tmp_path / "a.html")
    assert len(told["curves"]) == 61
    assert curves(told)["train/metric 7"][0][-1] == len(steps)


def test_many_parameters_are_shown_by_their_modules():
    names = tuple(f"grads/block_{block}/layer_{layer}/kernel" for block in range(8) for layer in range(20))
    values = np.arange(160, dtype=np.float32)
    told = report._packed_norms(names, [(1, values), (2, 2 * values)])
    assert told["names"] == [f"block_{block}/…" for block in range(8)]
    assert told["parameters"] == 160
    expected = np.sqrt(np.square(values.reshape(8, 20)).sum(1))
    np.testing.assert_allclose(
        [unpack(row) for row in told["values"]], np.stack([expected, 2 * expected], 1), rtol=1e-6
    )


def test_what_cannot_be_written_ends_nothing(tmp_path, caplog, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write", full)
    trainer = make_trainer(run=[Report(tmp_path), JsonLines(tmp_path / "a.jsonl")])
    trainer.train()
    assert len(trainer.metrics["train/loss"]) == 10
    name = f"Report('{tmp_path}')"
    assert caplog.messages == [
        f"{name} raised OSError: [Errno 28] No space left on device; training goes on",
        f"{name}: OSError: [Errno 28] No space left on device",
    ]


# ---- several runs


@pytest.fixture
def two(tmp_path):
    for name, options in {"a": {}, "b": {"learning_rate": 1e-3, "num_epochs": 1}}.items():
        make_trainer(run=Report(tmp_path / name / "out"), val_datasets=[make_data(9, 1)], **options).train()
    return tmp_path


def test_runs_are_laid_over_each_other(two, capsys, monkeypatch):
    monkeypatch.chdir(two)
    assert main(["report", "a", "b/out/report.html", "--out", "new/compare.html"]) == 0
    assert capsys.readouterr().out == "new/compare.html\n"
    told = page.read(two / "new" / "compare.html")
    assert [run["label"] for run in told["runs"]] == ["a", "b"]
    assert told["title"] == "a, b"
    assert [run["arguments"]["learning_rate"] for run in told["runs"]] == ["0.01", "0.001"]
    assert [run["step"] for run in told["runs"]] == [10, 5]


def test_what_is_no_page_of_a_run_is_named(two, capsys, monkeypatch):
    monkeypatch.chdir(two)
    (two / "none").mkdir()
    (two / "other.html").write_text("<html></html>")
    compare(["a", "b"], "both.html")
    wrong = {
        ("a",): "a comparison takes two runs or more, but got 1",
        ("a", "a/out"): "a/out/report.html is there twice",
        ("a", "missing"): "there is no missing",
        ("a", "none"): "no report.html in none: a run writes one with run=learnax.sinks.Report(folder), or",
        ("a", "."): ". has 2 pages, a/out/report.html, b/out/report.html; name one of them",
        ("a", "other.html"): "other.html is no report of learnax: it has no data of a run",
        ("a", "both.html"): "both.html is a comparison itself, and no page of a run",
    }
    for given, text in wrong.items():
        assert main(["report", *given, "--out", "out.html"]) == 2
        assert text in capsys.readouterr().err
    assert not (two / "out.html").exists()
