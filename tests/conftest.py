"""Options, markers and Hypothesis profiles shared by every test.

Only pytest and hypothesis are imported here, so that the kernel tests run where nothing else is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

os.environ["PAGED_KV_LAB_INTERPRETED"] = "1"  # the commands that tests run are those of the sources

_SLOW_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(
    "quick", max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=_SLOW_CHECKS
)
settings.register_profile(
    "deep", max_examples=2000, stateful_step_count=100, deadline=None, suppress_health_check=_SLOW_CHECKS
)
# A planted bug only has to be found, not explained: shrinking would cost most of the time.
settings.register_profile(
    "mutant",
    max_examples=500,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=_SLOW_CHECKS,
    phases=(Phase.explicit, Phase.generate),
    database=None,
)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--traces",
        metavar="DIR",
        help="folder with the public request traces (azure-llm-2023/, mooncake-fast25/)",
    )
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow; pass --run-slow to include it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which machine found each planted bug, and after how many steps."""
    reports = [each for found in terminalreporter.stats.values() for each in found]
    properties = [each for report in reports for each in getattr(report, "user_properties", ())]
    lines = dict.fromkeys(value for name, value in properties if name == "planted bug")
    if lines:
        terminalreporter.section("planted bugs")
        for line in lines:
            terminalreporter.line(str(line))


@pytest.fixture(scope="session")
def traces_dir(request: pytest.FixtureRequest) -> Path:
    """Return the folder of public traces, or skip: the project ships none of them."""
    given = request.config.getoption("--traces")
    if not given:
        pytest.skip("public traces not given: pass --traces=DIR (see README)")
    folder = Path(given)
    if not folder.is_dir():
        pytest.fail(f"--traces ({given}) is not a folder")
    return folder
