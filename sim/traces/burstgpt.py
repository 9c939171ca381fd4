"""The BurstGPT traces (Wang et al., arXiv 2401.17644): arrival and lengths of ChatGPT and GPT-4 requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.traces.fields import PS_PER_S, FieldError, Row, number_ps, tokens
from sim.traces.formats import CsvFormat


class BurstGptFormat(CsvFormat):
    """CSV: Timestamp (seconds), Request tokens, Response tokens; other columns are not needed.

    Files "with fails" hold requests that got no answer, with 0 response tokens: those rows are malformed here,
    so read such a file with `skip_bad`. A session id names who talked, not which prompt contains which, so it
    makes no turns.
    """

    name = "burstgpt"
    describes = "BurstGPT traces: CSV with Timestamp (s), Request tokens, Response tokens, ..."
    arrival_field = "Timestamp"
    columns = ("Timestamp", "Request tokens", "Response tokens")
    marks: ClassVar[frozenset[str]] = frozenset({"Request tokens", "Response tokens"})

    def parse(self, values: Sequence[str]) -> Row:
        arrival, prompt, output = values
        if output == "0":
            rule = "(0) must be at least 1; such a request got no answer, and skip_bad leaves it out"
            raise FieldError("Response tokens", rule)
        return Row(
            number_ps("Timestamp", arrival, PS_PER_S),
            tokens("Request tokens", prompt),
            tokens("Response tokens", output),
        )
