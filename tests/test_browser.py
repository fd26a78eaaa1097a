"""The page of a run in a real headless Chromium, at a desk and on a phone, light, dark and on paper."""

import numpy as np
import pytest

from learnax.sinks import Report
from learnax.sinks.compare import compare
from tests.browser import CHROMIUM, Browser
from tests.helpers import StopAt, make_data, make_trainer

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make test-browser installs it"),
]
SECTIONS = ["curves", "timeline", "time", "gradients", "programs", "checkpoints", "arguments", "versions"]
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def browser():
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pages of two runs, one of which was stopped and went on, and the comparison of both."""
    folder = tmp_path_factory.mktemp("pages")
    for name, epochs in {"a": 16, "b": 8}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRAINAX_REGISTRY_PATH", str(folder / "registry"))
            options = {
                **{"run": Report(folder / name), "registry": name, "keep_best_checkpoint": True},
                **{"val_datasets": {"val": make_data(9, 1)}, "num_epochs": epochs, "checkpoint_every": 30},
                **{"plot_every": 10, "plot_pipe": lambda run, *_: run.log({"mine": float(np.pi)})},
            }
            trainer = make_trainer(**options)
            if name == "a":
                trainer.parts.hooks.saves.append(StopAt(47))
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
                trainer = make_trainer(load_checkpoint=True, **options)
            trainer.train()
    compare([folder / "a", folder / "b"], folder / "compare.html")
    return folder


def is_whole(browser, width):
    """No error, and nothing wider than the window."""
    assert browser.errors == []
    assert browser.value("document.documentElement.scrollWidth") == width
    texts = browser.value("[...document.querySelectorAll('svg text, td, dd, b')].map(each => each.textContent)")
    assert len(texts) > 50
    assert not [text for text in texts if "NaN" in text or "undefined" in text or "Infinity" in text]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_every_section_is_drawn(browser, folder, width, dark):
    browser.look(width, dark=dark)
    browser.open(folder / "a" / "report.html")
    is_whole(browser, width)
    assert browser.value("[...document.querySelectorAll('section')].map(each => each.id)") == SECTIONS
    titles = browser.value("[...document.querySelectorAll('figure h3')].map(each => each.textContent)")
    assert titles == ["loss", "rmse", "gradient norm", "time of a step", "mine"]
    # Every chart has a line within its picture, and a title for those who hear it.
    for number in range(len(titles)):
        inside = browser.value(
            f"(() => {{ const it = document.querySelectorAll('figure')[{number}];"
            "const lines = [...it.querySelectorAll('polyline')].map(each => each.getBBox());"
            "return [it.querySelector('svg title').textContent, Math.max(...lines.map(each => each.width))]; })()"
        )
        assert inside[0].startswith(f"{titles[number]} over 80 steps: ")
        assert inside[1] > 100
    events = browser.value("[...document.querySelectorAll('.events li')].map(each => each.innerText)")
    assert [
        words in text for words, text in zip(["ended", "resumed", "stopped by SIGINT", "started"], events, strict=True)
    ]
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark
    rows = browser.value("document.querySelectorAll('.heat li').length")
    assert rows == 4
    painted = browser.value(
        "(() => { const it = document.querySelector('canvas');"
        "return [...it.getContext('2d').getImageData(0, 0, it.width, it.height).data].filter(x => x).length })()"
    )
    assert painted > 1000


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_their_ground(browser, folder, dark):
    """Contrast of at least 4.5 to 1, as the Web Content Accessibility Guidelines ask for."""
    browser.look(1280, dark=dark)
    browser.open(folder / "a" / "report.html")
    names = ["--ink", "--soft", "--bad", "--good", *(f"--c{number}" for number in range(8))]
    found = browser.value(
        f"{[*names, '--bg', '--card']}.map(x => getComputedStyle(document.documentElement).getPropertyValue(x).trim())"
    )

    def light(color):
        parts = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for ground in found[-2:]:
        for name, color in zip(names, found, strict=False):
            brighter, darker = sorted((light(color), light(ground)), reverse=True)
            assert (brighter + 0.05) / (darker + 0.05) >= 4.5, f"{name} {color} on {ground}"


def test_pointing_and_keys_show_values(browser, folder):
    browser.look(1280)
    browser.open(folder / "a" / "report.html")
    at_rest = browser.value("document.querySelector('figure .key').innerText")
    assert at_rest.startswith("training ")
    box = browser.value(
        "(() => { const it = document.querySelector('figure [tabindex]').getBoundingClientRect();"
        "return [it.x + it.width / 2, it.y + it.height / 2] })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    keys = browser.value("[...document.querySelectorAll('figure .key')].map(each => each.innerText)")
    assert len(keys) == 5
    assert all(text.startswith("step ") for text in keys)  # all charts are at one step
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.value("document.querySelector('figure .key').innerText") == at_rest
    browser.value("document.querySelector('figure [tabindex]').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert browser.value("document.querySelector('figure .key').innerText").startswith("step 79")
    button = "document.querySelector('figure button')"
    before = browser.value(f"{button}.getAttribute('aria-pressed')")
    browser.value(f"{button}.click()")
    assert browser.value(f"{button}.getAttribute('aria-pressed')") != before
    assert browser.errors == []


def test_paper_is_light_and_whole(browser, folder):
    browser.look(790, dark=True, paper=True)
    browser.open(folder / "a" / "report.html")
    is_whole(browser, 790)
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_stand_beside_each_other(browser, folder, width):
    browser.look(width)
    browser.open(folder / "compare.html")
    is_whole(browser, width)
    assert browser.value("[...document.querySelectorAll('section')].map(each => each.id)") == [
        *("runs", "curves", "arguments", "speed", "time")
    ]
    differ = browser.value("[...document.querySelectorAll('#arguments tbody tr')].map(each => each.innerText)")
    assert "num_epochs\t16\t8" in [line.replace("\n", "") for line in differ]
    assert browser.value("document.querySelector('figure').querySelectorAll('polyline').length") == 4
