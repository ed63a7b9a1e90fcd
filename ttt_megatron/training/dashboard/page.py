"""The dashboard's two files."""

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.config.convert import to_flat
from ttt_megatron.evaluation.pictures import save_figure
from ttt_megatron.training.dashboard.figure import draw_dashboard
from ttt_megatron.training.dashboard.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, PICTURE = "dashboard.html", "dashboard.png"
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1500px;
       padding: 0 1rem; color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
dl { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: .5rem 0 1rem; }
dt { color: #666; font-size: .85rem; } dd { margin: 0; font-weight: 600; }
svg { width: 100%; height: auto; } .tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.tables section { flex: 1 1 26rem; min-width: 0; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td { border-bottom: 1px solid #e6e6e6; padding: .15rem .6rem .15rem 0; vertical-align: top;
     overflow-wrap: anywhere; } td:first-child { color: #555; white-space: nowrap; }
"""


def write_dashboard(history: RunHistory, folder: Path) -> list[Path]:
    """Writes the page and the picture into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw_dashboard(history)
    page = folder / PAGE
    beside = folder / f".{PAGE}.tmp"
    beside.write_text(_html(history, _svg(figure)), encoding="utf-8")
    beside.replace(page)
    figure.suptitle(f"{history.config.name}: {_progress(history)}", fontsize=12)
    save_figure(figure, folder / PICTURE)
    return [page, folder / PICTURE]


def _svg(figure: "Figure") -> str:
    written = io.StringIO()
    # Without what would name other places on the network.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    return text[text.index("<svg") :]


def _html(history: RunHistory, picture: str) -> str:
    name = escape(history.config.name)
    facts = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(history)
    )
    # MLflow's own tags say what others say.
    tags = {key: value for key, value in history.tags.items() if not key.startswith("mlflow.")}
    settings = {key: str(value) for key, value in to_flat(history.config).items()}
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{name}</h1>\n<dl>{facts}</dl>\n{picture}\n"
        f'<div class="tables">{_table("Tags", tags)}{_table("Settings", settings)}</div>\n'
        "</body></html>\n"
    )


def _facts(history: RunHistory) -> list[tuple[str, str]]:
    facts = [("step", _progress(history)), ("tokens", f"{history.tokens:,}")]
    for name, label in (("loss", "last loss"), ("validation_loss", "validation loss")):
        _, values = history.series(name)
        if values:
            facts.append((label, f"{values[-1]:.4f}"))
    facts.append(("time in steps", _duration(history.seconds)))
    facts.append(("restarts", history.tags.get("restarts", str(len(history.restarts)))))
    facts.append(("skipped steps", str(sum(bool(row.get("skipped")) for row in history.rows))))
    facts += [
        (key, history.tags[key]) for key in ("host", "gpu", "slurm.job_id") if key in history.tags
    ]
    return facts


def _progress(history: RunHistory) -> str:
    return f"{history.step:,} of {history.config.training.steps:,} steps"


def _table(title: str, values: Mapping[str, str]) -> str:
    if not values:
        return ""
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<section><h2>{title}</h2><table>{rows}</table></section>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
