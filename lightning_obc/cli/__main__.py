"""``python -m lightning_obc.cli``."""

from lightning_obc.cli import console

if __name__ == "__main__":
    console()
