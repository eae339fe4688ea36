"""`python -m secateur`, for `torchrun -m secateur`."""

from secateur.cli import main

main()
