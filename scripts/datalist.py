"""Datalists: which volumes train, validate and test.

python -m scripts.datalist build --data_dir D --val_fraction 0.1 --output data/datalist_ct.json
python -m scripts.datalist check data/datalist_ct.json
"""

from __future__ import annotations

from scripts.common.words import door
from scripts.data.build import build
from scripts.data.examine import check

if __name__ == "__main__":
    door({"build": build, "check": check})
