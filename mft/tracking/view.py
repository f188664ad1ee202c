"""What MLflow's page of an experiment is opened with: the charts of its runs, or a table of their results.

The page keeps a view that is shared by a link in a tag of the experiment (as of 3.17.2), so that the table
need not be put together by hand: by default it shows no metric.
"""

from __future__ import annotations

import json

CHARTS = "compareRunsMode=CHART&workflowType=machine_learning"
"""MLflow's page opens on traces of language model apps, which are empty here; this opens the runs' charts."""

TABLE = "viewStateShareKey=mft&workflowType=machine_learning"
"""Opens the runs in a table, the best first, with the columns of VIEW."""

VIEW_TAG = "mlflow.sharedViewState.mft"

_METRICS = ("best/valid/loss", "test/loss", "total/tokens", "total/seconds")
_PARAMS = ("model", "peft", "loss", "optimizer.lr", "train.seed")
_ATTRIBUTES = ("Dataset", "Models")

VIEW = json.dumps(
    {
        "selectedColumns": [
            *(f"attributes.`{name}`" for name in _ATTRIBUTES),
            *(f"metrics.`{name}`" for name in _METRICS),
            *(f"params.`{name}`" for name in _PARAMS),
        ],
        "orderByKey": f"metrics.`{_METRICS[0]}`",
        "orderByAsc": True,
    }
)
"""The table: columns and order, as the page itself writes them."""
