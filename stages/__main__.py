"""`python -m stages` is `align`: the form that `accelerate launch -m stages run ...` starts."""

from __future__ import annotations

from stages.cli import main

if __name__ == "__main__":
    main()
