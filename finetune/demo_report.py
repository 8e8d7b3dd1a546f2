"""The demo's results as JSON, as a table for the terminal, and as one self-contained page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from data_pipeline.dataset import read_info

# The order of the table, and what each row is.
ROWS = {
    "expert": "scripted expert, sees the true state",
    "policy": "this model",
    "bc": "behaviour cloning, a small CNN on the same data",
    "blind": "this model with its image black",
    "random": "random actions",
}


def collect_results(folder: Path, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every figure of the demo, by the names that README and benchmarks quote."""
    evaluation = json.loads((folder / "evaluation" / "results.json").read_text())
    codec = read_info(folder / "dataset").codec
    results = {
        "video": json.loads((folder / "video.json").read_text()),
        "codec": {"psnr": codec.psnr, "psnr_moving": codec.psnr_moving},
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_memory_gb": {name: stage["peak_memory_gb"] for name, stage in stages.items()},
    }
    results["seconds"]["total"] = round(sum(results["seconds"].values()), 1)
    for key in ("success", "pooled", "action_error"):
        if key in evaluation:
            results[key] = evaluation[key]
    return results


def results_table(results: dict[str, Any]) -> str:
    lines = []
    if "success" in results:
        tasks = list(results["success"])
        lines.append(f"{'successes':10}" + "".join(f"{task:>26}" for task in tasks) + f"{'pooled (95 %)':>22}")
        for row in ROWS:
            if row not in results["pooled"]:
                continue
            counts = [results["success"][task][row] for task in tasks]
            cells = "".join("{:>26}".format(f"{c['successes']} of {c['episodes']}") for c in counts)
            low, high = results["pooled"][row]["interval"]
            lines.append(f"{row:10}{cells}{results['pooled'][row]['rate']:>10.0%} ({low:.0%}-{high:.0%})")
    if "action_error" in results:
        lines.append(f"{'action error':18}{'L1':>12}{'L1 normalised':>16}")
        for row, errors in results["action_error"].items():
            lines.append(f"{row:18}{errors['l1']:>12.4g}{errors['l1_normalised']:>16.4g}")
    video, codec = results["video"], results["codec"]
    lines += [
        "",
        f"{'PSNR, dB':36}{'all pixels':>12}{'moving':>10}",
        f"{'codec (the ceiling)':36}{decibel(codec['psnr'])}{decibel(codec['psnr_moving'], 10)}",
        f"{'imagined, true actions':36}{decibel(video['psnr_model'])}{decibel(video['psnr_moving_model'], 10)}",
        f"{'imagined, shuffled actions':36}{decibel(video['psnr_shuffled_actions'])}"
        f"{decibel(video['psnr_moving_shuffled_actions'], 10)}",
        f"{'last frame copied':36}{decibel(video['psnr_copy_last'])}{decibel(video['psnr_moving_copy_last'], 10)}",
        "",
        f"{results['seconds']['total'] / 60:.1f} minutes, at most {max(results['peak_memory_gb'].values()):.1f} GB",
    ]
    return "\n".join(lines)


def decibel(value: float | None, width: int = 12) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>{width}}"


# --- the page -----------------------------------------------------------------------------------------------------


def write_report(folder: Path, results: dict[str, Any], commands: Sequence[tuple[str, str]]) -> None:
    here = Path(__file__).parent
    # The look is the dataset report's: one style sheet for both pages.
    loader = jinja2.FileSystemLoader([here, here.parent / "data_pipeline"])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("demo_report.html.j2").render(
        results=results,
        rows=ROWS,
        commands=commands,
        dataset=read_info(folder / "dataset"),
        losses=[loss_curve(folder / run / "metrics.jsonl") for run in ("pretrain", "finetune")],
        sizes={run: yaml.safe_load((folder / run / "config.yaml").read_text()) for run in ("pretrain", "finetune")},
        strips=data_uri(folder / "rollouts" / "strips.png", "image/png"),
        films=[
            (film.stem, data_uri(film, "video/mp4")) for film in sorted((folder / "evaluation").glob("films/*.mp4"))
        ],
    )
    partial = folder / ".report.html"
    partial.write_text(page)
    partial.replace(folder / "report.html")


def loss_curve(metrics: Path) -> dict[str, str]:
    """Training (smoothed over a twentieth of the run) and validation loss parts over steps, as an SVG."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    parts = sorted({key for row in rows if row["split"] == "train" for key in row if key.startswith("loss/")})
    figure = Figure(figsize=(4.6 * len(parts), 2.9))
    axes = figure.subplots(1, len(parts), squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        train = [(row["step"], row[part]) for row in rows if row["split"] == "train" and part in row]
        held_out = [(row["step"], row[part]) for row in rows if row["split"] == "validation" and part in row]
        steps, values = [step for step, _ in train], [value for _, value in train]
        axis.plot(steps, values, color="#3b6fd6", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed(values), color="#3b6fd6", label="training")
        axis.plot(
            *zip(*held_out, strict=True), "o-", color="#d0563f", markersize=3, label="held out"
        ) if held_out else None
        axis.set_title(part.removeprefix("loss/"), fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(0, 1.05 * max(smoothed(values)))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][-1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=False, metadata={"Date": None})
    uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"name": metrics.parent.name, "image": uri}


def smoothed(values: list[float]) -> list[float]:
    window = max(1, len(values) // 20)
    return [
        sum(values[max(0, i - window) : i + 1]) / len(values[max(0, i - window) : i + 1]) for i in range(len(values))
    ]


def data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
