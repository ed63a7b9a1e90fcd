"""Loss by position of one or several ways of reading the same documents: numbers, JSON, table."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.table import Table

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.formatting import markdown_table, mean_cell, mean_values
from ttt_megatron.evaluation.statistics import Bucket, BucketSums, Mean, ratio_mean

_FORMAT = "ttt-megatron-loss-by-position-1"


@dataclass(frozen=True, kw_only=True)
class PositionReport:
    """Curves over the same documents, so that differences between them are paired.

    curves: by name, the first being the one others are compared with; documents: their names;
    document_bytes: UTF-8 bytes of the text that each document's measured tokens stand for, or
    None; about: whatever else is worth keeping (checkpoint, window_size, …), plain values.
    """

    buckets: list[Bucket]
    curves: dict[str, BucketSums]
    documents: list[str]
    document_bytes: list[int] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> np.ndarray:
        """Tokens measured, the same for every curve: [documents, buckets]."""
        return next(iter(self.curves.values())).counts

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The differences worth showing: the first curve minus each other one."""
        first, *others = self.curves
        return [(first, other) for other in others]

    def mean(self, curve: str, bucket: int | None = None) -> Mean:
        """Nats a token in one bucket (by its number), or in all."""
        return self._mean(self.curves[curve].nll, bucket)

    def difference(self, curve: str, other: str, bucket: int | None = None) -> Mean:
        """Nats a token of one curve minus another's, document by document."""
        return self._mean(self.curves[curve].nll - self.curves[other].nll, bucket)

    def bits_per_byte(self, curve: str) -> Mean | None:
        """Bits a byte of text over all positions; None if the bytes are not known."""
        if self.document_bytes is None:
            return None
        bits = self.curves[curve].nll.sum(axis=1) / math.log(2)
        return ratio_mean(bits, np.asarray(self.document_bytes))

    def _mean(self, nll: np.ndarray, bucket: int | None) -> Mean:
        if bucket is None:
            return ratio_mean(nll.sum(axis=1), self.counts.sum(axis=1))
        return ratio_mean(nll[:, bucket], self.counts[:, bucket])

    def joined(self, other: "PositionReport", names: Mapping[str, str]) -> "PositionReport":
        """This report with curves of another over the same documents: {name there: name here}.

        Raises UserError if the documents or the positions differ.
        """
        same = self.documents == other.documents and self.buckets == other.buckets
        if not same or not np.array_equal(self.counts, other.counts):
            raise UserError(
                "the two evaluations read different documents: evaluate both with the same data, "
                "length and number of documents"
            )
        added = {here: other.curves[there] for there, here in names.items()}
        return PositionReport(
            buckets=self.buckets,
            curves={**self.curves, **added},
            documents=self.documents,
            document_bytes=self.document_bytes,
            about=self.about,
        )

    def metrics(self) -> dict[str, float]:
        """Figures by name: totals, bits a byte, and every bucket's means."""
        values: dict[str, float] = {}
        for name in self.curves:
            values[f"{name}/total"] = self.mean(name).mean
            bits = self.bits_per_byte(name)
            if bits is not None:
                values[f"{name}/bits_per_byte"] = bits.mean
            for number, bucket in enumerate(self.buckets):
                values[f"{name}/{bucket.start}-{bucket.stop}"] = self.mean(name, number).mean
        for name, other in self.pairs:
            values[f"{name}-minus-{other}/total"] = self.difference(name, other).mean
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def to_json(self) -> str:
        """Everything, means and standard errors written out; `read_report` reads it."""
        value = {
            "format": _FORMAT,
            "about": self.about,
            "buckets": [[bucket.start, bucket.stop] for bucket in self.buckets],
            "curves": {name: self._curve_values(name) for name in self.curves},
            "differences": {
                f"{name} - {other}": {
                    "total": mean_values(self.difference(name, other)),
                    "buckets": [
                        mean_values(self.difference(name, other, number))
                        for number in range(len(self.buckets))
                    ],
                }
                for name, other in self.pairs
            },
            "documents": self.documents,
            "document_bytes": self.document_bytes,
            "document_tokens": self.counts.tolist(),
            "document_nll": {name: _finite(curve.nll) for name, curve in self.curves.items()},
        }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"

    def _curve_values(self, name: str) -> dict[str, Any]:
        return {
            "total": mean_values(self.mean(name)),
            "bits_per_byte": mean_values(self.bits_per_byte(name)),
            "buckets": [
                mean_values(self.mean(name, number)) for number in range(len(self.buckets))
            ],
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text."""
        header = ["position", *self.curves]
        header += [f"{name} - {other}" for name, other in self.pairs] + ["documents"]
        rows = []
        for number, bucket in enumerate([*self.buckets, None]):
            chosen = None if bucket is None else number
            means = [self.mean(name, chosen) for name in self.curves]
            paired = [self.difference(*pair, chosen) for pair in self.pairs]
            label = "all" if bucket is None else f"{bucket.start}-{bucket.stop}"
            cells = [mean_cell(mean) for mean in means] + [mean_cell(mean, "+") for mean in paired]
            rows.append([label, *cells, str(means[0].documents)])
        bits = [self.bits_per_byte(name) for name in self.curves]
        known = [mean for mean in bits if mean is not None]
        if known:
            empty = [""] * len(self.pairs)
            rows.append(["bits a byte", *map(mean_cell, known), *empty, str(known[0].documents)])
        return header, rows

    def table(self) -> Table:
        """The table for a terminal."""
        header, rows = self.rows()
        table = Table(title="loss by position, nats a token ± standard error over documents")
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for number, row in enumerate(rows):
            table.add_row(*row, end_section=number == len(self.buckets) - 1)
        return table

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown_table(*self.rows())


def read_report(path: Path | str) -> PositionReport:
    """Reads what `to_json` wrote; UserError if the file is something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if value["format"] != _FORMAT:
            raise ValueError(f"its format is {value['format']!r}")
        counts = np.asarray(value["document_tokens"], dtype=np.int64)
        return PositionReport(
            buckets=[Bucket(start, stop) for start, stop in value["buckets"]],
            curves={
                name: BucketSums(np.asarray(nll, dtype=float), counts)
                for name, nll in value["document_nll"].items()
            },
            documents=value["documents"],
            document_bytes=value["document_bytes"],
            about=value["about"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no report of `ttt-megatron evaluate` ({error}): evaluate again"
        ) from None


class Written(Protocol):
    """What `write_files` can write."""

    def to_json(self) -> str:
        """Content of the JSON file."""

    def markdown(self) -> str:
        """Content of the Markdown file."""


def write_files(report: Written, folder: Path, stem: str) -> list[Path]:
    """Writes `stem`.json and `stem`.md into `folder` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, text in ((".json", report.to_json()), (".md", report.markdown())):
        path = folder / f"{stem}{suffix}"
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
        written.append(path)
    return written


def _finite(values: np.ndarray) -> list[list[float | None]]:
    """Nested lists in which whatever is no number is None, as JSON has no nan."""
    return [[x if math.isfinite(x) else None for x in row] for row in values.tolist()]
