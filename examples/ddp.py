"""Several processes: calibration batches and layers shared over two ranks, on one CPU.

    python -m examples.ddp

The callback needs no setting for it. Every rank runs its own batches through the network, solves its own layers, and
gets the same bits of all of them. With GPUs: ``accelerator="gpu"``, and as many devices as there are.
"""

from __future__ import annotations

from jsonargparse import auto_cli
from lightning.pytorch import Trainer

import lightning_obc as obc
from examples.digits import CHECKPOINT, trained


def main(checkpoint: str = CHECKPOINT, devices: int = 2) -> dict[str, float]:
    """Quantize to 4 bits in ``trainer.validate``, and print what each rank did.

    Args:
        checkpoint: The trained network; it is trained first where there is none.
        devices: Processes to start.
    """
    # Lightning starts this script once more for every other rank; the checkpoint is there by then.
    model, data = trained(checkpoint)
    stages = [obc.Prune("2:4", at="validate", misfit="skip"), obc.Quantize(4, at="validate")]
    callback = obc.OBCCallback(stages, calibration=obc.Calibration(samples=512), save_checkpoint=False, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.validate(model, data, verbose=False)

    report = callback.report
    assert report is not None
    dense, small = report.figures["val_accuracy"]
    if trainer.is_global_zero:
        for stage in report.stages:
            for share in stage.work:
                print(
                    f"{stage.stage}, rank {share.rank}: {share.layers:g} of {len(stage.layers)} layers, "
                    f"{share.flops / 1e9:.2f} Gflop in {share.seconds:.1f} s"
                )
        print(f"validation accuracy, 2:4 and 4 bits: {100 * small:.2f} % (dense float32: {100 * dense:.2f} %)")
    return {"dense": dense, "compressed": small}


if __name__ == "__main__":
    auto_cli(main)
