"""The short form of `make soak`: a real run under real kills."""

import random

import pytest

from tests.soak import FORMS, soak

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

OPTIONS = FORMS["fused"] | FORMS["hooks and a probe"] | FORMS["two workers"] | {"epochs": 12}


@pytest.mark.soak
@pytest.mark.parametrize("form", ["shuffled, two workers", "a stream, validated by steps"])
def test_a_killed_run_goes_on_with_the_rest_of_its_order_and_of_its_stream(form, tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    options = FORMS[form] | {"epochs": 15}
    report = soak(form, options, 1, random.Random(seed), tmp_path, alone=options | {"workers": 0}, timed=False)
    assert report.kills == 1, f"seed {seed}"
    assert report.differences == [], f"seed {seed}: {report.lives}"
    assert report.damaged == 0, f"seed {seed}"


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    assert (OPTIONS["trainer"], OPTIONS["workers"]) == ({"steps_per_execution": 16}, 2)
    seed = random.SystemRandom().randrange(1 << 32)
    alone = OPTIONS | {"workers": 0}  # who reads the data makes no difference
    report = soak("fused, two workers", OPTIONS, 2, random.Random(seed), tmp_path, alone=alone, timed=False)
    assert report.kills == 2, f"seed {seed}"
    assert report.differences == [], f"seed {seed}: {report.lives}"
    assert report.damaged == 0, f"seed {seed}"
