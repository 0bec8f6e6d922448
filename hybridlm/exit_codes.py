"""What a run's process says by how it ends, to a supervisor or a scheduler. Imports nothing."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
"""Starting again would change nothing."""
EXIT_STOPPED = 75
"""The run was asked to stop, saved, and wants to be started again (EX_TEMPFAIL)."""
EXIT_DIVERGED = 76
"""Devices held different copies of one array. The last checkpoint is older than that: start again from there."""
EXIT_INTERRUPTED = 130
"""A second request ended the run at once, as SIGINT ends a process."""
