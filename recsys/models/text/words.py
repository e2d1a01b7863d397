"""The words of texts. Scripts that put no blanks between words give their characters in pairs."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"
_RUN = rf"[{_CJK}]+|[\p{{L}}\p{{M}}\p{{N}}&&[^{_CJK}]]+"


def words(texts: Sequence[str]) -> pl.DataFrame:
    """Each different word of each text, in lower case: (row: uint32, which text; word), by row."""
    runs = (
        pl.DataFrame({"text": texts}, schema={"text": pl.String})
        .with_row_index("row")
        .select("row", run=pl.col("text").str.to_lowercase().str.extract_all(_RUN))
        .explode("run")
        .drop_nulls()
    )
    paired = pl.col("run").str.contains(rf"^[{_CJK}]{{2}}")
    odd, even = pl.col("run").str.slice(1).str.extract_all(".."), pl.col("run").str.extract_all("..")
    pieces = pl.when(paired).then(even.list.concat(odd)).otherwise(pl.concat_list("run"))
    found = runs.select("row", word=pieces).explode("word").drop_nulls()
    return found.unique(maintain_order=True)
