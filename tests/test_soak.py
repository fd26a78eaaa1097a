"""The short form of `make soak`: real runs under real kills."""

import random

import pytest

from tests.soak import FORMS, soak

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["fused", "two workers"])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(name, tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    report = soak(name, 3, random.Random(seed), tmp_path)
    assert report.kills == 3, f"seed {seed}"
    assert report.differences == [], f"seed {seed}: {report.lives}"
    assert report.damaged == 0, f"seed {seed}"
    assert name in FORMS
