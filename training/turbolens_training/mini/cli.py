"""`turbolens train mini`."""

from __future__ import annotations

import shutil
from pathlib import Path

from turbolens_server.files import whole_folder
from turbolens_server.loading.hub import embedded_model
from turbolens_server.loading.load import load_engine
from turbolens_training.mini.config import MiniConfig
from turbolens_training.mini.report import to_markdown, write_report
from turbolens_training.mini.train import train_mini

REPORT = Path("docs/mini")
"""Where the report on the shipped model lives in the repository."""


def run(config: MiniConfig) -> None:
    """Train, or measure what ships."""
    if config.report:
        report = write_report(load_engine(saes=[]), REPORT)
        config.tell(to_markdown(report), report=report)
        return
    folder = train_mini(config)
    config.tell(f"The model is in {folder}", model=folder)
    if config.ship:
        with whole_folder(embedded_model(), replace=True) as whole:
            shutil.copytree(folder, whole, dirs_exist_ok=True)
        line = f"and in {embedded_model()}; run `turbolens train rebuild` for what depends on it"
        config.tell(line, shipped=embedded_model())
