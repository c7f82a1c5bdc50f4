"""``python -m mergekit_metagpt`` is the command ``mergekit-metagpt``."""

from mergekit_metagpt.cli import main

if __name__ == "__main__":
    main(prog_name="python -m mergekit_metagpt")
