"""The Azure LLM inference traces (Microsoft, CC-BY-4.0): arrival and lengths, no content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.traces.fields import Row, timestamp_ps, tokens
from sim.traces.formats import CsvFormat


class AzureFormat(CsvFormat):
    """CSV: TIMESTAMP (of UTC, up to seven digits of a second, or with an offset), ContextTokens, GeneratedTokens.

    The 2023 traces of Splitwise (Patel et al., ISCA 2024) and those of 2024 have the same columns.
    """

    name = "azure"
    describes = "Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens"
    arrival_field = "TIMESTAMP"
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    marks: ClassVar[frozenset[str]] = frozenset({"ContextTokens", "GeneratedTokens"})

    def parse(self, values: Sequence[str]) -> Row:
        arrival, prompt, output = values
        return Row(
            timestamp_ps("TIMESTAMP", arrival),
            tokens("ContextTokens", prompt),
            tokens("GeneratedTokens", output),
        )
