"""`python -m difrl`, which is what `accelerate launch -m difrl train …` starts in every process."""

from __future__ import annotations

from difrl.cli import main

if __name__ == "__main__":
    main()
