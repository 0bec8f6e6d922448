"""`hybridlm report`: what a run wrote down, as one HTML file that needs nothing else."""
