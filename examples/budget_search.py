"""Non-uniform compression: the best bit width and sparsity of every layer under budgets of bit operations.

    python -m examples.budget_search

Every layer is solved once for every level; the search then only stitches solved layers together and measures them.
"""

from __future__ import annotations

from jsonargparse import auto_cli

import lightning_obc as obc
from examples.digits import CHECKPOINT, accuracy, trained


def main(checkpoint: str = CHECKPOINT, budgets: tuple[float, ...] = (0.03, 0.015, 0.009)) -> dict[str, float]:
    """Search, print the trade-off curve, and apply the point of the smallest budget.

    Args:
        checkpoint: The trained network; it is trained first where there is none.
        budgets: Shares of the bit operations (BOPs) of the dense float32 network.
    """
    model, data = trained(checkpoint)
    dense = accuracy(model, data)

    result = obc.search(
        model,
        data.train_dataloader(),
        budgets=list(budgets),
        metric=lambda candidate: accuracy(candidate, data),
        cost="bops",
        calibration=obc.Calibration(samples=256),
        metric_name="test accuracy",
    )
    print(result.table())

    point = result.point(min(budgets))
    result.apply_(model, point)
    small = accuracy(model, data)
    for layer, level in point.profile.items():
        print(f"  {layer:24} {level}")
    print(
        f"test accuracy at 1/{1 / point.cost:.0f} of the BOPs: {100 * small:.2f} % (dense float32: {100 * dense:.2f} %)"
    )
    return {"dense": dense, "compressed": small, "cost": point.cost}


if __name__ == "__main__":
    auto_cli(main)
