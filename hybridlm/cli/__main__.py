"""`python -m hybridlm.cli`."""

from hybridlm.cli import main

main()
