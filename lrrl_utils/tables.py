"""Tables that are shown as Markdown and HTML and told in numbers as CSV."""

import csv
import io
import math
from dataclasses import dataclass, field

MARKDOWN = {ord(c): f"&#{ord(c)};" for c in "\\|`<>&[]*$"}  # entities: a backslash does not protect everywhere


def escape(text):
    return text.translate(MARKDOWN)


def show(x):
    """At least three digits of a return."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def show_timesteps(n):
    """300k, 1.2M."""
    power = min(max(len(f"{n:.0f}") - 1, 0) // 3, 3)
    return f"{n / 1000**power:.4g}{['', 'k', 'M', 'G'][power]}"


def show_interval(point, low, high, show=show):
    """The ends are left out if there are none."""
    return f"{show(point)} [{show(low)}, {show(high)}]" if math.isfinite(low) else show(point)


def as_record(name, estimate):
    """Cells of a CSV file for an estimate and its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(float, estimate)))


@dataclass
class Table:
    """Rows as they are shown, and the same in numbers."""

    titles: list[str]  # of the columns
    names: int  # of the first columns, which hold names
    against: str = ""  # title of a further column for each of the baselines, with {} for its name
    baselines: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)

    def header(self, escape=str):
        return self.titles + [self.against.format(escape(baseline)) for baseline in self.baselines]

    def to_markdown(self):
        lines = [f"| {' | '.join(self.header(escape))} |", f"|{'-|' * len(self.header())}"]
        for row in self.rows:
            lines.append(f"| {' | '.join([*map(escape, row[: self.names]), *row[self.names :]])} |")
        return "\n".join(lines)


def to_csv(tables):
    """The numbers of all tables, below one header."""
    records = [record for table in tables for record in table.records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
