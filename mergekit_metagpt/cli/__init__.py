"""The command ``mergekit-metagpt``."""

import click


@click.group()
def main() -> None:
    """MetaGPT merges."""
